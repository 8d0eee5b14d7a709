"""Every code block of the documentation is run, composed or parsed; a new kind of one fails."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import nemo_kd.loss
from nemo_kd.checkpoints import open_checkpoint, write_nemo
from nemo_kd.cli.main import main
from nemo_kd.loss import vocab_parallel_topk
from tests.checkpoints import models
from tests.conftest import ROOT
from tests.distribution.blocks import Block, blocks_of, check_bash, check_console
from tests.store.s3 import serving
from tests.store.samples import sample, spec, write

PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / path for path in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / path / "README.md" for path in ("examples/slurm", "experiments")),
]
# Page and first line of each block without a check here → where it has one, or why it needs none.
EXEMPT = {
    ("megatron.md", "from megatron.bridge.peft.lora import LoRA"): "tests/bridge/test_page.py",
    ("store.md", "for i in range(iterations * global_batch_size):"): "in a Megatron training",
    ("loss.md", "loss = sft_weight · CE + kd_weight · T² · D(p, q)       nats per token"): (
        "formulas"
    ),
    ("nemo_aligner.md", "python examples/nlp/gpt/train_gpt_knowledge_distillation.py"): (
        "NeMo-Aligner's own command, for comparison"
    ),
    ("sizing.md", "seconds = 2 · parameters · tokens"): "a formula",
    ("security.md", "nemo-kd inspect model.nemo"): "tests/attacks/test_pickles.py",
    ("store.md", "store/"): "a picture",
    ("store.md", "import json, numpy as np"): "tests/store/test_page.py",
}


COLUMNS = 80


def test_code_fits_a_terminal() -> None:
    """On the site's pages; an address cannot be broken, files of `conf/` are shown as they are."""
    wide = [
        (page.name, line)
        for page in sorted((ROOT / "docs").glob("*.md"))
        for block in blocks_of(page)
        for line in block.text.splitlines()
        if len(line) > COLUMNS and not re.fullmatch(r"wget https://\S+", line)
    ]
    assert wide == []


def exempt(block: Block) -> bool:
    return any(
        block.page == page and block.first_line.startswith(line.strip()) for page, line in EXEMPT
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the files that the pages name: a store and its tokenizer, and
    the same as NeMo-Aligner's JSONL."""
    model = tmp_path / "tokenizer.model"
    model.write_bytes(models.sentencepiece_model())
    of = spec(vocab_size=300, tokenizer={"library": "sentencepiece", "path": str(model)})
    write(tmp_path / "store", of, [sample(row, of, answers=1 + row % 4) for row in range(7)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        with pytest.raises(SystemExit) as left:
            main(["convert", "store", f"data/{part}_with_logits_0.jsonl"])
        assert not left.value.code
    return tmp_path


def names(page: str) -> dict[str, Any]:
    """What a reader has at hand when the page's Python begins."""
    torch.manual_seed(0)
    if page == "other_trainers.md":
        model = models.llama("tied_grouped")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return {"model": model, "optimizer": optimizer, "tokenizer": models.tokenizer()}
    if page == "tutorial.md":  # the end of its export
        models.save(models.llama("untied_llama3"), Path("runs/kd/hf"))
    if page != "loss.md":
        return {}
    teacher = vocab_parallel_topk(torch.randn(5, 300), 7)
    return {
        "logits": torch.randn(5, 300, requires_grad=True),
        "labels": torch.randint(300, (5,)),
        "top_logits": teacher.logits,
        "top_ids": teacher.ids,
        "logsumexp": teacher.logsumexp,
    }


@pytest.fixture
def s3(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The server behind `s3://bucket`, for pages that name it."""
    if "nemo-kd push" not in page.read_text():
        yield
        return
    with serving() as server:
        for name, value in {**server.environment, "NEMO_KD_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.fixture
def student(page: Path, world: Path) -> None:
    """`student.nemo`, for pages that export it."""
    if "nemo-kd export student.nemo" in page.read_text():
        source = open_checkpoint(models.save(models.llama("tied_grouped"), world / "source"))
        write_nemo(source, world / "student.nemo", range(4))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks_of(p)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_blocks_of_a_page_work(page: Path, world: Path, s3: None, student: None) -> None:
    namespace = names(page.name)
    for block in blocks_of(page):
        if exempt(block):
            continue
        match block.language:
            case "bash":
                check_bash(block.text)
            case "console":
                check_console(block.text)
            case "json":
                json.loads(block.text)
            case "yaml":
                check_yaml(block.text)
            case "python" if page.name == "design.md":
                check_signatures(block.text)
            case "python":
                exec(block.text, namespace)
            case other:
                pytest.fail(f"no check for a block of {other!r}: {block.first_line}")
    if page.name == "loss.md":
        assert np.isfinite(namespace["logits"].grad).all()


def check_yaml(text: str) -> None:
    """A whole file of `conf/`; how scripts compose it is tested with them."""
    (file,) = re.findall(r'^--8<-- "(conf/\w+\.yaml)"$', text.strip())
    assert isinstance(yaml.safe_load((ROOT / file).read_text()), dict)


def check_signatures(text: str) -> None:
    """`name(a, b, *, c=1, ...)` of `nemo_kd.loss` as the page prints it."""
    text = re.sub(r"\n +", " ", text)  # a signature over several lines
    printed = re.findall(r"^(\w+)\((.*?)(, \.\.\.)?\)(?= +->| +#|$)", text, re.MULTILINE)
    assert printed
    for name, arguments, more in printed:
        (function,) = ast.parse(f"def f({arguments}): ...").body
        assert isinstance(function, ast.FunctionDef)
        said = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
        real = list(inspect.signature(getattr(nemo_kd.loss, name)).parameters)
        assert said == (real[: len(said)] if more else real), name


def test_every_exemption_is_of_a_block_that_there_is() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page)]
    for page, line in EXEMPT:
        assert any(b.page == page and b.first_line.startswith(line.strip()) for b in blocks), line


@pytest.mark.parametrize(
    "text",
    [
        "python examples/train_gpt_sft_kd.py model.nothing=1",
        "python examples/train_gpt_sft_kd.py +model.kd.topk=1",
        "python examples/dump_teacher_topk.py +data.overlong=x",
        "python examples/convert_hf_to_nemo.py a b.nemo --layers 1",
        "python examples/no_such_script.py a=1",
        "nemo-kd stats nowhere",
        "make nothing",
        "rm -rf store",
        "if true",
    ],
)
def test_a_block_that_does_not_work_fails(text: str, world: Path) -> None:
    with pytest.raises(BaseException):  # noqa: B017 (each program has its own)
        check_bash(text)
