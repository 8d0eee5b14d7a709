"""Merge LoRA adapters into their model: `--help` has examples."""

from pathlib import Path

from nemo_kd.cli.jobs import JOBS

if __name__ == "__main__":
    JOBS["merge-lora"].start(Path(__file__).resolve().parents[1] / "conf")
