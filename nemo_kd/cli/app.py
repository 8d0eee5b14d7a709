"""The application, and what its commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import nemo_kd

app = typer.Typer(
    help="Inspect, check and transform stores of teacher logits; size a dump; examine a machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nemo-kd {nemo_kd.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    pass


StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="Directory of a store.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a store that is there already.")]
TokenizerPath = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Tokenizer directory, or SentencePiece .model file."),
]


@contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal; call with done and total."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_parent(option: str, path: Path) -> None:
    """StoreError where the file `path` of `option` cannot be written."""
    from nemo_kd.errors import StoreError

    if path.is_dir():
        raise StoreError(f"{option} {path} is a directory; name a file in it")
    if not path.absolute().parent.is_dir():
        raise StoreError(f"{option} {path}: there is no directory {path.parent}")


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def report(result: dict[str, Any], as_json: bool) -> None:
    """What a command made."""
    from nemo_kd.cli import render

    if as_json:
        print_json(result)
        return
    numbers = {k: f"{v:,}" if isinstance(v, int) else v for k, v in result.items()}
    title = f"wrote {numbers.pop('written')}"
    rows = {name.replace("_", " "): value for name, value in numbers.items()}
    render.console().print(render.pairs(title, rows))
