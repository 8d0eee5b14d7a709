"""Merge LoRA adapters into their model: see `--help`."""

from pathlib import Path

from nemo_kd.cli.jobs import JOBS

if __name__ == "__main__":
    JOBS["merge-lora"].start(Path(__file__).resolve().parents[1] / "conf")
