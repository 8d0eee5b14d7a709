"""Validity rules for samples, applied by the writer before storing and by `verify` afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.sample import Sample
from nemo_kd.store.spec import StoreSpec
from nemo_kd.topk import ABSENT_ID, TopK, t1_index

# A log-probability, or the log of a probability mass, that exceeds 0 by more than rounding error
# means that the log-sum-exp was computed from different logits.
MAX_LOG_PROBABILITY = 1e-2


class Fault(NamedTuple):
    """The first entry of a `TopK` that breaks a rule."""

    token: int
    """Index of the answer token."""

    column: int
    what: str


def checked_tokens(
    input_ids: Any, loss_mask: Any, vocab_size: int
) -> tuple[NDArray[np.int32], NDArray[np.uint8], int]:
    """Validate tokens and mask; return input_ids int32 [S], loss_mask uint8 [S] and A.

    A is the number of answer tokens. Raises StoreError for invalid shapes or values.
    """
    ids, mask = np.asarray(input_ids), np.asarray(loss_mask)
    if ids.ndim != 1 or mask.shape != ids.shape or not ids.size:
        raise StoreError(
            f"input_ids {list(ids.shape)} and loss_mask {list(mask.shape)} must be two vectors "
            "of the same length, at least 1"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        reach = f"{ids.min()} to {ids.max()}"
        raise StoreError(f"input_ids range from {reach}, outside [0, vocab_size={vocab_size})")
    if not ((mask == 0) | (mask == 1)).all():
        raise StoreError("loss_mask must contain only 0 and 1")
    binary = np.ascontiguousarray(mask, dtype=np.uint8)
    return np.ascontiguousarray(ids, dtype=np.int32), binary, int(np.count_nonzero(binary[1:]))


def checked_topk(sample: Sample, answers: int, spec: StoreSpec) -> TopK:
    """Validate a sample's `TopK` against the spec and return it with the store's dtypes.

    Raises StoreError, naming the answer token and column where a value is invalid.
    """
    topk = sample.topk
    if topk.temperatures != spec.temperatures:
        raise StoreError(
            f"the log-sum-exp is at temperatures {list(topk.temperatures)}, expected the store's "
            f"temperatures {list(spec.temperatures)}"
        )
    if topk.draws != (spec.profile == Sampled.name):
        raise StoreError(
            f"TopK.draws={topk.draws}, but the profile is {spec.profile}: store draws with the "
            f"profile {Sampled.name}, the largest logits with any other"
        )
    shape, temperatures = (answers, spec.top_k), (answers, len(spec.temperatures))
    checked = replace(
        topk,
        ids=_array("ids", topk.ids, np.int64, shape),
        logits=_array("logits", topk.logits, np.float32, shape),
        logsumexp=_array("logsumexp", topk.logsumexp, np.float32, temperatures),
    )
    for fault in topk_faults(checked, spec):
        raise StoreError(f"answer token {fault.token}, column {fault.column}: {fault.what}")
    return checked


def topk_faults(topk: TopK, spec: StoreSpec) -> Iterator[Fault]:
    """Yield violations of the rules that are cheap to check; nothing for a valid `TopK`."""
    ids, logits, logsumexp = topk.ids, topk.logits, topk.logsumexp
    at_t1 = logsumexp[:, t1_index(spec.temperatures), None]
    if not ids.size or _is_ordinary(topk, at_t1, spec.vocab_size):
        return
    absent = logits == -np.inf
    # For each rule: the mask of violations, the values to report, the message.
    yield from _faults(absent[:, :1], logits, "no logit at all")
    yield from _faults(~(logits < np.inf), logits, "a logit that is not a number")
    yield from _faults(~np.isfinite(logsumexp), logsumexp, "a log-sum-exp that is not finite")
    rises = logits[:, 1:] > logits[:, :-1]
    yield from _faults(rises, logits[:, 1:], "logits must be in descending order, but one rises to")
    outside = (ids < 0) | (ids >= spec.vocab_size)
    outside ^= absent  # absent entries must have no id, all others a valid one
    wrong = outside | (absent & (ids != ABSENT_ID))
    yield from _faults(wrong, ids, f"an id that is neither in [0, {spec.vocab_size}) nor absent:")
    with np.errstate(invalid="ignore"):  # non-finite values are reported by the rules above
        above = logits[:, :1] - at_t1 > MAX_LOG_PROBABILITY
    yield from _faults(above, logits, "a logit above the log-sum-exp at T = 1:")


def _is_ordinary(topk: TopK, at_t1: NDArray[np.float32], vocab_size: int) -> bool:
    """Return whether all rules hold and no entry is absent; takes a third of the full check's time.

    Checking the first and last logit for finiteness suffices: descending values between two finite
    ones are finite, and a comparison with NaN is false.
    """
    ids, logits, logsumexp = topk.ids, topk.logits, topk.logsumexp
    return bool(
        (logits[:, 1:] <= logits[:, :-1]).all()
        and np.isfinite(logits[:, [0, -1]]).all()
        and np.isfinite(logsumexp).all()
        and (logits[:, :1] - at_t1 <= MAX_LOG_PROBABILITY).all()
        and ids.min() >= 0
        and ids.max() < vocab_size
    )


def deep_faults(topk: TopK, spec: StoreSpec) -> Iterator[Fault]:
    """Yield repeated ids and probability masses above 1, which the writer does not check."""
    ids, logits, logsumexp = topk.ids, topk.logits, topk.logsumexp
    if not ids.size:
        return
    narrow = np.int32 if spec.vocab_size <= 1 << 31 else np.int64  # sorted in half the time
    ordered = np.sort(ids.astype(narrow), axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != ABSENT_ID)).any():
        yield from _faults(_repeated(ids), ids, "the same id twice:")
    with np.errstate(invalid="ignore"):
        relative = logits - logsumexp[:, t1_index(spec.temperatures), None]
    np.exp(relative, out=relative)
    mass = relative.sum(axis=1, keepdims=True)  # pairwise: its error is far below the tolerance
    yield from _faults(mass > 1 + MAX_LOG_PROBABILITY, mass, "a probability mass above 1:")


def _repeated(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask [A, K] of ids that already occurred further left in their row."""
    order = ids.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != ABSENT_ID)
    repeated = np.zeros(ids.shape, np.bool_)
    np.put_along_axis(repeated, order[:, 1:], again, axis=1)
    return repeated


def _faults(broken: NDArray[np.bool_], values: NDArray[Any], what: str) -> Iterator[Fault]:
    if broken.any():
        token, column = map(int, np.argwhere(broken)[0])
        yield Fault(token, column, f"{what} {values[token, column]}")


def _array(name: str, value: Any, dtype: Any, shape: tuple[int, int]) -> NDArray[Any]:
    array = np.asarray(value)
    if array.shape == shape[:1] and shape[1] == 1:
        array = array[:, None]  # the log-sum-exp at a single temperature
    if array.shape != shape:
        raise StoreError(
            f"topk.{name} is {list(array.shape)}, expected {list(shape)} for its {shape[0]} "
            "answer tokens (loss_mask[1:].sum())"
        )
    with np.errstate(over="ignore"):  # infinite values are refused by the rules
        return np.ascontiguousarray(array, dtype=dtype)
