"""Merge LoRA adapters into their model: `--help` has examples."""

import hydra
from omegaconf import DictConfig

from nemo_kd.cli.scripts import one_line_errors, script


@hydra.main(version_base=None, config_path="../conf", config_name="merge_lora")
@one_line_errors
def main(cfg: DictConfig) -> None:
    from nemo_kd.nemo.train import merge

    merge(cfg)


if __name__ == "__main__":
    script(main, resume="nothing was written; the same command starts over")
