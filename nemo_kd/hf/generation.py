"""Whether transformers will save a model's `generation_config`: it refuses some that it loads."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from nemo_kd.teacher.processes import say_once


def generation_fault(model: Any) -> str | None:
    """Return why `save_pretrained` would refuse the model's `generation_config`; None if not.

    Older chat models have sampling settings without `do_sample`, which fails when all is trained.
    """
    config = getattr(model, "generation_config", None)
    if config is None or hasattr(model, "peft_config"):  # adapters are saved without it
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # Later versions only log what is wrong, unless they are asked to refuse it.
            strict = "strict" in inspect.signature(config.validate).parameters
            config.validate(**({"strict": True} if strict else {}))
        except ValueError as error:
            return str(error)
    return str(caught[0].message) if caught else None


def make_savable(model: Any) -> None:
    """Set `do_sample` where only sampling has the settings beside it, and print a line."""
    config = model.generation_config
    if generation_fault(model) is None or config.do_sample:
        return
    config.do_sample = True
    if generation_fault(model) is None:
        say_once(
            [
                "the student's generation_config.json has settings of sampling without do_sample; "
                "do_sample=true is saved with them"
            ]
        )
    else:
        config.do_sample = False
