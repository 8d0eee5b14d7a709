"""Process groups have the sizes of their keys, in real processes: see `groups.py`."""

from __future__ import annotations

import json

import pytest

from tests.processes import run_program

EXPERTS = ["trainer.precision=bf16", "model.megatron_amp_O2=true"]
EXPERTS += ["+model.expert_model_parallel_size=2"]
INSTANCES = ["+model.optim.num_distributed_optimizer_instances=2"]
INSTANCES += ["model.optim.name=mcore_distributed_optim"]
IN_ORDER = ["trainer.precision=32", "model.pipeline_model_parallel_size=2"]
CASES = {
    2: [EXPERTS, ["trainer.precision=32", *INSTANCES]],
    4: [
        EXPERTS,
        [*EXPERTS, "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
        [*EXPERTS, *INSTANCES],
        IN_ORDER,
        [*IN_ORDER, "+model.use_tp_pp_dp_mapping=true"],
    ],
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_group_has_the_size_of_its_key_and_nemos_model_agrees(ranks: int) -> None:
    cases = [[*case, f"trainer.devices={ranks}"] for case in CASES[ranks]]
    run_program("tests/layouts/groups.py", json.dumps(cases), processes=ranks, fork=True)
