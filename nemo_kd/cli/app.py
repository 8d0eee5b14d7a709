"""The typer application `nemo-kd` and helpers shared by its commands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

import nemo_kd
from nemo_kd.paths import expand_home
from nemo_kd.visible import visible

if TYPE_CHECKING:
    from nemo_kd.store import Manifest


class Command(TyperCommand):
    """A command whose arguments may begin with `~/`, also where the shell does not expand it.

    Refuses an option given twice, of which typer would take the last.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = [_with_home(each) for each in args]
        *_, given = self.make_parser(ctx).parse_args(list(args))
        for parameter in given:
            single = not (getattr(parameter, "is_flag", True) or parameter.multiple)
            if single and given.count(parameter) > 1:
                ctx.fail(f"{parameter.opts[0]} is given twice; give it once.")
        return super().parse_args(ctx, args)


def _with_home(argument: str) -> str:
    """Replace a leading `~/` of an argument, or of the value in `--option=~/x`."""
    option, equals, value = argument.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={expand_home(value)}"
    return expand_home(argument)


class App(typer.Typer):
    """An application of such commands."""

    def command(self, *arguments: Any, **options: Any) -> Any:
        return super().command(*arguments, **{"cls": Command, **options})


app = App(
    help="Inspect, check and transform stores of teacher logits; run jobs; check a machine.",
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


StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="Directory of a store, or its URL (s3://...).")
]
"""Not a Path, which would join the slashes of a URL."""
LocalStore = Annotated[
    str, typer.Argument(metavar="STORE", help="Directory of a store on a local disk.")
]
"""Of commands that read or change the files of the directory itself."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Jobs = Annotated[
    int, typer.Option(min=0, help="Number of processes; 0: one per core for a large store.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing target.")]
Weights = Annotated[str | None, typer.Option(help="Relative weights, such as 0.95,0.05.")]
TokenizerPath = Annotated[
    str | None,
    typer.Option(help="Hugging Face tokenizer directory, or SentencePiece .model file."),
]


@contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar if stderr is a terminal; yield a function that takes (done, total)."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_parent(option: str, path: Path) -> None:
    """Raise StoreError if the file `path`, the value of `option`, cannot be created."""
    from nemo_kd.errors import StoreError

    if path.is_dir():
        raise StoreError(f"{option} {path} is a directory; give the path of a file")
    if not path.absolute().parent.is_dir():
        raise StoreError(f"{option} {path}: no such directory {path.parent}")


def refuse_address(store: str) -> None:
    """Raise StoreError if a command that needs a directory is given an address."""
    from nemo_kd.errors import StoreError
    from nemo_kd.store.remote import is_url

    if is_url(store):
        raise StoreError(
            f"{store} is an address, but this command needs a local directory: nemo-kd pull it "
            "first"
        )


def check_store_target(target: str | Path) -> None:
    """Raise StoreError if `target` looks like a file or address: a store is a local directory."""
    from nemo_kd.errors import StoreError
    from nemo_kd.settings.files import address_problem, file_name_problem

    target = str(target)  # a Path would join the slashes of a URL
    if problem := address_problem(target) or file_name_problem(target):
        raise StoreError(problem)


ARGUMENT = re.compile(r"\b(overwrite|renumber)=true\b|\b(seed)=(?=[-\d])")
"""Pattern of Python and Hydra arguments in error messages, such as `overwrite=true`."""


@contextmanager
def options_named() -> Iterator[None]:
    """Context manager that names options in error messages: `overwrite=true` as `--overwrite`."""
    from nemo_kd.errors import StoreError

    try:
        yield
    except StoreError as error:
        raise StoreError(ARGUMENT.sub(_option, str(error))) from error


def _option(match: re.Match[str]) -> str:
    flag, valued = match.groups()
    return f"--{flag}" if flag else f"--{valued} "


def print_json(value: Any) -> None:
    """Print a result as JSON, for scripts."""
    typer.echo(visible(json.dumps(value, indent=1, ensure_ascii=False)))


def summary(target: str | Path, manifest: Manifest) -> dict[str, Any]:
    """Return the values that a command reports about a store it wrote."""
    spec = manifest.spec
    kept = {"profile": spec.profile, "top_k": spec.top_k}
    return {
        "written": str(target),
        "fingerprint": manifest.fingerprint,
        **kept,
        **manifest.totals,
    }


def report(result: dict[str, Any], as_json: bool, *, unchanged: str = "") -> None:
    """Print a command's summary of what it wrote, as a table or as JSON.

    `unchanged`: the reason why nothing was written; in JSON, `written` is then null.
    """
    from nemo_kd.cli import render

    target = result["written"]
    if unchanged:
        result = {**result, "written": None, "unchanged": str(target)}
    if as_json:
        print_json(result)
        return
    numbers = {k: f"{v:,}" if isinstance(v, int) else v for k, v in result.items()}
    title = f"{target} {unchanged}" if unchanged else f"wrote {target}"
    rows = {
        name.replace("_", " "): value
        for name, value in numbers.items()
        if name not in ("written", "unchanged") and value not in ([], None)
    }
    render.console().print(render.pairs(title, rows))
