"""The package's rooms: what each may import. Type-only and deferred imports count as well."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nemo_kd

PACKAGE = Path(nemo_kd.__file__).parent
CORE = {
    *("nemo_kd", "errors", "extras", "files", "lock", "outputs", "paths", "spelling", "topk"),
    *("json_rows", "tokenizer_files", "visible", "vocabulary"),
}

# Room → the rooms below that it may import.
BELOW: dict[str, set[str]] = {"core": set()}
BELOW["loss"] = {"core"}
BELOW["settings"] = BELOW["loss"] | {"loss"}
BELOW["store"] = {"core"}
BELOW["sft"] = {"core", "settings", "store"}
BELOW["data"] = {"core", "loss", "store"}
BELOW["teacher"] = {"core", "loss", "settings", "store", "sft"}
BELOW["checkpoints"] = {"core"}
BELOW["mcore"] = BELOW["teacher"] | {"teacher", "data", "checkpoints"}
BELOW["bridge"] = BELOW["mcore"] | {"mcore"}
BELOW["hf"] = BELOW["mcore"]
BELOW["served"] = BELOW["teacher"] | {"teacher"}
BELOW["nemo"] = BELOW["mcore"] | {"mcore"}
BELOW["doctor"] = {"core", "loss", "store"}
BELOW["cli"] = set(BELOW)

# Room → the libraries that it may import beside the standard library.
LIBRARIES: dict[str, set[str]] = {
    "core": {"msgspec", "torch", "transformers"},
    "loss": {"torch", "triton"},
    "settings": {"omegaconf"},
    "store": {"fsspec", "msgspec", "numpy", "pyarrow", "tenacity", "torch"},
    "sft": {"numpy", "pyarrow", "sentencepiece", "transformers"},
    "data": {"numpy", "torch"},
    "teacher": {"numpy", "rich", "torch"},
    "checkpoints": {
        *("gguf", "megatron", "msgspec", "numpy", "omegaconf", "safetensors", "sentencepiece"),
        *("tokenizers", "torch", "transformers", "yaml"),
    },
    "mcore": {"megatron", "numpy", "torch"},
    "bridge": {"megatron", "numpy", "torch"},
    "hf": {"accelerate", "numpy", "torch", "transformers"},
    "served": {"httpx", "msgspec", "numpy", "tenacity", "torch"},
    "nemo": {
        *("lightning", "megatron", "nemo", "nltk", "numpy", "omegaconf", "torch", "torchmetrics"),
        "yaml",
    },
    "doctor": {"torch", "rich"},
    "cli": {"hydra", "numpy", "omegaconf", "rich", "torch", "typer", "yaml"},
}

# Modules that import another library, and why.
EXCEPTIONS = {
    ("nemo_kd.cli.tokenizers", "transformers"),  # shows the text of ids: `sft` reads rows only
    ("nemo_kd.cli.tokenizers", "sentencepiece"),
}


def _modules() -> dict[str, ast.Module]:
    """Dotted name → parsed source of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


MODULES = _modules()


def _imports(name: str) -> Iterator[str]:
    """Every module that `name` imports anywhere in its source, absolute names."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def _room(module: str) -> str:
    part = [*module.split("."), ""][1] or "nemo_kd"
    return "core" if part in CORE else {"__main__": "cli"}.get(part, part)


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    upwards = {
        (name, other)
        for name in MODULES
        if _room(name) == room
        for other in _imports(name)
        if other.split(".")[0] == "nemo_kd" and _room(other) not in BELOW[room] | {room}
    }
    assert not upwards


@pytest.mark.parametrize("room", LIBRARIES)
def test_a_room_imports_only_its_libraries(room: str) -> None:
    known = LIBRARIES[room] | set(sys.stdlib_module_names) | {"nemo_kd"}
    others = {
        (name, library)
        for name in MODULES
        if _room(name) == room
        for library in {other.split(".")[0] for other in _imports(name)} - known
    }
    assert others <= EXCEPTIONS


def test_every_room_is_in_the_table() -> None:
    assert {_room(name) for name in MODULES} == set(BELOW) == set(LIBRARIES)


def test_no_imports_in_a_circle() -> None:
    graph = {
        name: {other for other in _imports(name) if other in MODULES and other != "nemo_kd"}
        for name in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
