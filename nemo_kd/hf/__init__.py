"""Teachers run by Hugging Face transformers; needs neither NeMo nor Megatron."""
