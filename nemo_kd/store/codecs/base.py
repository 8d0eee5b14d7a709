"""What a profile must do: the teacher's part of a sample to arrays on disk, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store.spec import StoreSpec


class Teacher(NamedTuple):
    """The teacher at A answer tokens."""

    ids: NDArray[np.int64]  # [A, K]
    logits: NDArray[np.float32]  # [A, K]
    logsumexp: NDArray[np.float32]  # [A, T]


Arrays = dict[str, NDArray[Any]]


class Codec(ABC):
    """`decode(encode(teacher), A)` is the teacher, to the profile's stated error."""

    name: ClassVar[str]

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self.temperatures = len(spec.temperatures)
        self.unit_temperature = spec.temperatures.index(1.0)

    @property
    @abstractmethod
    def dtypes(self) -> dict[str, type[np.generic]]:
        """Field → dtype of its `.bin` file, in the order of the checksum; at most four."""

    @abstractmethod
    def encode(self, teacher: Teacher) -> Arrays:
        """One flat array for each field."""

    @abstractmethod
    def decode(self, arrays: Arrays, answers: int) -> Teacher:
        """Raises ValueError when the arrays cannot be those of A = `answers` tokens."""
