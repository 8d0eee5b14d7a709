"""What a sample must be before it is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store.codecs import ABSENT_ID, Teacher
from nemo_kd.store.errors import StoreError
from nemo_kd.store.sample import Sample
from nemo_kd.store.spec import StoreSpec

# A log-probability above 0 by more than rounding means a log-sum-exp of other logits.
MAX_LOG_PROBABILITY = 1e-2


def checked_tokens(sample: Sample) -> tuple[NDArray[np.int32], NDArray[np.uint8], int]:
    """input_ids int32 [S], loss_mask uint8 [S] and A; StoreError names the row."""
    input_ids = np.ascontiguousarray(sample.input_ids, dtype=np.int32)
    mask = np.asarray(sample.loss_mask)
    if input_ids.ndim != 1 or mask.shape != input_ids.shape or not input_ids.size:
        raise StoreError(
            f"row {sample.row}: input_ids {list(input_ids.shape)} and loss_mask "
            f"{list(mask.shape)} must be two vectors of one length, at least 1"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise StoreError(f"row {sample.row}: loss_mask must hold only 0 and 1")
    loss_mask = np.ascontiguousarray(mask, dtype=np.uint8)
    return input_ids, loss_mask, int(np.count_nonzero(loss_mask[1:]))


def checked_teacher(sample: Sample, answers: int, spec: StoreSpec) -> Teacher:
    """The teacher's arrays in their dtypes; StoreError names the row and the answer token."""
    ids = _array(sample, "topk_ids", np.int64, (answers, spec.top_k))
    logits = _array(sample, "topk_logits", np.float32, (answers, spec.top_k))
    logsumexp = _array(sample, "logsumexp", np.float32, (answers, len(spec.temperatures)))
    absent = np.isneginf(logits)
    outside = (ids < 0) | (ids >= spec.vocab_size)
    _refuse(sample, "an id outside the vocabulary", outside & ~absent, ids)
    _refuse(sample, "no logit but an id (absent is -1)", absent & (ids != ABSENT_ID), ids)
    _refuse(sample, "a logit that is not a number", np.isnan(logits) | (logits == np.inf), logits)
    _refuse(sample, "no logit at all", absent[:, :1], logits)
    _refuse(sample, "a log-sum-exp that is not finite", ~np.isfinite(logsumexp), logsumexp)
    _refuse(sample, "a logit above the one before it", logits[:, 1:] > logits[:, :-1], logits)
    unit = logsumexp[:, spec.temperatures.index(1.0), None]
    above = logits[:, :1] - unit > MAX_LOG_PROBABILITY
    _refuse(sample, "a logit above the log-sum-exp of all at T=1", above, logits)
    return Teacher(ids, logits, logsumexp)


def _array(sample: Sample, name: str, dtype: Any, shape: tuple[int, int]) -> NDArray[Any]:
    array = np.asarray(getattr(sample, name))
    if array.shape != shape:
        raise StoreError(
            f"row {sample.row}: {name} is {list(array.shape)}, expected {list(shape)} "
            f"for its {shape[0]} answer tokens (loss_mask[1:].sum())"
        )
    return np.ascontiguousarray(array, dtype=dtype)


def _refuse(sample: Sample, what: str, bad: NDArray[np.bool_], values: NDArray[Any]) -> None:
    if bad.any():
        token, column = np.argwhere(bad)[0]
        raise StoreError(
            f"row {sample.row}, answer token {token}, column {column}: {what} "
            f"({values[token, column]}); the store takes logits by falling size"
        )
