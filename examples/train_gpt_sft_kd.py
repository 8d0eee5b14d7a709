"""Fine-tune a student on labels and stored teacher logits: see `--help`."""

from pathlib import Path

from nemo_kd.cli.jobs import JOBS

if __name__ == "__main__":
    JOBS["train"].start(Path(__file__).resolve().parents[1] / "conf")
