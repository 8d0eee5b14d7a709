"""The sources of a mix: stores, and SFT files without a teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.rows import SFTRows
from nemo_kd.sft.tokenizer import tokenizer_fingerprint
from nemo_kd.store import Store

STUDENT = "student"
"""Setting of a training: path and fingerprint of the student that it started from."""
EARLIER = "earlier_fingerprint"
"""Key of that setting: what an earlier version would have recorded as its fingerprint."""


@dataclass(frozen=True)
class Source:
    """A store, or the rows of an SFT file without a teacher, in a mix."""

    data: Store | SFTRows
    """SFT rows, opened by `nemo_kd.sft.reader.open_rows` with the stores' tokenizer, are trained
    with cross-entropy only."""

    alpha: float | None = None
    """Weight of the distillation for the samples of this store; None: that of the training."""

    weight: float | None = None
    """Share of the draws, relative to the other sources; None in all: their numbers of samples."""

    def __post_init__(self) -> None:
        if not isinstance(self.data, Store | SFTRows):
            raise NemoKDError(
                f"a source is a {type(self.data).__name__}: expected a Store, or rows opened by "
                "nemo_kd.sft.reader.open_rows"
            )
        for name in ("alpha", "weight"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise NemoKDError(f"{name}={value!r} of {self.name}: expected a number")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise NemoKDError(f"alpha={self.alpha} of {self.name}: expected a value in [0, 1]")
        if self.alpha and isinstance(self.data, SFTRows):
            raise NemoKDError(
                f"alpha={self.alpha} of {self.name}: a file without a teacher has nothing to "
                "distil; leave out alpha, or dump the file"
            )
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise NemoKDError(f"weight={self.weight} of {self.name}: expected a value above 0")

    @property
    def name(self) -> str:
        """The store or the file, for messages."""
        return str(self.data.origin if isinstance(self.data, Store) else self.data.file.path)

    @property
    def tokenizer(self) -> str | None:
        """The fingerprint of the tokenizer; None if it is not known."""
        data = self.data
        if isinstance(data, Store):
            fingerprint: str | None = data.spec.tokenizer.get("fingerprint")
            return fingerprint
        return None if data.tokenizer is None else tokenizer_fingerprint(data.tokenizer)

    @property
    def fingerprint(self) -> str:
        """A hash of what determines the tokens."""
        data = self.data
        if isinstance(data, Store):
            return data.fingerprint
        settings = {"file": data.file.sha256, "template": data.template, "by": self.tokenizer}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


Sources = Store | Source | Sequence[Store | Source]


def sources_of(given: Sources) -> list[Source]:
    """Return the sources of a mix that may be given as one of them."""
    each = [given] if isinstance(given, Store | Source | str) else given
    return [one if isinstance(one, Source) else Source(one) for one in each]


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of `now` with another value in `then`.

    Of weights only the ratios count, of a student only the fingerprint.
    """
    return [name for name in now if not _same(name, then.get(name), now[name])]


def _same(name: str, then: Any, now: Any) -> bool:
    if name == STUDENT and isinstance(then, dict):
        return then.get("fingerprint") in (now["fingerprint"], now.get(EARLIER))
    if name != "weights" or not isinstance(then, list) or len(then) != len(now):
        return bool(then == now)
    return np.allclose(np.divide(then, sum(then)), np.divide(now, sum(now)), rtol=1e-12, atol=0)
