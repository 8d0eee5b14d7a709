"""SFT files: their rows, prompt templates and tokenizers, without NeMo and without torch."""

from nemo_kd.sft.jsonl import JsonlFile, RowError

__all__ = ["JsonlFile", "RowError"]
