"""The shipped configurations, composed as the scripts compose them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from nemo_kd.cli.overrides import accept_every_spelling
from tests.processes import ROOT


def configuration(name: str, *overrides: str) -> DictConfig:
    """`conf/NAME.yaml` with the overrides of a command line."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(name, accept_every_spelling(list(overrides)))
