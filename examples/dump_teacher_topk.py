"""Store the top-K logits of a teacher's pass over SFT data: see `--help`."""

from pathlib import Path

from nemo_kd.cli.jobs import JOBS

if __name__ == "__main__":
    JOBS["dump"].start(Path(__file__).resolve().parents[1] / "conf")
