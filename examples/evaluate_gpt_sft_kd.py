"""Measure a model on held-out stores: see `--help`."""

from pathlib import Path

from nemo_kd.cli.jobs import JOBS

if __name__ == "__main__":
    JOBS["evaluate"].start(Path(__file__).resolve().parents[1] / "conf")
