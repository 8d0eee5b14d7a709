"""Make code instruction pairs from sympy and networkx, as JSONL for NeMo's SFT.

A row is one function: `input` is its signature and the first paragraph of its docstring, `output`
its body as in the source, so that `input + output` can be parsed. The body starts with a newline,
which keeps its first line's indentation: NeMo strips spaces from both ends of a field.

Training and held-out data do not overlap: all functions of a module are on the same side of the
split, and of bodies with equal syntax trees only one is used.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from nemo_kd.cli.failures import reported
from nemo_kd.outputs import is_json_with, refuse_foreign

PACKAGES = ("sympy", "networkx")
DOCSTRING_LINES = 6  # longer first paragraphs are rare, and more prose than instruction
TEMPLATE = "{input} {output}"  # NeMo's default prompt template, used to count tokens


@dataclass(frozen=True)
class Pair:
    """One function; NeMo treats all fields but `input` and `output` as metadata."""

    input: str
    output: str
    package: str
    module: str
    function: str
    tokens: int = 0


def package_modules(package: str) -> list[tuple[str, Path]]:
    """Return name and file of each module of an installed package, without its tests."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; `pip install {package}`")
    root = Path(spec.origin).parent
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if "tests" not in parts and not parts[-1].startswith("test_"):
            modules.append((".".join((package, *parts)), path))
    return modules


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the functions of a module and methods of its classes, with qualified names."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{node.name}.{member.name}", member


def split_function(source: list[str], node: ast.FunctionDef) -> tuple[str, str] | None:
    """Return signature with docstring, and body; None if the function is not usable."""
    docstring = ast.get_docstring(node)
    body = node.body[1:]
    if not docstring or not body or _says_nothing(body):
        return None
    paragraph = docstring.split("\n\n")[0].strip()
    if paragraph.count("\n") >= DOCSTRING_LINES or '"""' in paragraph or "\\" in paragraph:
        return None
    signature = "".join(source[node.lineno - 1 : node.body[0].lineno - 1])
    statements = "".join(source[node.body[0].end_lineno : node.end_lineno])
    if not signature or not statements.strip():
        return None  # all on one line
    indented = textwrap.indent(f'"""{paragraph}"""', "    ")
    prompt = textwrap.dedent(signature).rstrip("\n") + "\n" + indented
    lines = textwrap.dedent(statements).strip("\n").splitlines()
    answer = "\n" + textwrap.indent("\n".join(line.rstrip() for line in lines), "    ")
    return (prompt, answer) if _is_this_function(prompt + answer, body) else None


def _says_nothing(body: list[ast.stmt]) -> bool:
    if len(body) > 1:
        return False
    (statement,) = body
    is_ellipsis = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_ellipsis or isinstance(statement, ast.Pass | ast.Raise)


def _is_this_function(text: str, body: list[ast.stmt]) -> bool:
    """Whether splitting and indenting kept the body (they can change multi-line strings)."""
    try:
        (parsed,) = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    assert isinstance(parsed, ast.FunctionDef)
    return [ast.dump(s) for s in parsed.body[1:]] == [ast.dump(s) for s in body]


def extract(package: str, module: str, path: Path) -> Iterator[Pair]:
    """Yield every usable function of a module."""
    text = path.read_text(encoding="utf-8")
    source = text.splitlines(keepends=True)
    for name, node in functions(ast.parse(text)):
        parts = split_function(source, node)
        if parts is not None:
            yield Pair(*parts, package, module, name)


def body_key(pair: Pair) -> str:
    """Return a key that is equal for bodies with the same syntax tree."""
    return ast.dump(ast.parse(textwrap.dedent(pair.output)))


def is_held_out(module: str, share: float) -> bool:
    """Whether a module is held out; depends only on its name."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


def choose(pairs: list[Pair], count: int, side: str, seed: int) -> list[Pair]:
    """Select `count` pairs, in a reproducible random order."""
    if len(pairs) < count:
        raise typer.BadParameter(
            f"{side} has {len(pairs)} functions, expected at least {count}; "
            "raise --max-tokens or lower the number of samples"
        )
    order = sorted(pairs, key=lambda pair: (pair.module, pair.function, pair.input))
    return random.Random(seed).sample(order, count)


def write_jsonl(path: Path, pairs: list[Pair]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")


def sources(packages: tuple[str, ...]) -> tuple[list[dict[str, str]], str]:
    """Return name, version and licence of each package, and the text of all licences."""
    rows, texts = [], []
    for package in packages:
        distribution = importlib.metadata.distribution(package)
        meta = distribution.metadata
        keys = [key for key in ("License-Expression", "License") if key in meta]
        licence = meta[keys[0]] if keys else "see LICENSES.txt"
        rows.append({"package": package, "version": distribution.version, "licence": licence})
        for file in distribution.files or []:
            if file.name.startswith("LICENSE"):
                heading = f"{package} {distribution.version}"
                text = file.read_text(encoding="utf-8")
                texts.append(f"{heading}\n{'=' * len(heading)}\n\n{text}")
    return rows, "\n\n".join(texts)


def summary(train: list[Pair], heldout: list[Pair]) -> dict[str, Any]:
    """Return the number of samples, modules and tokens of both sides."""
    return {
        side: {
            "samples": len(pairs),
            "modules": len({pair.module for pair in pairs}),
            "tokens": sum(pair.tokens for pair in pairs),
        }
        for side, pairs in (("train", train), ("heldout", heldout))
    }


def refuse_foreign_files(directory: Path) -> None:
    """Raise NemoKDError if the directory has such files that this script did not write."""
    is_pair = is_json_with("input", "output", "package", "module", "function")
    for name in ("train.jsonl", "heldout.jsonl"):
        what = "a file of this script"
        refuse_foreign(directory / name, what, lambda content: is_pair(content.split(b"\n")[0]))
    is_about = is_json_with("sources", "max_tokens")
    refuse_foreign(directory / "data.json", "a description of this script", is_about)


def main(
    tokenizer: Annotated[Path, typer.Option(help="tokenizer directory, to count tokens")],
    output_dir: Annotated[Path, typer.Option(help="directory for train.jsonl, heldout.jsonl")],
    train: Annotated[int, typer.Option(help="number of training samples")] = 1000,
    heldout: Annotated[int, typer.Option(help="number of held-out samples")] = 120,
    max_tokens: Annotated[int, typer.Option(help="maximum of prompt, answer, end token")] = 144,
    heldout_share: Annotated[float, typer.Option(help="fraction of modules held out")] = 0.1,
    seed: Annotated[int, typer.Option(help="selects among the usable functions")] = 0,
) -> None:
    """Write train.jsonl, heldout.jsonl, data.json (their description) and LICENSES.txt."""
    refuse_foreign_files(output_dir)
    console = Console()
    encode = AutoTokenizer.from_pretrained(
        str(tokenizer), local_files_only=True, trust_remote_code=False
    )
    found: dict[str, Pair] = {}
    for package in PACKAGES:
        modules = package_modules(package)
        for module, path in track(modules, f"reading {package}", console=console):
            for pair in extract(package, module, path):
                found.setdefault(body_key(pair), pair)
    sized = []
    for pair in track(found.values(), "counting tokens", console=console):
        text = TEMPLATE.format(input=pair.input, output=pair.output)
        tokens = len(encode.tokenize(text)) + 1
        if tokens <= max_tokens:
            sized.append(Pair(**(asdict(pair) | {"tokens": tokens})))
    sides: dict[bool, list[Pair]] = {False: [], True: []}
    for pair in sized:
        sides[is_held_out(pair.module, heldout_share)].append(pair)
    chosen_train = choose(sides[False], train, "training", seed)
    chosen_heldout = choose(sides[True], heldout, "held-out", seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_jsonl(output_dir / "train.jsonl", chosen_train)
    write_jsonl(output_dir / "heldout.jsonl", chosen_heldout)
    rows, licences = sources(PACKAGES)
    (output_dir / "LICENSES.txt").write_text(licences, encoding="utf-8")
    sizes = summary(chosen_train, chosen_heldout)
    about = {"sources": rows, "max_tokens": max_tokens, "seed": seed, "usable": len(sized)} | sizes
    (output_dir / "data.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for side, size in sizes.items():
        console.print(
            f"{side}: {size['samples']} of {len(sides[side == 'heldout'])} usable functions, "
            f"{size['modules']} modules, {size['tokens']} tokens"
        )


if __name__ == "__main__":
    with reported():
        typer.run(main)
