"""The estimates for stores of any size, and the page that shows them."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import pytest

from nemo_kd.errors import StoreError
from nemo_kd.store.manifest import FileInfo, ShardInfo
from nemo_kd.store.segments import Packing
from nemo_kd.store.spec import StoreSpec
from nemo_kd.teacher.plan import Plan, Workload, plan
from nemo_kd.teacher.scale import Cluster, Scale, scale
from tests.conftest import ROOT

SPEC = StoreSpec(top_k=100, vocab_size=128_256)


def work(tokens: float) -> Workload:
    return Workload(
        answer_tokens=tokens,
        total_tokens=2 * tokens,
        samples=tokens / 300,
        teacher_parameters=70e9,
        gpus=1024,
        tensor_parallel=8,
    )


def plan_of(tokens: float) -> Plan:
    return plan(SPEC, work(tokens))


def estimate(cluster: Cluster, tokens: float = 1e12) -> Scale:
    return scale(SPEC, work(tokens), plan_of(tokens), cluster)


def test_the_page_has_the_tables_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("scale_tables", ROOT / "docs/scale.py")
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = (ROOT / "docs/scale.md").read_text()
    assert page == tables.with_tables(page), "run python docs/scale.py"


@pytest.mark.parametrize("tokens", [1e6, 1e8, 1e11, 1e12])
def test_a_store_has_the_segments_that_the_writer_plans(tokens: float) -> None:
    """By the rule of `Packing`, for the bytes that the plan estimates."""
    large = estimate(Cluster(), tokens)
    octets = int(plan_of(tokens).bin_bytes)
    shard = ShardInfo(
        name="shard-00000",
        samples=int(tokens / 300),
        tokens=int(2 * tokens),
        answer_tokens=int(tokens),
        samples_without_answer=0,
        first_row=0,
        last_row=int(tokens / 300) - 1,
        files={"tokens.bin": FileInfo(octets, "0" * 64)},
    )
    assert large.segments == pytest.approx(Packing.of([shard]).count, rel=1e-3, abs=1)


def test_a_gpu_without_a_shard_does_no_work() -> None:
    """A teacher dumps whole shards: 1,000 samples are 4, of 256."""
    few = dataclasses.replace(work(300 * 1000), gpus=1024, tensor_parallel=8)
    four = dataclasses.replace(few, gpus=4 * 8)
    one = dataclasses.replace(few, gpus=8)
    times = [plan(SPEC, each) for each in (few, four, one)]
    assert [each.idle_gpus for each in times] == [1024 - 32, 0, 0]
    assert times[0].dump_seconds == times[1].dump_seconds
    assert times[0].gpu_hours == pytest.approx(times[2].gpu_hours)
    assert times[2].dump_seconds == pytest.approx(4 * times[0].dump_seconds)


def test_time_is_work_and_what_failures_lose() -> None:
    calm, rough = estimate(Cluster()), estimate(Cluster(hours_between_failures=4))
    assert calm.failures == 0
    assert rough.dump_seconds == pytest.approx(
        calm.dump_seconds + rough.failures * rough.lost_seconds_per_failure
    )
    assert rough.failures == pytest.approx(rough.dump_seconds / (4 * 3600))


def test_a_dump_that_fails_before_it_has_restarted_is_refused() -> None:
    with pytest.raises(StoreError, match="would never end"):
        estimate(Cluster(hours_between_failures=0.1))
    with pytest.raises(StoreError, match="above 0"):
        Cluster(restart_minutes=0)


def test_opening_and_epoch_grow_with_the_nodes_alone() -> None:
    one, many = (estimate(Cluster(training_ranks=ranks)) for ranks in (8, 4096))
    assert many.opening_bytes == 512 * one.opening_bytes
    assert many.opening_bytes_per_node == one.opening_bytes_per_node
    assert many.epoch_bytes_own_caches == 512 * many.epoch_bytes_shared_cache
    assert math.isclose(one.epoch_bytes_own_caches, one.epoch_bytes_shared_cache)
