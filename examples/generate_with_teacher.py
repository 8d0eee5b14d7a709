"""Let a teacher generate answers, and store its top-K logits in the same pass: see `--help`."""

from pathlib import Path

from nemo_kd.cli.jobs import JOBS

if __name__ == "__main__":
    JOBS["generate"].start(Path(__file__).resolve().parents[1] / "conf")
