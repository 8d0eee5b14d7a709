"""Settings of process groups that cannot work are refused by name, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_kd.cli.teacher import read
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo import start
from nemo_kd.nemo.settings import training
from nemo_kd.teacher.layout import LayoutError
from tests.configuration import configuration

MUST = ["model.restore_from_path=x.nemo", "trainer.precision=32", "trainer.devices=4"]
EXPERTS = "+model.expert_model_parallel_size=2"
INSTANCES = "+model.optim.num_distributed_optimizer_instances=3"
O2 = "model.megatron_amp_O2=true"
MCORE = "model.optim.name=mcore_distributed_optim"


def refuse(*overrides: str) -> None:
    cfg = configuration("train_gpt_sft_kd", *MUST, "model.data.train_ds.store=x", *overrides)
    training.fill_in(cfg)
    training.check_keys(cfg)
    start.refuse(cfg)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([EXPERTS], "requires model.megatron_amp_O2=true"),
        ([EXPERTS, O2, "model.tensor_model_parallel_size=4"], "4 processes cannot hold tensor"),
        ([EXPERTS, O2, "model.optim.name=distributed_fused_adam"], f"; set {MCORE}"),
        (
            [
                *(EXPERTS, O2, "+model.use_tp_pp_dp_mapping=true"),
                "model.pipeline_model_parallel_size=2",
            ],
            "set model.use_tp_pp_dp_mapping=false",
        ),
        ([INSTANCES], "has no effect with model.optim.name="),
        ([INSTANCES, MCORE], "=3 does not divide the 4 ranks that hold the same weights"),
        (["+model.pipeline_model_parallel_comm_backend=nccl"], "does not work on a CPU"),
    ],
)
def test_groups_that_cannot_be_made_are_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(LayoutError) as refused:
        refuse(*overrides)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [EXPERTS, O2, "model.optim.name=fused_adam"],
        [INSTANCES.replace("3", "2"), MCORE],
        ["+model.use_tp_pp_dp_mapping=true", "model.pipeline_model_parallel_size=2"],
        ["+model.expert_model_parallel_size=1", "trainer.devices=-1"],
    ],
)
def test_others_are_accepted(overrides: list[str]) -> None:
    refuse(*overrides)


def test_a_split_rank_is_refused_for_a_gpt() -> None:
    with pytest.raises(NemoKDError, match="a GPT has no encoder"):
        refuse("+model.pipeline_model_parallel_split_rank=1")


def test_expert_parallelism_of_a_dump_is_refused_with_its_reason() -> None:
    def settings(size: int) -> Any:
        dump = ["data.file_path=x.jsonl", "output_dir=store"]
        experts = f"+model.expert_model_parallel_size={size}"
        return configuration("dump_teacher_topk", *MUST, *dump, experts)

    read(settings(1))
    with pytest.raises(NemoKDError, match="every rank of a dump holds all experts"):
        read(settings(2))
