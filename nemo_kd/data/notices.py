"""Notices printed when a store is opened for training or validation."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_kd.data.lengths import Fitting, LengthLimit
from nemo_kd.store import Store
from nemo_kd.store.tools.stats import stats

COMPARED_SAMPLES = 64
"""Samples whose labels are compared with the teacher's first choices."""


def notices(store: Store, fitting: Fitting, limit: LengthLimit) -> Iterator[str]:
    """Yield a line on samples that are truncated or dropped, and one on rows of other labels.

    For one rank: the same on all of them, after reading `COMPARED_SAMPLES` samples.
    """
    if fitting.truncated or fitting.dropped:
        yield f"store {store.origin}: more than {limit} tokens: {fitting}"
    if warning := stats(store, COMPARED_SAMPLES).agreement.warning():
        yield (
            f"store {store.origin}: WARNING: {warning} (measured on up to {COMPARED_SAMPLES} "
            "samples)"
        )
