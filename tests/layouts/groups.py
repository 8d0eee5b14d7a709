"""The process groups of a training, and the call of NeMo's own model: `torchrun … CASES`.

CASES is a JSON list of lists of overrides. Each is started as a training starts it; then NeMo's
model runs its own start, and is stopped after it.
"""

from __future__ import annotations

import json
import sys
from unittest import mock

from omegaconf import OmegaConf

from nemo_kd.nemo import start
from nemo_kd.nemo.settings import training
from tests.configuration import configuration


class Stop(Exception):
    """NeMo's model has made its call."""


def main(cases: str) -> None:
    start.install()
    for overrides in json.loads(cases):
        check(overrides)


def check(overrides: list[str]) -> None:
    """Start the groups, and compare their sizes and ranks with the keys, before and after."""
    from megatron.core import num_microbatches_calculator, parallel_state
    from nemo.collections.nlp.models.language_modeling import megatron_base_model
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    must = ["model.restore_from_path=x.nemo", "model.data.train_ds.store=x"]
    batches = ["model.global_batch_size=8", "model.micro_batch_size=1"]
    cfg = configuration("train_gpt_sft_kd", *must, *batches, *overrides)
    training.fill_in(cfg)
    training.check_keys(cfg)
    start.prepare(cfg)
    OmegaConf.resolve(cfg)
    trainer = start.build_trainer(cfg)
    start.start_process_groups(cfg.model, trainer)
    compare(cfg.model, overrides)

    original = megatron_base_model.initialize_model_parallel_for_nemo

    def once(**settings: object) -> None:
        original(**settings)
        raise Stop

    with mock.patch.object(megatron_base_model, "initialize_model_parallel_for_nemo", once):
        try:
            MegatronGPTSFTModel(cfg.model, trainer)
        except Stop:
            compare(cfg.model, overrides)
        else:
            raise AssertionError("NeMo's model has not started its groups")
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()


def compare(model: object, overrides: list[str]) -> None:
    """Raise AssertionError unless each group has the size of its key, and each rank is reported."""
    import torch.distributed as dist
    from megatron.core import parallel_state as state

    def key(name: str, default: object = 1) -> object:
        return OmegaConf.select(model, name, default=default)  # type: ignore[arg-type]

    groups = {
        "tensor_model_parallel_size": (
            state.get_tensor_model_parallel_group(),
            state.get_tensor_model_parallel_world_size(),
            state.get_tensor_model_parallel_rank(),
        ),
        "pipeline_model_parallel_size": (
            state.get_pipeline_model_parallel_group(),
            state.get_pipeline_model_parallel_world_size(),
            state.get_pipeline_model_parallel_rank(),
        ),
        "expert_model_parallel_size": (
            state.get_expert_model_parallel_group(),
            state.get_expert_model_parallel_world_size(),
            state.get_expert_model_parallel_rank(),
        ),
    }
    for name, (group, size, rank) in groups.items():
        assert (dist.get_world_size(group), dist.get_rank(group)) == (size, rank), (overrides, name)
        assert size == key(name), (overrides, name)
    stages = dist.get_process_group_ranks(state.get_pipeline_model_parallel_group())
    if len(stages) > 1:
        assert (stages[1] - stages[0] == 1) == key("use_tp_pp_dp_mapping", False), overrides
    instances = key("optim.num_distributed_optimizer_instances")
    if instances != 1:
        ranks = state.get_data_parallel_group(with_context_parallel=True)
        part = state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
        assert dist.get_world_size(ranks) // dist.get_world_size(part) == instances, overrides


if __name__ == "__main__":
    main(sys.argv[1])
