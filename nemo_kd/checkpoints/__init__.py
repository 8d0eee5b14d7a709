"""Convert checkpoints between Hugging Face and Megatron; `families.py` has what is converted."""

from __future__ import annotations

from pathlib import Path

from nemo_kd.checkpoints.model import Checkpoint, CheckpointError, Model
from nemo_kd.checkpoints.nemo_file import Conversion, parse_layers, write_nemo, written_bytes
from nemo_kd.checkpoints.tokenizer import resolve_tokenizer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Conversion",
    "Model",
    "open_checkpoint",
    "parse_layers",
    "resolve_tokenizer",
    "write_nemo",
    "written_bytes",
]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory (config.json, *.safetensors) or a `.gguf` file."""
    path = Path(path)
    if path.is_dir():
        from nemo_kd.checkpoints.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        from nemo_kd.checkpoints.gguf_file import GGUFCheckpoint

        return GGUFCheckpoint(path)
    raise CheckpointError(
        f"no checkpoint at {path}; expected a Hugging Face directory or a .gguf file"
    )
