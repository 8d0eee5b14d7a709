"""Estimate what a store of any size asks of a cluster: files, restarts, opening, remote reading.

files    = segments * (2 * fields + 1) + manifest.json, spec.json, index.bin
dump     = seconds * MTBF / (MTBF - lost per failure)
opening  = nodes * (manifest + index)
epoch    = nodes * store if each node has its own cache; once the store if they share one
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.layout import file_names
from nemo_kd.store.manifest import FileInfo, ShardInfo
from nemo_kd.store.segments import INDEX_BYTES, target_bytes
from nemo_kd.store.spec import StoreSpec
from nemo_kd.teacher.plan import Plan, Workload

TOP_FILES = 3  # manifest.json, spec.json, index.bin


@dataclass(frozen=True)
class Cluster:
    """The machines that dump and train, and how often they fail."""

    hours_between_failures: float = math.inf
    """Mean hours between failures of a node of the job, each of which stops all of it."""
    restart_minutes: float = 10.0
    """From a failure until the teacher runs again: scheduler, start, loading."""
    training_ranks: int = 8
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        if min(asdict(self).values()) <= 0:
            raise StoreError(f"a cluster needs numbers above 0, not {asdict(self)}")


@dataclass(frozen=True)
class Scale:
    """Estimated files, restarts and traffic of a store."""

    segments: int
    segment_bytes: float
    """Mean size of a segment's files."""
    files: int
    """Files of the finished store."""
    files_while_dumping: int
    """Files of the shards before they are joined to segments."""
    manifest_bytes: float
    index_bytes: float
    failures: float
    """Expected number of failures during the dump."""
    lost_seconds_per_failure: float
    """The restart, and the half of a shard that each teacher was working on."""
    dump_seconds: float
    """With failures and restarts."""
    opening_bytes_per_node: float
    """Manifest and index, all that is read to open the store; the ranks of a node share them."""
    opening_bytes: float
    """The same for all nodes that train."""
    epoch_bytes_own_caches: float
    """Traffic of the first epoch of a remote store: each node fetches every segment."""
    epoch_bytes_shared_cache: float
    """The same if the nodes' cache is one shared directory."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def scale(spec: StoreSpec, work: Workload, planned: Plan, cluster: Cluster) -> Scale:
    """Estimate the scale of the store that `planned` sizes."""
    per_part = len(file_names(codec_of(spec))) + 1  # and shard.json
    segments = math.ceil(planned.bin_bytes / target_bytes(planned.bin_bytes))
    shards = math.ceil(work.samples / spec.rows_per_shard)
    manifest = segments * _entry_bytes(spec, planned, work, segments)
    index = work.samples * INDEX_BYTES
    lost = 60 * cluster.restart_minutes + _shard_seconds(spec, work) / 2
    between = 3600 * cluster.hours_between_failures
    if lost >= between:
        raise StoreError(
            f"a failure every {between:,.0f} s costs {lost:,.0f} s each: the dump would never end; "
            "dump on fewer nodes, or with fewer rows_per_shard"
        )
    seconds = planned.dump_seconds / (1 - lost / between)
    nodes = math.ceil(cluster.training_ranks / cluster.gpus_per_node)
    return Scale(
        segments=segments,
        segment_bytes=planned.disk_bytes / segments,
        files=segments * per_part + TOP_FILES,
        files_while_dumping=shards * per_part + 1,
        manifest_bytes=manifest,
        index_bytes=index,
        failures=seconds / between,
        lost_seconds_per_failure=lost,
        dump_seconds=seconds,
        opening_bytes_per_node=manifest + index,
        opening_bytes=nodes * (manifest + index),
        epoch_bytes_own_caches=nodes * planned.disk_bytes,
        epoch_bytes_shared_cache=planned.disk_bytes,
    )


def _entry_bytes(spec: StoreSpec, planned: Plan, work: Workload, segments: int) -> int:
    """Return the size of a segment's entry in the manifest."""
    size = int(planned.disk_bytes / segments)
    info = ShardInfo(
        name="segment-00000",
        samples=int(work.samples / segments),
        tokens=int(work.total_tokens / segments),
        answer_tokens=int(work.answer_tokens / segments),
        samples_without_answer=0,
        first_row=int(work.samples),
        last_row=int(work.samples),
        files={name: FileInfo(size, "0" * 64) for name in file_names(codec_of(spec))},
    )
    return len(canonical_json([[info.to_json()]]))


def _shard_seconds(spec: StoreSpec, work: Workload) -> float:
    """Return the time in which one teacher writes a shard."""
    tokens = spec.rows_per_shard * work.total_tokens / work.samples
    gpus = work.tensor_parallel * work.pipeline_parallel
    flops = gpus * work.gpu_tflops * 1e12 * work.utilisation
    return 2 * work.teacher_parameters * tokens / flops
