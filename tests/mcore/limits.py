"""Print what a training step says to sequences around a student's limit, a line each.

python tests/mcore/limits.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from nemo_kd.mcore import cpu

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

from nemo_kd.checkpoints import open_checkpoint  # noqa: E402
from nemo_kd.errors import NemoKDError  # noqa: E402
from nemo_kd.loss import KDConfig  # noqa: E402
from nemo_kd.mcore import KDDataset  # noqa: E402
from nemo_kd.mcore.gpt import build, settings_of  # noqa: E402
from nemo_kd.mcore.training import kd_forward_step  # noqa: E402
from nemo_kd.store import Store  # noqa: E402
from tests.checkpoints import models  # noqa: E402
from tests.store.samples import sample, spec, write  # noqa: E402

WINDOW = {"sliding_window": 40}
CASES = [("dynamic", {}, 128), ("mistral", WINDOW, 40), ("mistral", {}, 128)]
"""Model, its changes, and `seq_length`: the limit, or the model's context."""


def said(model: Any, store: Path, seq_length: int, *, packed: bool = False) -> str:
    """The shape of the losses, or the error."""
    data = KDDataset(Store(store), seq_length=seq_length, packed=packed, shuffle=False)
    batch = data.collate_fn([data[0]])
    step = kd_forward_step(KDConfig(), data.vocab_size or 0)
    if packed:  # Megatron-core's own attention has no packs: only what is checked before it
        model.forward = lambda **_: torch.zeros(0)
    try:
        return str(tuple(step(iter([batch]), model)[0].shape))
    except NemoKDError as error:
        return str(error)


def main(directory: Path) -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    of = spec(vocab_size=models.TOKENS)
    written = directory / "store"
    write(written, of, [sample(n, of, 20, prompt=10) for n in range(5)])
    for number, (name, changes, length) in enumerate(CASES):
        settings = {**models.FAMILIES, **models.ROPES}
        models.FAMILIES["changed"] = {
            "model_type": "llama",
            **settings[name],
            "vocab_size": 300,
            **changes,
        }
        path = models.save(models.family("changed"), directory / str(number))
        (model,) = build(settings_of(open_checkpoint(path).model), calculate_per_token_loss=True)
        print(said(model, written, length))
        print(said(model, written, length + 8))
        print(said(model, written, 2 * length + 40, packed=True))
        model.token_limit = model.token_limit and (28, "the longest sequence is not enough")
        print(said(model, written, 2 * length + 40, packed=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
