"""Distil on the student's own answers, offline, in rounds.

    python examples/rounds/run.py --teacher teacher.nemo --student student.nemo \\
        --prompts train.jsonl --output outputs/rounds --rounds 2 --steps 100
    python examples/rounds/run.py --teacher teacher.nemo --student student.nemo \\
        --prompts train.jsonl --output outputs/rounds --processes 8 \\
        --generate generation.max_new_tokens=512 --train model.kd.divergence=reverse_kl

In each round the student answers the prompts, the teacher scores these answers in a dump, and the
student trains on that store; the next round starts from the trained student. Only one model is in
memory at a time. The labels are the student's own tokens, so nothing is learned from them: alpha
is 1. Start from a student after SFT, whose answers the teacher can judge. The teacher reads the
answers' text: its tokens may be others than those that the student drew.

Run the same command to resume: finished commands are skipped, an interrupted one resumes. The
arguments that made a product are beside it (`store.command.json`), with the SHA-256 of the prompts
and the fingerprints of teacher and student: others are refused.
`--generate`, `--dump` and `--train` pass KEY=VALUE to the three scripts and can be repeated.
After Lightning OPD (arXiv 2604.13010).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemo_kd.errors import NemoKDError
from nemo_kd.sft import open_files
from nemo_kd.store.fingerprint import checkpoint_fingerprint

ROOT = Path(__file__).resolve().parents[2]


class Command(NamedTuple):
    """One of a round's three scripts, and the file that it writes last."""

    script: str
    arguments: list[str]
    product: Path
    record: Path
    """File with the command that made the product, and what it read, written after it."""
    model: Path
    """The model that the script reads."""
    prompts: Path | None = None
    """The user's file that it reads, if any."""

    def inputs(self) -> dict[str, str]:
        """Return what identifies the content of each input, by its path; exit without one."""
        found = {}
        try:
            if self.prompts is not None:
                found[str(self.prompts)] = open_files(str(self.prompts)).sha256
            found[str(self.model)] = checkpoint_fingerprint(self.model)
        except (NemoKDError, OSError) as error:
            sys.exit(f"error: {error}")
        return found

    def check(self) -> None:
        """Exit if another command made the product, or the same one from other inputs."""
        if not self.record.exists():
            return  # a directory made before the commands were recorded
        record = json.loads(self.record.read_text(encoding="utf-8"))
        if isinstance(record, list):  # made before the inputs were recorded
            record = {"arguments": record, "inputs": {}}
        self._check_arguments(record["arguments"])
        now = self.inputs()
        for path, identity in record["inputs"].items():
            if now.get(path) != identity:
                sys.exit(
                    f"error: {self.product} was made from another {path}, which has changed or "
                    "is gone; give another --output, or what the first run read"
                )

    def _check_arguments(self, before: list[str]) -> None:
        now = self.arguments
        if before != now:
            made = " ".join(each for each in before if each not in now) or "other arguments"
            given = " ".join(each for each in now if each not in before) or "none of these"
            sys.exit(
                f"error: {self.product} was made with {made}, but this command has {given}; give "
                "another --output, or the arguments of the first run"
            )

    def finish(self, status: int, inputs: dict[str, str]) -> None:
        """Record the command and its inputs; exit if its script failed or was stopped."""
        if status:
            sys.exit(f"error: {self.script} ended with {status}; run the same command again")
        if not self.product.exists():
            sys.exit(
                f"error: {self.script} was stopped; run the same command again ({self.product} is "
                "missing)"
            )
        record = {"arguments": self.arguments, "inputs": inputs}
        self.record.write_text(json.dumps(record, indent=1), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help=".nemo, or Hugging Face")
    parser.add_argument("--student", type=Path, required=True, help=".nemo")
    parser.add_argument("--prompts", type=Path, required=True, help="SFT file; answers are ignored")
    parser.add_argument("--output", type=Path, required=True, help="directory of the rounds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="training steps of a round")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the student's answers")
    parser.add_argument("--processes", type=int, default=1, help="started by torchrun")
    parser.add_argument("--generate", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dump", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--train", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    return parser


def kind(model: Path) -> str:
    return "nemo" if model.suffix == ".nemo" else "hf"


def commands(args: argparse.Namespace) -> Iterator[Command]:
    """Yield the commands of all rounds, in order."""
    student = args.student
    for number in range(1, args.rounds + 1):
        directory = args.output / f"round-{number}"
        answers, store, run = (directory / name for name in ("answers", "store", "run"))
        trained = run / "checkpoints" / "student.nemo"
        yield Command(
            "examples/generate_with_teacher.py",
            [
                "teacher.kind=nemo",
                f"model.restore_from_path={student}",
                f"data.file_path={args.prompts}",
                f"output_dir={answers}",
                f"generation.temperature={args.temperature}",
                f"generation.seed={number}",
                "dump.top_k=1",  # only the text is needed
                *args.generate,
            ],
            answers / "answers.jsonl",
            directory / "answers.command.json",
            student,
            args.prompts,
        )
        yield Command(
            "examples/dump_teacher_topk.py",
            [
                f"teacher.kind={kind(args.teacher)}",
                f"model.restore_from_path={args.teacher}",
                f"data.file_path={answers / 'answers.jsonl'}",
                f"output_dir={store}",
                *args.dump,
            ],
            store / "manifest.json",
            directory / "store.command.json",
            args.teacher,
        )
        yield Command(
            "examples/train_gpt_sft_kd.py",
            [
                "name=student",
                f"model.restore_from_path={student}",
                f"exp_manager.explicit_log_dir={run}",
                f"model.data.train_ds.store={store}",
                f"trainer.max_steps={args.steps}",
                "model.kd.alpha=1",
                *args.train,
            ],
            trained,
            directory / "run.command.json",
            student,
        )
        student = trained


def launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={processes}"]


def main() -> None:
    args = parser().parse_args()
    last = args.student
    for command in commands(args):
        shown = shlex.join(["python", command.script, *command.arguments])
        last = command.product
        if args.dry_run:
            print(shown)
        elif command.product.exists():
            command.check()
            print(f"finished: {command.product}", flush=True)
        else:
            print(shown, flush=True)
            full = [*launcher(args.processes), str(ROOT / command.script), *command.arguments]
            inputs = command.inputs()
            command.finish(subprocess.run(full, check=False).returncode, inputs)
    print(f"the trained student: {last}")


if __name__ == "__main__":
    main()
