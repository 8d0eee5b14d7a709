"""Teachers in Hugging Face's transformers."""
