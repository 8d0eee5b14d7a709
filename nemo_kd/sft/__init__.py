"""SFT files: rows, prompt templates and tokenizers; imports neither NeMo nor torch."""

from nemo_kd.sft.jsonl import JsonlFile, RowError

__all__ = ["JsonlFile", "RowError"]
