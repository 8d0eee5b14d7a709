"""Compare the logits of a converted model with those of transformers.

Both models compute in float32 from the same weights: transformers from the source, rounded to the
written type, NeMo from what was written. So one bound holds for every type. Rounding errors of
float32 are of order 2^-23 of the largest logit, times the square root of the number of operations
in a row: 1e-5 to 1e-4 for logits of order 10. A wrong tensor, setting or order of rows changes
logits by 0.1 and more.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_kd import extras
from nemo_kd.checkpoints.megatron import count_parameters
from nemo_kd.checkpoints.model import Checkpoint, CheckpointError, Model
from nemo_kd.tokenizer_files import load_files

BOUND = 1e-3
"""Largest absolute difference of a logit."""
TOKENS = 256
MAX_PARAMETERS = 1_000_000_000
"""Larger models are verified on request: it takes 4 bytes of memory per parameter, and time."""
SAMPLE = Path(__file__).with_name("sample.txt")
LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_", "MASTER_")
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")


@dataclass(frozen=True)
class Verified:
    """The outcome of a comparison."""

    difference: float
    """Largest absolute difference of a logit."""
    tokens: int


def is_verified(asked: bool | None, model: Model) -> bool:
    """Return whether to verify a conversion; by default small models, if NeMo is installed.

    Raises CheckpointError if it is asked for without NeMo, which computes one side.
    """
    installed = importlib.util.find_spec("nemo") is not None
    if asked and not installed:
        raise CheckpointError(
            f"--verify needs NeMo, which is not installed: {extras.install('nemo')}"
        )
    small = count_parameters(model, model.vocab_size) <= MAX_PARAMETERS
    return installed and small if asked is None else asked


def verify(
    checkpoint: Checkpoint,
    keep_layers: Sequence[int],
    dtype: torch.dtype | None,
    converted: Path,
    tokenizer: Path,
) -> Verified:
    """Compare `checkpoint`'s layers in transformers with the `converted` directory in NeMo.

    `dtype` is the type that all tensors were converted to; None: each has its own.
    Raises CheckpointError if a logit differs by more than BOUND.
    """
    ids = sample_ids(checkpoint.model, tokenizer)
    expected = transformers_logits(checkpoint, keep_layers, dtype, ids)
    return compare(expected, nemo_logits(converted, tokenizer, ids), checkpoint.name)


def verify_export(
    exported: Path, source: Path, model: Model, dtype: torch.dtype | None
) -> Verified:
    """Compare the directory `exported` in transformers with the .nemo `source` in NeMo.

    `dtype` is the type that all tensors were converted to; None: each has its own.
    Raises CheckpointError if a logit differs by more than BOUND.
    """
    from transformers import AutoModelForCausalLM

    ids = sample_ids(model, exported)
    written = AutoModelForCausalLM.from_pretrained(
        str(exported), torch_dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    with torch.no_grad():
        logits = written.eval()(ids).logits[0]
    return compare(logits, nemo_logits(source, exported, ids, dtype), str(source))


def compare(expected: torch.Tensor, actual: torch.Tensor, name: str) -> Verified:
    """Compare logits `[S, V]` over the tokens that both have; raise CheckpointError above BOUND."""
    tokens = min(expected.size(1), actual.size(1))
    difference = float((expected[:, :tokens] - actual[:, :tokens]).abs().max())
    if not difference <= BOUND:
        raise CheckpointError(
            f"{name}: the converted model's logits differ from transformers' by {difference:.2g}, "
            f"more than {BOUND:g}; nothing was written. Please report the model; --no-verify "
            "converts it all the same"
        )
    return Verified(difference, expected.size(0))


def sample_ids(model: Model, tokenizer: Path) -> torch.Tensor:
    """Token ids `[1, S]` of the packaged text, as many as the model takes."""
    limits = (TOKENS, model.context, model.window, model.max_tokens)
    length = min(limit for limit in limits if limit is not None)
    ids: list[int] = load_files(tokenizer)(SAMPLE.read_text(encoding="utf-8")).input_ids[:length]
    if not ids:
        raise CheckpointError(f"{tokenizer}: its tokenizer makes no tokens of plain text")
    return torch.tensor([ids])


@torch.no_grad()
def transformers_logits(
    checkpoint: Checkpoint, keep_layers: Sequence[int], dtype: torch.dtype | None, ids: torch.Tensor
) -> torch.Tensor:
    """Logits `[S, V]` of the kept layers in float32, of weights rounded to `dtype` if given."""
    from nemo_kd.checkpoints import huggingface

    if isinstance(checkpoint, huggingface.HuggingFaceCheckpoint):
        model = huggingface.transformers_own(checkpoint, keep_layers)
    else:
        model = huggingface.to_transformers(checkpoint, keep_layers)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
    logits: torch.Tensor = model(ids).logits[0]
    return logits


def nemo_logits(
    model: Path, tokenizer: Path, ids: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Logits `[S, V]` that NeMo computes on the CPU, in a process of its own.

    `model` is a .nemo or its unpacked directory; its weights are rounded to `dtype` if given. On
    the CPU, because TransformerEngine multiplies float32 in TF32.
    """
    with tempfile.TemporaryDirectory() as directory:
        given, result = Path(directory) / "ids.pt", Path(directory) / "logits.pt"
        torch.save(ids, given)
        rounded = [] if dtype is None else [str(dtype).removeprefix("torch.")]
        arguments = (model, tokenizer, given, result, *rounded)
        done = subprocess.run(
            [sys.executable, "-m", "nemo_kd.nemo.logits", *map(str, arguments)],
            env=_single_process(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise CheckpointError(
                f"the converted model cannot be verified, because NeMo fails with it: {lines[-1]}; "
                "nothing was written. --no-verify converts without"
            )
        logits: torch.Tensor = torch.load(result, weights_only=True)
        return logits


def _single_process() -> dict[str, str]:
    """The environment without a launcher's ranks and without a GPU."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in RANKS and not name.startswith(LAUNCHERS)
    }
    paths = [path for path in sys.path if path]
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
