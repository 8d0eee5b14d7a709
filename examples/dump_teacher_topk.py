"""Store the top-K logits of a teacher's pass over SFT data: `--help` has examples."""

import hydra
from omegaconf import DictConfig

from nemo_kd.cli.scripts import one_line_errors, script


@hydra.main(version_base=None, config_path="../conf", config_name="dump_teacher_topk")
@one_line_errors
def main(cfg: DictConfig) -> None:
    from nemo_kd.cli.teacher import run

    run(cfg)


if __name__ == "__main__":
    script(main, resume="the same command resumes after the last complete shard")
