"""Let a teacher write the answers, and store its top-K logits in the same pass: `--help`."""

import hydra
from omegaconf import DictConfig

from nemo_kd.cli.scripts import one_line_errors, script


@hydra.main(version_base=None, config_path="../conf", config_name="generate_with_teacher")
@one_line_errors
def main(cfg: DictConfig) -> None:
    from nemo_kd.cli.teacher import run_generation

    run_generation(cfg)


if __name__ == "__main__":
    script(main, resume="the same command resumes after the last complete shard")
