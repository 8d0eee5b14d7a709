"""SFT rows: JSONL files, without NeMo and without index files."""

from nemo_kd.sft.jsonl import JsonlFile, RowError

__all__ = ["JsonlFile", "RowError"]
