"""SFT files: rows, prompt templates and tokenizers; imports neither NeMo nor torch."""

from nemo_kd.sft.files import RowFile, open_files
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.jsonl import JsonlFile

__all__ = ["JsonlFile", "RowError", "RowFile", "open_files"]
