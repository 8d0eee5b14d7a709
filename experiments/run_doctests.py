"""Functions that run: do the doctests of a library pass with a function body that a model wrote?

    python experiments/run_doctests.py find test.jsonl --output=doctests.jsonl
    python experiments/run_doctests.py judge completions.json --output=doctests.json

`find` keeps the rows whose original function has doctests that pass as it is and fail when it
raises. `judge` puts each completion in the place of its function and runs these doctests; its file
has a character for each function, `1` or `0`:

    {"functions": 68, "right": "0110…"}

A trial has a process of its own and 10 seconds; it may not write files, start programs or open
connections.
"""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any

import typer

from nemo_kd.files import publish

SECONDS = 10
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
RAISES = "\n    raise RuntimeError('the doctests are to notice this')"
FORBIDDEN = ("os.", "shutil.", "socket.", "subprocess.", "ctypes.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")  # an import looks for files

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


def function_at(module: str, path: str) -> FunctionType | None:
    """The function that `module` has under the dotted path, below its decorators; None if not one.

    Errors: those of importing the module.
    """
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name, None)
    if isinstance(found, functools.cached_property):
        found = found.func
    elif isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(getattr(found, "__func__", found)) if found is not None else None
    return found if isinstance(found, FunctionType) else None


def replace_body(function: FunctionType, source: str) -> None:
    """Give a function the code of the `def` in `source`, wherever it has been imported.

    Errors: ValueError if `source` is not one `def` of that name; SyntaxError.
    """
    found: dict[str, Any] = {}
    exec(compile(source, "<generated>", "exec"), function.__globals__, found)
    mine = found.get(function.__code__.co_name)
    if len(found) != 1 or not isinstance(mine, FunctionType):
        raise ValueError(f"expected def {function.__code__.co_name} and nothing else")
    function.__code__ = mine.__code__
    function.__defaults__, function.__kwdefaults__ = mine.__defaults__, mine.__kwdefaults__


def passes(function: FunctionType) -> bool:
    """Whether its docstring has doctests and all of them pass."""
    space = vars(sys.modules[function.__module__]).copy()
    test = doctest.DocTestParser().get_doctest(
        function.__doc__ or "", space, function.__qualname__, None, 0
    )
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    result = runner.run(test, out=io.StringIO().write)
    return result.attempted > 0 and result.failed == 0


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: generated code may read, and nothing else."""
    writes = event == "open" and set(str(arguments[1] or "r")) & set("wax+")
    if writes or (event.startswith(FORBIDDEN) and event not in HARMLESS):
        raise PermissionError(f"generated code is not allowed: {event}")


def trial(module: str, path: str, source: str | None) -> bool:
    """Whether the doctests pass with `source` in the function's place, or with its own code."""
    function = function_at(module, path)
    if function is None:
        return False
    sys.addaudithook(refuse)
    try:
        if source is not None:
            replace_body(function, source)
        return passes(function)
    except (Exception, SystemExit):
        return False  # whatever generated code raises, it did not pass


def _send(call: Callable[[], bool], to: Connection) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        to.send(call())  # not an exit status: generated code can exit with any
        os._exit(0)  # skips what generated code registered for the exit


def in_own_process(call: Callable[[], bool]) -> bool:
    """Whether the call returns true within `SECONDS`, in a fork of this process."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(call, send))
    child.start()
    send.close()
    try:
        return receive.poll(SECONDS) and bool(receive.recv())
    except EOFError:
        return False  # it ended before it had an answer
    finally:
        child.kill()
        child.join()
        receive.close()


def written(row: dict[str, Any], body: str) -> bool:
    """Whether a row's doctests pass with the prompt and this body."""
    function_at(row["module"], row["function"])  # the fork has it imported
    prompt = row.get("input", row.get("prompt"))
    call = functools.partial(trial, row["module"], row["function"], f"{prompt}{body}")
    return in_own_process(call)


def has_doctests(row: dict[str, Any]) -> bool:
    """Whether the doctests pass with the row's own answer and notice a function that raises."""
    try:
        function = function_at(row["module"], row["function"])
    except Exception:
        return False  # the module needs something that is not installed
    if function is None or function.__code__.co_freevars:
        return False  # code with a `super()` cannot be put in place of one without
    own = functools.partial(trial, row["module"], row["function"], None)
    return in_own_process(own) and written(row, row["output"]) and not written(row, RAISES)


@app.command()
def find(
    rows: Annotated[Path, typer.Argument(help="JSONL with input, output, module and function")],
    output: Annotated[Path, typer.Option(help="JSONL of the rows that can be judged")],
) -> None:
    """Keep the rows whose functions have doctests that tell right from wrong."""
    lines = [
        line
        for line in rows.read_text(encoding="utf-8").splitlines()
        if has_doctests(json.loads(line))
    ]
    publish(output, "".join(f"{line}\n" for line in lines))
    typer.echo(f"{len(lines)} functions with doctests")


@app.command()
def judge(
    completions: Annotated[Path, typer.Argument(help="JSON file of complete.py")],
    output: Annotated[Path, typer.Option(help="JSON file to write")],
    model: Annotated[str, typer.Option(help="whose completions")] = "student",
) -> None:
    """Run the doctests of every completed function."""
    samples = json.loads(completions.read_text(encoding="utf-8"))["samples"]
    right = [written(sample, sample["completions"][model]) for sample in samples]
    content = {"functions": len(right), "right": "".join(str(int(each)) for each in right)}
    publish(output, json.dumps(content) + "\n")


if __name__ == "__main__":
    app()
