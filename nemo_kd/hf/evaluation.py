"""Evaluate each sample once: all of them, and none that accelerate repeats to fill a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nemo_kd.errors import NemoKDError
from nemo_kd.hf.collator import IGNORED, TEACHER
from nemo_kd.topk import ABSENT_ID


@contextmanager
def all_samples(args: Any) -> Iterator[None]:
    """Context manager in which `dataloader_drop_last`, a setting of the training, is off."""
    drop_last = args.dataloader_drop_last
    args.dataloader_drop_last = False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop_last


def is_empty(loader: Any) -> bool:
    """Whether a data set or a loader has nothing; False if it does not know."""
    try:
        return len(loader) == 0
    except TypeError:
        return False


def not_empty(loader: Any, name: str) -> Any:
    """Return a data set or its loader; raise NemoKDError if it has nothing."""
    if is_empty(loader):
        raise NemoKDError(f"{name} has no samples: leave it out, or give one that has some")
    return loader


def without_repeated(batch: Mapping[str, Tensor], accelerator: Any) -> Mapping[str, Tensor]:
    """Return a batch of an evaluation without answer tokens in samples that are repeated.

    In the last batch of several processes, which all have B samples of it, process p has those
    from p · B on; the first `remainder` over all processes are the data set's, the others are
    repeated from its beginning.
    """
    from accelerate.data_loader import DataLoaderDispatcher

    state, size = accelerator.gradient_state, len(batch["labels"])
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch
    dispatched = isinstance(state.active_dataloader, DataLoaderDispatcher)
    if not (dispatched or accelerator.even_batches):
        return batch  # none is repeated
    own = max(0, state.remainder - accelerator.process_index * size)
    if own >= size:
        return batch
    labels, teacher = batch["labels"].clone(), batch[TEACHER].clone()
    labels[own:], teacher[own:] = IGNORED, ABSENT_ID
    return {**batch, "labels": labels, TEACHER: teacher}
