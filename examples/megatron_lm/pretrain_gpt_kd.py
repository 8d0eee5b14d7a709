"""Megatron-LM's `pretrain_gpt.py` on stores: its own arguments, and `--kd-…` instead of its data.

    torchrun --nproc_per_node=8 examples/megatron_lm/pretrain_gpt_kd.py --kd-store store \\
        --kd-alpha 0.9 --tokenizer-type HuggingFaceTokenizer --tokenizer-model teacher/ …

Megatron-LM must be importable: `megatron.training` is in megatron-core's wheel from 0.19 on; for
earlier versions put a checkout of Megatron-LM on PYTHONPATH.
"""

from __future__ import annotations

import importlib
import inspect
import os
from functools import partial
from typing import Any

from nemo_kd.cli.failures import reported
from nemo_kd.errors import NemoKDError
from nemo_kd.mcore import cpu

DEFAULTS = {"tokenizer_type": "HuggingFaceTokenizer"}


def main() -> None:
    try:
        cpu.install_megatron_lm()
        importlib.import_module("megatron.training")
        from nemo_kd.mcore import megatron_lm
    except ImportError as error:
        raise NemoKDError(
            f"Megatron-LM cannot be imported ({error}): install megatron-core[training] 0.19 or "
            "later, or put a checkout of Megatron-LM on PYTHONPATH and compile its index builder "
            "with make -C megatron/core/datasets"
        ) from error
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}.items():
        os.environ.setdefault(name, value)  # a single process needs no torchrun
    megatron_lm.check_arguments()
    megatron_lm.without_index_builder()
    pretrain()


def pretrain() -> None:
    """Call Megatron-LM's `pretrain`, whose arguments changed in 0.18 and in 0.19."""
    from megatron.core.enums import ModelType
    from megatron.training import training

    from nemo_kd.mcore.megatron_lm import add_arguments, datasets_provider, forward_step

    kind = ModelType.encoder_or_decoder
    if "cfg_container" not in inspect.signature(training.pretrain).parameters:
        training.pretrain(
            datasets_provider,
            model_provider(),
            kind,
            forward_step,
            extra_args_provider=add_arguments,
            args_defaults=DEFAULTS,
        )
        return
    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=add_arguments, args_defaults=DEFAULTS)
    configure = argument_utils.pretrain_cfg_container_from_args
    if hasattr(argument_utils, "gpt_config_from_args"):
        config = configure(args, argument_utils.gpt_config_from_args(args))
        training.pretrain(config, datasets_provider, kind, forward_step)
    else:
        training.pretrain(configure(args), datasets_provider, model_provider(), kind, forward_step)


def model_provider() -> Any:
    """Return the model provider of a checkout of Megatron-LM, beside its `pretrain_gpt.py`."""
    try:
        provider = importlib.import_module("model_provider").model_provider
        return partial(provider, importlib.import_module("gpt_builders").gpt_builder)
    except ModuleNotFoundError:  # before 0.15
        return importlib.import_module("pretrain_gpt").model_provider


if __name__ == "__main__":
    with reported("the same command resumes from the last checkpoint in --load"):
        main()
