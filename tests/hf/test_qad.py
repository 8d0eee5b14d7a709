"""`examples/qad/train.py`: int4 weights, their losses by hand, the saved student, refusals."""

from __future__ import annotations

import json
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nemo_kd.hf.student import load_student
from nemo_kd.sft.tokenizer import HFTokenizer, tokenizer_fingerprint
from nemo_kd.store import Store
from tests.checkpoints import models
from tests.conftest import Shared
from tests.processes import ROOT, error_of, run_script
from tests.store.samples import sample, spec, write

EXAMPLE = "qad/train.py"
BLOCK, LEVELS = 128, 7  # of modelopt's INT4_BLOCKWISE_WEIGHT_ONLY_CFG
needs_modelopt = pytest.mark.skipif(
    not find_spec("modelopt"), reason="modelopt is missing: pip install nemo-kd[qad]"
)


@pytest.fixture(scope="session")
def quantisable(shared: Shared) -> Path:
    """`llama`, of whole blocks, and `store`, whose teacher is made up."""

    def make(directory: Path) -> None:
        shape = {"hidden_size": BLOCK, "intermediate_size": 2 * BLOCK, "num_hidden_layers": 2}
        models.save(
            models.build("llama", **models.MODELS["tied_grouped"] | shape), directory / "llama"
        )
        tokenizer = HFTokenizer(directory / "llama")
        of = spec(
            vocab_size=tokenizer.vocab_size,
            tokenizer={
                "fingerprint": tokenizer_fingerprint(tokenizer),
                "library": "huggingface",
                "path": None,
            },
        )
        write(directory / "store", of, [sample(i, of, 3 + 2 * i, prompt=2 + i) for i in range(4)])

    return shared("quantisable", make)


def options(directory: Path, *more: str) -> list[str]:
    return [f"--store={directory}/store", f"--heldout={directory}/store", "--batch-size=2", *more]


def rounded(weight: NDArray[np.float32]) -> torch.Tensor:
    """Symmetric 4-bit integers, one scale per block of 128 inputs: the largest weight is 7."""
    blocks = weight.astype(np.float64).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1, keepdims=True) / LEVELS
    return torch.from_numpy((np.round(blocks / scale) * scale).reshape(weight.shape))


@torch.no_grad()
def cross_entropy(directory: Path) -> float:
    """Of the rounded model on the store's answer tokens, by transformers in float64."""
    model: Any = load_student(directory / "llama")[0].double()
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.detach().float().numpy())
    losses = []
    store = Store(directory / "store")
    for one in store:
        ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
        log_p = model(input_ids=ids).logits[0, :, : store.spec.vocab_size].log_softmax(-1)
        at = torch.from_numpy(one.answer_positions())
        losses.append(-log_p[at - 1, ids[0, at]])
    return float(torch.cat(losses).mean())


def test_the_standard_error_of_a_share_is_that_of_leaving_out_samples() -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 50, (400,), generator=rng).double()
    below = tokens * (0.3 + 0.2 * torch.randn(400, generator=rng, dtype=torch.float64))
    above = 0.1 * below + tokens * 0.05 * torch.randn(400, generator=rng, dtype=torch.float64)
    value, error = runpy.run_path(str(ROOT / "examples" / EXAMPLE))["ratio"](above, below)
    without = (above.sum() - above) / (below.sum() - below)  # the jackknife
    assert value == pytest.approx(float(above.sum() / below.sum()))
    assert error == pytest.approx(float(without.std() * 399 / 400**0.5), rel=0.02)


@needs_modelopt
def test_losses_are_those_of_rounded_weights_and_the_saved_student_has_the_trained_ones(
    quantisable: Path, tmp_path: Path
) -> None:
    def run(student: Path, out: Path, *more: str) -> dict[str, Any]:
        given = [str(student), *options(quantisable, f"--output={out}", *more)]
        run_script(EXAMPLE, *given, fork=False)  # modelopt patches transformers
        found: dict[str, Any] = json.loads((out / "qad.json").read_text())
        return found

    first = run(quantisable / "llama", tmp_path / "run", "--steps=20", "--lr=3e-3")
    losses, lost = first["losses"], first["above_before"]
    assert losses["quantised"]["sft_loss"] == pytest.approx(cross_entropy(quantisable), abs=1e-4)
    assert losses["trained"]["kd_loss"] < losses["quantised"]["kd_loss"] - 0.1
    gained = 1 - lost["trained"]["kd_loss"]["nats"] / lost["quantised"]["kd_loss"]["nats"]
    assert first["recovered"]["kd_loss"]["share"] == pytest.approx(gained)
    again = run(tmp_path / "run", tmp_path / "again", "--steps=1", "--format=none")
    assert again["losses"]["before"] == pytest.approx(losses["trained"], abs=1e-5)
    assert "recovered" not in again


@needs_modelopt
@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs here")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NVFP4_DEFAULT_CFG", "needs CUDA, as modelopt says: "),
        pytest.param("MXFP4_DEFAULT_CFG", "needs CUDA, as modelopt says: ", marks=pytest.mark.slow),
        pytest.param("INT5_CFG", "modelopt has none, ", marks=pytest.mark.slow),
    ],
)
def test_formats_that_do_not_run_here_are_refused(
    quantisable: Path, tmp_path: Path, name: str, said: str
) -> None:
    given = [f"{quantisable}/llama", *options(quantisable, f"--output={tmp_path}/out")]
    line = error_of(EXAMPLE, *given, f"--format={name}", fork=False)
    assert f"--format {name}" in line and said in line


def test_a_filled_output_is_refused(tmp_path: Path) -> None:
    """Before modelopt and the student are looked for."""
    (tmp_path / "adapter_config.json").write_text("{}")
    line = error_of(EXAMPLE, "none", *options(tmp_path, f"--output={tmp_path}"))
    assert f"{tmp_path} is not an empty directory" in line


@pytest.mark.skipif(find_spec("modelopt") is not None, reason="modelopt is there")
def test_without_modelopt_it_is_named(quantisable: Path, tmp_path: Path) -> None:
    given = [f"{quantisable}/llama", *options(quantisable, f"--output={tmp_path}/out")]
    assert "pip install '.[qad]' in a checkout" in error_of(EXAMPLE, *given)
