"""The keys of the experiments' configuration, checked before anything runs.

The settings of a run are checked where they are read, by `study.read_run`.
"""

from __future__ import annotations

from omegaconf import DictConfig
from study import ALSO, NON_NEGATIVE, POSITIVE, settings

from nemo_kd.settings.blocks import FREE, Block, check
from nemo_kd.settings.values import (
    COUNT,
    FLAG,
    MAPPING,
    NATURAL,
    PATH,
    PRECISION,
    TEXT,
    list_of,
    one_of,
    one_or_more,
    optional,
)

SETTINGS = Block(
    {
        "out": PATH,
        "results": PATH,
        "threads": COUNT,
        "only": optional(one_or_more(TEXT)),
        "max_hours": optional(NON_NEGATIVE),
        "list": FLAG,
        "data": Block(
            {
                "packages": optional(list_of(TEXT)),
                "several_wordings": FLAG,
                "seed": NATURAL,
                **dict.fromkeys(("train", "valid", "test", "groups", "max_tokens"), COUNT),
            }
        ),
        "train": Block(
            {
                **dict.fromkeys(("steps", "batch", "micro_batch", "validate_every"), COUNT),
                "warmup": NATURAL,
                "precision": PRECISION,
            }
        ),
        "teacher": Block({"steps": COUNT, "lr": POSITIVE, "top_k": COUNT}),
        "rounds": Block({"prompts": COUNT, "steps": COUNT, "lr": POSITIVE}),
        "generation": Block({"samples": COUNT, "tokens": COUNT}),
        "answers": Block(
            {
                **dict.fromkeys(("per_prompt", "micro_batch"), COUNT),
                "temperature": POSITIVE,
                "filter": TEXT,
            }
        ),
        "learning_rates": list_of(POSITIVE),
        "tuned_on": MAPPING,
        "student_from": one_of("stock", "tuned"),
        "domains": MAPPING,
        "bootstrap": FREE,
        "expected_seconds": Block(
            dict.fromkeys(("train", "measure", "rounds", *ALSO), NON_NEGATIVE),
        ),
        "run": MAPPING,
        "choices": Block({"steps": COUNT, "rounds": COUNT, "runs": MAPPING}),
        "experiments": MAPPING,
    }
)
EXPERIMENT = Block(
    {
        "title": TEXT,
        "question": TEXT,
        "seeds": list_of(NATURAL),
        "baseline": optional(TEXT),
        "also": list_of(one_of(*ALSO)),
        "shared": MAPPING,
        "runs": MAPPING,
    }
)


def check_config(cfg: DictConfig) -> None:
    """Check the keys and values of the configuration.

    Errors: NemoKDError that names the key, what is expected and, for a typing error, what is meant.
    """
    check(cfg, SETTINGS)
    for domain in cfg.domains:
        check(settings(cfg, domain), SETTINGS, f"domains.{domain}")
    for name, block in cfg.experiments.items():
        check(block, EXPERIMENT, f"experiments.{name}")
