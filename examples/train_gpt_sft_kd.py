"""Fine-tune a student on labels and stored teacher logits: `--help` has examples."""

import hydra
from omegaconf import DictConfig

from nemo_kd.cli.scripts import one_line_errors, script


@hydra.main(version_base=None, config_path="../conf", config_name="train_gpt_sft_kd")
@one_line_errors
def main(cfg: DictConfig) -> None:
    from nemo_kd.nemo.train import run

    run(cfg)


if __name__ == "__main__":
    script(main, resume="the same command resumes from the run's last checkpoint")
