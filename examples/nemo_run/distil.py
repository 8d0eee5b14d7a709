"""Dump and train as one NeMo-Run experiment, on this machine or on SLURM in the container.

    python examples/nemo_run/distil.py local --teacher teacher.nemo --student student.nemo \
        --data train.jsonl --store store --run run --devices 2
    python examples/nemo_run/distil.py slurm --dry-run --teacher /lustre/teacher.nemo \
        --student /lustre/student.nemo --data /lustre/train.jsonl --store /lustre/store \
        --run /lustre/runs/kd --account my_account --partition batch --mount /lustre

`--dump KEY=VALUE` and `--train KEY=VALUE`, which can be repeated, are passed to the two scripts.
Only `nemo_run` is needed to run this program, in a separate environment: see docs/cluster.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import nemo_run as run

ROOT = Path(__file__).resolve().parents[2]


# Runs in the job script, outside the container, which has no scontrol; srun passes the variables.
RENDEZVOUS = """\
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000))
export CUDA_DEVICE_MAX_CONNECTIONS=1"""


def main() -> None:
    options = arguments()
    if options.where == "slurm":
        start({"dump": dump(options), "train": train(options)}, options)
        return
    with tempfile.TemporaryDirectory() as directory:
        # NeMo-Run ignores the exit status of a local task, and would start the next one anyway.
        finished = Path(directory, "finished")
        both = [*dump(options), "&&", *train(options), "&&", "touch", shlex.quote(str(finished))]
        start({"distil": both}, options)
        if not (options.dry_run or finished.exists()):
            sys.exit("error: not finished; see the log above")


def start(tasks: dict[str, list[str]], options: argparse.Namespace) -> None:
    """Run the tasks one after another. Local tasks have ended when this returns."""
    import nemo_run as run

    with run.Experiment("nemo-kd") as experiment:
        before: list[str] = []
        for name, command in tasks.items():
            script = run.Script(inline=" ".join(command))
            before = [
                experiment.add(script, executor=executor(options), name=name, dependencies=before)
            ]
        if options.dry_run:
            experiment.dryrun()
        else:
            experiment.run(detach=options.where == "slurm", tail_logs=options.where == "local")


def dump(options: argparse.Namespace) -> list[str]:
    return [
        *launcher(options, "dump_teacher_topk"),
        shlex.quote(f"model.restore_from_path={options.teacher}"),
        shlex.quote(f"data.file_path={options.data}"),
        shlex.quote(f"output_dir={options.store}"),
        *map(shlex.quote, options.dump),
    ]


def train(options: argparse.Namespace) -> list[str]:
    return [
        *launcher(options, "train_gpt_sft_kd"),
        "name=kd",
        shlex.quote(f"model.restore_from_path={options.student}"),
        shlex.quote(f"model.data.train_ds.store={options.store}"),
        shlex.quote(f"exp_manager.explicit_log_dir={options.run}"),
        *map(shlex.quote, options.train),
    ]


def launcher(options: argparse.Namespace, script: str) -> list[str]:
    """Return the command that starts a script: torchrun, or on SLURM one rank per task.

    NeMo-Run starts jobs in its own directory; `cd` makes the user's relative paths work.
    """
    root = shlex.quote(str(ROOT))
    here = shlex.quote(str(Path.cwd())) if options.where == "local" else root
    start = ["cd", here, "&&", "env", f"PYTHONPATH={root}:$PYTHONPATH"]
    python = shlex.quote(options.python)
    if options.where == "local":
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        start += [python, *torchrun, f"--nproc_per_node={options.devices}"]
    else:
        start.append(python)
    sizes = [f"trainer.devices={options.devices}", f"trainer.num_nodes={options.nodes}"]
    return [*start, f"{root}/examples/{script}.py", *sizes]


def executor(options: argparse.Namespace) -> run.LocalExecutor | run.SlurmExecutor:
    import nemo_run as run

    if options.where == "local":
        return run.LocalExecutor()
    return run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        nodes=options.nodes,
        ntasks_per_node=options.devices,
        gpus_per_node=options.devices,
        time=options.time,
        container_image=options.image,
        container_mounts=[f"{path}:{path}" for path in (str(ROOT), *options.mount)],
        setup_lines=RENDEZVOUS,
        packager=run.Packager(),  # copies nothing; the checkout is mounted
        tunnel=run.LocalTunnel(job_dir=str(Path(options.run).absolute() / "nemo_run")),
    )


OF_SLURM = {
    "nodes": 1,
    "account": "my_account",
    "partition": "batch",
    "time": "04:00:00",
    "image": "nvcr.io#nvidia/nemo:25.07",
}
"""Options that local tasks do not have, and their defaults."""
SIZES = {"trainer.devices": "give --devices", "trainer.num_nodes": "give --nodes (slurm)"}
OWN = {
    "dump": {
        **SIZES,
        "model.restore_from_path": "give --teacher",
        "data.file_path": "give --data",
        "output_dir": "give --store",
    },
    "train": {
        **SIZES,
        "model.restore_from_path": "give --student",
        "model.data.train_ds.store": "give --store",
        "exp_manager.explicit_log_dir": "give --run",
    },
}
"""Option → keys that this program sets itself → what sets them."""


def refusal(given: str, own: dict[str, str]) -> str:
    """Return why a KEY=VALUE cannot be passed; empty if it can."""
    key = given.partition("=")[0].lstrip("+~ ").partition("@")[0].rstrip()
    for known, instead in own.items():
        if key == known or key.startswith(f"{known}."):
            return f"leave {key} out; {instead}"
        if known.startswith(f"{key}."):
            return f"give keys of {key} one by one; for {known}, {instead}"
    return ""


def count(text: str) -> int:
    """Read an option's number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("where", choices=("local", "slurm"))
    for name in ("teacher", "student", "data", "store", "run"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("dump", "train", "mount"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--devices", type=count, help="ranks per node; default: 1 local, 8 slurm")
    parser.add_argument("--python", default="python", help="interpreter that has NeMo")
    for name, default in OF_SLURM.items():
        kind = count if name == "nodes" else str
        parser.add_argument(f"--{name}", type=kind, help=f"slurm only; default: {default}")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs only")
    options = parser.parse_args(words)
    options.devices = options.devices or (8 if options.where == "slurm" else 1)
    for name in ("mount", *OF_SLURM):
        if options.where == "local" and getattr(options, name):
            parser.error(f"--{name} is for slurm only: leave it out")
    for name, default in OF_SLURM.items():
        setattr(options, name, getattr(options, name) or default)
    for option, own in OWN.items():
        for given in getattr(options, option):
            if wrong := refusal(given, own):
                parser.error(f"--{option} {given}: {wrong}")
    for name in ("teacher", "student", "data", "store", "run"):
        if options.where == "slurm" and not Path(getattr(options, name)).is_absolute():
            parser.error(f"--{name} must be an absolute path, below a --mount")
    return options


if __name__ == "__main__":
    main()
