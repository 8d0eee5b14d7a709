"""Teachers behind an inference server (vLLM, SGLang); needs neither NeMo nor a model here."""
