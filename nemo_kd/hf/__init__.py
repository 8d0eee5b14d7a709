"""Teachers in Hugging Face's transformers, without NeMo and Megatron."""
