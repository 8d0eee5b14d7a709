"""Random access to the rows of a Parquet file.

Parquet is read in order: a row in the middle costs the decoding of all before it in its row group,
often a million rows. Before its first row is read, a file is therefore decoded once, in small
batches, to a nameless temporary file (in `TMPDIR`), which is mapped into memory, not loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_kd.errors import FULL
from nemo_kd.files import FullDiskError
from nemo_kd.sft.arrow import Batches, arrow, plain_schema
from nemo_kd.sft.hashed import DamagedFileError, HashedFile, RowError

BATCH_ROWS = 1000
BATCH_BYTES = 1 << 22
READ_BYTES = 1 << 20


class ParquetFile(HashedFile):
    """A Parquet file as a sequence of rows: `file[i]` is row i as a dict.

    `sha256` is the hash of the file. Raises RowError for a file without rows and for columns that
    JSON does not have; DamagedFileError.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        with self._file() as file:
            self._rows = int(file.metadata.num_rows)
            self._schema = plain_schema(file.schema_arrow, self.path)
        if not self._rows:
            raise RowError(f"{self.path} has no rows: the table is empty")

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row's value; raise RowError, naming file, row and reason.

        The first one decodes the file: DamagedFileError, and FullDiskError for the temporary file.
        """
        self.check_number(row)
        batches = self._batches
        try:
            return batches[row]
        except ValueError as error:
            raise RowError(f"{self.where(row)}: {error}; fix or remove the row") from error

    @cached_property
    def _batches(self) -> Batches:
        try:
            batches = self._decoded()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise FullDiskError(
                f"no space to decode {self.path} to a temporary file in {tempfile.gettempdir()} "
                "(needed to read its rows in any order); set TMPDIR to a larger directory"
            ) from error
        self.check_unchanged()
        return Batches(batches, self._schema)

    def _decoded(self) -> list[Any]:
        """Decode the file; return its record batches, mapped into memory."""
        pa = arrow()
        with self._file() as file, tempfile.TemporaryFile() as temporary:
            with pa.ipc.new_file(temporary, self._schema) as writer:
                for batch in file.iter_batches(_batch_rows(file.metadata), use_threads=False):
                    writer.write_batch(batch.cast(self._schema))
            temporary.flush()
            with pa.memory_map(f"/proc/self/fd/{temporary.fileno()}") as mapped:
                reader = pa.ipc.open_file(mapped)
                return [reader.get_batch(i) for i in range(reader.num_record_batches)]

    @contextmanager
    def _file(self) -> Iterator[Any]:
        """Open the file with Arrow; report what Arrow cannot read."""
        pa = arrow()
        try:
            with pa.parquet.ParquetFile(
                f"/proc/self/fd/{self.descriptor}", buffer_size=READ_BYTES, pre_buffer=False
            ) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise DamagedFileError(
                f"{self.path} is not a readable Parquet file: {error}"
            ) from error
        finally:
            self.close()


def _batch_rows(metadata: Any) -> int:
    """Return the number of rows of about BATCH_BYTES."""
    groups = range(metadata.num_row_groups)
    size = sum(metadata.row_group(i).total_byte_size for i in groups)
    return min(max(BATCH_BYTES * metadata.num_rows // max(size, 1), 1), BATCH_ROWS)
