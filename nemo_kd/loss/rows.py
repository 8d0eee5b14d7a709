"""Chosen rows of the logits, read and written in chunks, in any memory layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 1 << 20
"""Number of elements in a chunk per CPU thread, 4 MiB in float32.

Measured from 2^17 to 2^21: fewer wait for memory, more take Python's time for each chunk."""
DEFAULT_CHUNK_ELEMENTS = 1 << 26


def row_chunks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` columns, each small enough for the cache."""
    on_cpu = CPU_CHUNK_ELEMENTS * torch.get_num_threads()
    budget = on_cpu if device.type == "cpu" else DEFAULT_CHUNK_ELEMENTS
    step = max(1, budget // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True)
class Rows:
    """Row n is `matrix[index[n]]`, or `matrix[n]` where `index` is None.

    `matrix` [R, Vp] shares the logits' memory wherever their leading dimensions, in the order of
    their strides, can be merged; otherwise (a strided vocabulary, gaps, an expanded tensor) it is
    a copy.
    """

    matrix: Tensor
    index: Tensor | None
    lead: tuple[int, ...]
    """The logits' leading dimensions, in memory order."""
    inverse: tuple[int, ...]
    """The permutation from memory order to the logits' order."""

    @classmethod
    def of(cls, logits: Tensor, positions: Tensor | None = None) -> Rows:
        """The rows of logits [*, Vp] at `positions` [N] (ascending, row-major; None: all)."""
        matrix, order = _as_matrix(logits.detach())
        lead = tuple(logits.shape[d] for d in order)
        inverse = tuple(order.index(d) for d in range(len(order)))
        rows = cls(matrix, None, lead, inverse)
        index = None if rows.in_order else rows._memory_rows()
        if positions is not None:
            index = positions if index is None else index[positions]
        return replace(rows, index=index)

    @property
    def in_order(self) -> bool:
        """Whether the memory's rows are in the logits' row-major order."""
        long = [d for d in self.inverse if self.lead[d] > 1]  # a dimension of 1 has no order
        return long == sorted(long)

    def over(self, matrix: Tensor) -> Rows:
        """The same rows of another matrix of the same shape."""
        return replace(self, matrix=matrix)

    def as_logits(self) -> Tensor:
        """The matrix in the logits' shape [*, Vp]; no copy."""
        shaped = self.matrix.view(*self.lead, self.matrix.shape[-1])
        return shaped.permute(*self.inverse, len(self.lead))

    def __len__(self) -> int:
        return len(self.matrix) if self.index is None else len(self.index)

    def view(self, part: slice) -> Tensor | None:
        """A view of the rows of `part` [n, Vp], or None if they are scattered."""
        if self.index is None:
            return self.matrix[part]
        if self.in_order and self.index.device.type == "cpu":
            first, last = int(self.index[part.start]), int(self.index[part.stop - 1])
            if last - first == part.stop - part.start - 1:
                return self.matrix[first : last + 1]
        return None

    def read(self, part: slice) -> Tensor:
        """The rows of `part` [n, Vp]: a view where possible, else a copy."""
        view = self.view(part)
        if view is not None:
            return view
        assert self.index is not None  # a view of all rows always exists
        return self.matrix[self.index[part]]

    def write(self, part: slice, values: Tensor) -> None:
        """matrix[rows of part] ← values [n, Vp], rounded to the matrix's dtype."""
        view = self.view(part)
        if view is not None:
            view.copy_(values)
        else:
            assert self.index is not None
            self.matrix.index_copy_(0, self.index[part], values.to(self.matrix.dtype))

    def clear_others(self) -> None:
        """Zero the rows that were not chosen."""
        others = len(self.matrix) - len(self)
        if self.index is not None and others:
            chosen = torch.zeros(len(self.matrix), dtype=torch.bool, device=self.matrix.device)
            chosen.index_fill_(0, self.index, True)
            # The first of them in order: `nonzero` would make the host wait for their number.
            self.matrix.index_fill_(0, chosen.sort(stable=True).indices[:others], 0)

    def _memory_rows(self) -> Tensor:
        """[R]: the memory's row of each row-major position."""
        rows = torch.arange(len(self.matrix), device=self.matrix.device)
        return rows.view(self.lead).permute(self.inverse).reshape(-1)


def _as_matrix(logits: Tensor) -> tuple[Tensor, list[int]]:
    """(the logits as [R, Vp], their leading dimensions in memory order)."""
    lead, strides = logits.shape[:-1], logits.stride()
    order = sorted(range(len(lead)), key=lambda d: -strides[d])
    expanded = any(stride == 0 and size > 1 for stride, size in zip(strides, lead, strict=False))
    if not expanded and strides[-1] == 1:
        try:
            return logits.permute(*order, -1).view(-1, logits.shape[-1]), order
        except RuntimeError:
            pass  # gaps between the leading dimensions
    copy = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device).copy_(logits)
    return copy.view(-1, logits.shape[-1]), list(range(len(lead)))
