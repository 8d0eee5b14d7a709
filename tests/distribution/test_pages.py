"""What pages claim about the package: its public names, and which modules patch others."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "nemo_kd"
PATCHING = {
    "bridge/cpu.py",
    "hf/split.py",
    "mcore/cpu.py",
    "mcore/lm_head.py",
    "mcore/megatron_lm.py",
    "mcore/micro_batch.py",
    "nemo/compat.py",
    "nemo/cpu.py",
    "nemo/student_loss.py",
}
"""Modules that replace a function or a flag of another package's objects."""
SETTING = {
    "bridge/peft.py",
    "bridge/recipe.py",
    "bridge/teacher.py",
    "bridge/training.py",
    "checkpoints/exported_tokenizer.py",
    "checkpoints/gguf_tokenizer.py",
    "checkpoints/huggingface.py",
    "checkpoints/sentencepiece_tokenizer.py",
    "checkpoints/tokenizer.py",
    "checkpoints/verify.py",
    "checkpoints/windows.py",
    "cli/run.py",
    "hf/evaluation.py",
    "hf/generation.py",
    "hf/rope.py",
    "hf/student.py",
    "hf/teacher.py",
    "loss/compiling.py",
    "mcore/gpt.py",
    "mcore/writer.py",
    "nemo/families.py",
    "nemo/length.py",
    "nemo/logits.py",
    "nemo/merge.py",
    "nemo/order.py",
    "nemo/resume.py",
    "nemo/settings/training.py",
    "nemo/start.py",
    "sft/checks.py",
    "sft/messages.py",
    "store/tools/distillkit.py",
    "store/tools/logprobs.py",
    "store/tools/stats.py",
    "store/tools/verify.py",
    "teacher/generation/generate.py",
    "teacher/tally.py",
}
"""Modules that set ordinary attributes: of settings, or of objects that they have made."""


@pytest.mark.parametrize("room", ["loss", "store", "mcore", "doctor"])
def test_the_api_page_lists_what_is_public(room: str) -> None:
    sections = re.split("^## ", (ROOT / "docs/api.md").read_text(), flags=re.M)
    (section,) = (text for text in sections if text.startswith(f"nemo_kd.{room}\n"))
    listed = re.findall(r"^::: ([\w.]+)\.(\w+)$", section, flags=re.M)
    assert {name for _, name in listed} == set(importlib.import_module(f"nemo_kd.{room}").__all__)
    for module, name in listed:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def _sets_attributes_of_others(tree: ast.Module) -> bool:
    """Whether any attribute is assigned except those of `self`, `cls`, `ctx` and `cfg`."""
    own = ("self.", "cls.", "ctx.", "cfg.")
    return any(
        isinstance(node.ctx, ast.Store) and not ast.unparse(node).startswith(own)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    )


def test_the_architecture_page_names_the_modules_that_patch() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if _sets_attributes_of_others(ast.parse(path.read_text()))
    }
    assert found == PATCHING | SETTING
    page = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"^\| `nemo_kd/([\w/]+\.py)` \|", page, flags=re.M))
    assert named == PATCHING
