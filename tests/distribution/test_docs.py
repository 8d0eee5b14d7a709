"""The documentation speaks of what there is: pages, messages, keys, files and commands."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from nemo_kd.cli import doctor, export, look, make, plan, remote  # noqa: F401 (each adds its commands)
from nemo_kd.cli.app import app
from nemo_kd.doctor.containers import CONTAINERS
from nemo_kd.nemo.config import KDTrainingConfig
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "examples/slurm/README.md"]
SITE_PACKAGES = Path(yaml.__file__).parents[1]
# Whose messages, besides our own, the troubleshooting names.
OTHERS = (
    "lightning/fabric/plugins/environments/slurm.py",
    "nemo/utils/exp_manager.py",
    "omegaconf/base.py",
)


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(leaves(nav)) == sorted(path.name for path in DOCS.glob("*.md"))


def leaves(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [leaf for part in parts for leaf in leaves(part)]  # type: ignore[attr-defined]


def test_the_messages_of_troubleshooting_are_the_codes_own() -> None:
    text = (DOCS / "troubleshooting.md").read_text().partition("## SLURM")[0]
    messages = [
        m for row in re.findall(r"^\| (.*?) \|", text, re.M) for m in re.findall("`(.+?)`", row)
    ]
    assert len(messages) > 30
    known = said()
    for message in messages:
        for part in re.split(r"\s*…\s*|\bN\b", message):
            if len(part) > 8:
                assert part in known, message


@cache
def said() -> str:
    """All string literals of the package and of OTHERS, implicit concatenation joined; and the
    Makefile."""
    files = [*(ROOT / "nemo_kd").rglob("*.py"), *(SITE_PACKAGES / name for name in OTHERS)]
    found = [(ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_variable_of_the_code_is_on_the_page() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "nemo_kd").rglob("*.py")]
    names = {name for text in sources for name in re.findall(r"\bNEMO_KD_[A-Z_]+\b", text)}
    assert {name for name in names if f"| `{name}=" not in page} == set()


def test_the_table_of_containers_is_the_doctors() -> None:
    text = (DOCS / "megatron.md").read_text()
    rows = [
        line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| `2")
    ]
    assert rows == [
        [
            *(f"`{one.tag}`", one.nemo or "none", one.core, one.bridge or "none"),
            "no" if not one.sft_model else "yes" if one.adapters else "yes, without adapters",
            ", ".join(f"`{room}`" for room in one.rooms),
        ]
        for one in CONTAINERS
    ]
    assert {f"`{room}`" for one in CONTAINERS for room in one.rooms} == set(
        re.findall(r"^## (`\w+`)", text, re.M)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_files_and_commands_exist(page: Path) -> None:
    text = page.read_text()
    fields = {field.name for field in dataclasses.fields(KDTrainingConfig)}
    dump = yaml.safe_load((ROOT / "conf/dump_teacher_topk.yaml").read_text())["dump"]
    for key in re.findall(r"model\.kd\.([a-z_]+)", text):
        assert key in fields | set(dump) | {"x"}, key
    for path in re.findall(r"\b(?:examples|benchmarks|conf|nemo_kd|tests)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists() or path.startswith("examples/nlp/"), path
    commands = {
        command.callback.__name__ for command in app.registered_commands if command.callback
    }
    for command in re.findall(r"nemo-kd ([a-z]+) ", text):
        assert command in commands, command
