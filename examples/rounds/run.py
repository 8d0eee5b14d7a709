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
arguments that made a product are beside it (`store.command.json`), with what identifies the data
and the models that it was made from: others are refused, also the answers or the store of a round
that were made again. Only one process at a time writes to --output.
`--generate`, `--dump` and `--train` pass KEY=VALUE to the three scripts and can be repeated. Paths,
names and adapters of the student are refused. The dump reads rows as the generation does: it gets
the prompt template and the other `data` keys of `--generate`.
After Lightning OPD (arXiv 2604.13010).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from nemo_kd.cli.option_types import count
from nemo_kd.errors import NemoKDError
from nemo_kd.lock import DirectoryLock
from nemo_kd.sft import open_files
from nemo_kd.sft.config import RowConfig
from nemo_kd.store import Store
from nemo_kd.store.fingerprint import (
    checkpoint_fingerprint,
    earlier_fingerprint,
    of_earlier_version,
)

ROOT = Path(__file__).resolve().parents[2]

PATHS = "the paths in a round follow from --output"
NAMED = "the next round starts from the student.nemo that this one writes"
ADAPTERS = (
    "adapters alone are no student of the next round; without it all weights are trained. For "
    "adapters run the commands of --dry-run by hand, and examples/merge_lora.py after each training"
)
KIND = "the student is a .nemo, which NeMo loads"
SEED = "it is the round's number, so that each round draws other answers"
CALLBACK = "exp_manager.checkpoint_callback_params"
OWN: dict[str, dict[str, str]] = {
    "generate": {
        "model.restore_from_path": "the model is --student",
        "data.file_path": "the file is --prompts",
        "output_dir": PATHS,
        "teacher.kind": KIND,
        "generation.temperature": "give --temperature",
        "generation.seed": SEED,
    },
    "dump": {
        "model.restore_from_path": "the model is --teacher",
        "data.file_path": "the teacher scores the answers of the round",
        "output_dir": PATHS,
    },
    "train": {
        "model.restore_from_path": "the model is --student, then the trained one",
        "model.data.train_ds.store": "the student trains on the store of the round",
        "model.peft.peft_scheme": ADAPTERS,
        "trainer.max_steps": "give --steps",
        "name": NAMED,
        "exp_manager.name": NAMED,
        "exp_manager.explicit_log_dir": PATHS,
        "exp_manager.create_checkpoint_callback": NAMED,
        **{f"{CALLBACK}.{key}": NAMED for key in ("save_nemo_on_train_end", "prefix", "postfix")},
        f"{CALLBACK}.dirpath": PATHS,
    },
}
"""Option → keys that it cannot pass, because the rounds depend on them → why."""
ROWS = {field.name for field in fields(RowConfig)}
"""Keys of `data` that decide the tokens of a row; the dump follows those of the generation."""
ANSWERS_ONLY = {"max_seq_length", "add_eos"}
"""Those of them that may differ, because they do not change what a prompt is."""


def key_of(given: str) -> str:
    return given.partition("=")[0].lstrip("+~ ").partition("@")[0].rstrip()


def value_of(given: str) -> str:
    return given.partition("=")[2]


def refuse_own(args: argparse.Namespace) -> None:
    """Exit for a KEY=VALUE that sets what the rounds depend on, by itself or in its block."""
    for option, own in OWN.items():
        for given in getattr(args, option):
            key = key_of(given)
            for known, why in own.items():
                if why == ADAPTERS and key == known and value_of(given) in ("none", "null"):
                    continue
                if key == known or key.startswith(f"{known}."):
                    sys.exit(f"error: --{option} {given}: leave {key} out; {why}")
                if known.startswith(f"{key}."):
                    remedy = f"give keys of {key} one by one, and leave {known} out"
                    sys.exit(f"error: --{option} {given}: {remedy}; {why}")


def row_settings(given: list[str]) -> dict[str, str]:
    """Return key → KEY=VALUE of those that set how rows are read."""
    found = {key_of(each): each for each in given}
    return {key: found[key] for key in found if key.startswith("data.") and name_of(key) in ROWS}


def name_of(key: str) -> str:
    return key.split(".")[1]


def followed(args: argparse.Namespace) -> list[str]:
    """Return the settings of rows in `--generate` that the dump has to follow.

    Exit for others in `--dump`: the teacher would score answers to prompts that nobody gave.
    """
    asked, scored = row_settings(args.generate), row_settings(args.dump)
    for key, given in scored.items():
        same = key in asked and value_of(asked[key]) == value_of(given)
        if not same and name_of(key) not in ANSWERS_ONLY:
            sys.exit(
                f"error: --dump {given}, but --generate has {asked.get(key, f'no {key}')}: the "
                "teacher would score answers to other prompts than the student's; give it to "
                "--generate only, which the dump follows"
            )
    return [given for key, given in asked.items() if key not in scored]


def refuse_other_rows(answers: Path, store: Path) -> None:
    """Exit if the store's rows were read by other settings than the prompts of the answers."""
    asked, scored = (Store(path).spec.template for path in (answers, store))
    for name in sorted(ROWS - ANSWERS_ONLY):
        if asked.get(name) != scored.get(name):
            sys.exit(
                f"error: {store} was dumped with data.{name}={scored.get(name)!r}, but the answers "
                f"in {answers} were generated with {asked.get(name)!r}: delete {store}, and give "
                f"data.{name} to --generate only, which the dump follows"
            )


def in_effect(arguments: list[str]) -> list[str]:
    """Return the last of the arguments of each key: the others have no effect."""
    return list({key_of(each): each for each in arguments}.values())


class Command(NamedTuple):
    """One of a round's three scripts, and the file that it writes last."""

    script: str
    arguments: list[str]
    product: Path
    record: Path
    """File with the command that made the product, and what it read, written after it."""
    model: Path
    """The model that the script reads."""
    data: Path
    """The file that it reads, or the store."""
    answers: Path | None = None
    """Of a training: the generation whose answers are in the store."""

    def inputs(self) -> dict[str, str]:
        """Return what identifies the content of each input, by its path; exit without one."""
        try:
            if self.answers is None:
                data = open_files(str(self.data)).sha256
            else:
                data = Store(self.data).fingerprint
                refuse_other_rows(self.answers, self.data)
            return {str(self.data): data, str(self.model): checkpoint_fingerprint(self.model)}
        except (NemoKDError, OSError) as error:
            sys.exit(f"error: {error}")

    def check(self) -> None:
        """Exit if another command made the product, or the same one from other inputs."""
        if not self.record.exists():
            return  # a directory made before the commands were recorded
        record = json.loads(self.record.read_text(encoding="utf-8"))
        if isinstance(record, list):  # made before the inputs were recorded
            record = {"arguments": record, "inputs": {}}
        self._check_arguments(record["arguments"])
        now, before = self.inputs(), record["inputs"]
        directory = self.record.with_name(self.record.name.removesuffix(".command.json"))
        if str(self.model) in before and of_earlier_version(before[str(self.model)]):
            now[str(self.model)] = earlier_fingerprint(self.model)
        for path, identity in before.items():
            if now.get(path) != identity:
                sys.exit(
                    f"error: {self.product} was made from another {path}, which has changed or "
                    "is gone; give another --output, or what the first run read, or delete "
                    f"{directory} to make it again"
                )
        for path in now.keys() - before.keys():
            print(f"{self.record} does not have {path}, so it was not compared", flush=True)

    def _check_arguments(self, before: list[str]) -> None:
        before, now = in_effect(before), in_effect(self.arguments)
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
            sys.exit(
                f"error: {self.script} ended with {status}; see its error above, and run the same "
                "command again to resume once its cause is gone"
            )
        if not self.product.exists():
            sys.exit(
                f"error: {self.script} was stopped; run the same command again ({self.product} is "
                "missing)"
            )
        record = {"arguments": self.arguments, "inputs": inputs}
        self.record.write_text(json.dumps(record, indent=1), encoding="utf-8")


def temperature(text: str) -> float:
    """Read the temperature of the student's answers; 0 is greedy."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return number


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help=".nemo, or Hugging Face")
    parser.add_argument("--student", type=Path, required=True, help=".nemo")
    parser.add_argument("--prompts", type=Path, required=True, help="SFT file; answers are ignored")
    parser.add_argument("--output", type=Path, required=True, help="directory of the rounds")
    parser.add_argument("--rounds", type=count, default=2)
    parser.add_argument("--steps", type=count, default=100, help="training steps of a round")
    parser.add_argument(
        "--temperature", type=temperature, default=1.0, help="of the student's answers"
    )
    parser.add_argument("--processes", type=count, default=1, help="started by torchrun")
    parser.add_argument("--generate", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dump", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--train", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    return parser


def refuse_absent(args: argparse.Namespace) -> None:
    """Exit for an input that is not there: the teacher is read only after a whole generation."""
    for option in ("teacher", "student", "prompts"):
        path = getattr(args, option)
        if not path.exists():
            sys.exit(f"error: --{option} {path} does not exist: give the path of what is there")


def unless_given(default: str, given: list[str]) -> list[str]:
    """Return a default, unless its key is among the user's: the script would warn of two."""
    return [] if key_of(default) in map(key_of, given) else [default]


def kind(model: Path) -> str:
    return "nemo" if model.suffix == ".nemo" else "hf"


def commands(args: argparse.Namespace) -> Iterator[Command]:
    """Yield the commands of all rounds, in order."""
    student, rows = args.student, followed(args)
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
                *([f"generation.seed={number}"] if args.temperature else []),
                *unless_given("dump.top_k=1", args.generate),  # only the text is needed
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
                *rows,
                *args.dump,
            ],
            store / "manifest.json",
            directory / "store.command.json",
            args.teacher,
            answers / "answers.jsonl",
        )
        yield Command(
            "examples/train_gpt_sft_kd.py",
            [
                "name=student",
                f"model.restore_from_path={student}",
                f"exp_manager.explicit_log_dir={run}",
                f"model.data.train_ds.store={store}",
                f"trainer.max_steps={args.steps}",
                *unless_given("model.kd.alpha=1", args.train),
                *args.train,
            ],
            trained,
            directory / "run.command.json",
            student,
            store,
            answers,
        )
        student = trained


def launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={processes}"]


def run(command: Command, processes: int) -> None:
    """Run a command, unless its product is there already, made by the same one."""
    if command.product.exists():
        command.check()
        print(f"finished: {command.product}", flush=True)
        return
    print(shown(command, processes), flush=True)
    full = [*launcher(processes), str(ROOT / command.script), *command.arguments]
    inputs = command.inputs()
    command.finish(subprocess.run(full, check=False).returncode, inputs)


def shown(command: Command, processes: int) -> str:
    """Return the command as it can be run by hand, from the current directory."""
    script = command.script if Path.cwd() == ROOT else str(ROOT / command.script)
    return shlex.join(["python", *launcher(processes)[1:], script, *command.arguments])


def main() -> None:
    args = parser().parse_args()
    refuse_own(args)
    all_of_them = list(commands(args))
    if args.dry_run:
        print(*(shown(command, args.processes) for command in all_of_them), sep="\n")
        return
    refuse_absent(args)
    try:
        with DirectoryLock(args.output):
            for command in all_of_them:
                run(command, args.processes)
    except NemoKDError as error:
        sys.exit(f"error: {error}")
    print(f"the trained student: {all_of_them[-1].product}")


if __name__ == "__main__":
    main()
