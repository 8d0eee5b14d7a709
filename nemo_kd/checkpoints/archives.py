"""Tensors of torch.save within a larger file, loaded without a second copy and without code."""

from __future__ import annotations

import io
import zipfile
from typing import IO, Any, BinaryIO

import torch


class FileView(io.RawIOBase):
    """The bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count


def load_tensor(file: IO[bytes], size: int) -> torch.Tensor:
    """Load the tensor that torch.save wrote to `size` bytes; raise ValueError for anything else.

    An archive with compressed members or a tensor with strides of 0 could claim any size.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > size:
        raise ValueError("not an archive of torch.save, which is a zip without compression")
    file.seek(0)
    tensor = torch.load(file, map_location="cpu", weights_only=True)
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.nbytes > size:
        raise ValueError("not a tensor of its size")
    return tensor
