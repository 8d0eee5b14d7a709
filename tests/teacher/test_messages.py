"""Messages from a dump by a chat template to a training beside a file of the same messages."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from nemo_kd.sft.config import template_hash
from nemo_kd.store import Store
from tests.processes import error_of, run_script
from tests.runs import SAME_LINE, validations
from tests.teacher.conftest import SETTINGS
from tests.teacher.test_without_nemo import PATH

TEMPLATE = (
    "{{ strftime_now('%Y') }}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ROWS: list[list[str]] = [
    ["hello", "the answer\n", "why?", "    indented"],
    ["one", "two", "thanks"],
    ["größe 答", "", "🙂", "as text"],
    ["a", "b"],
]


def messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("messages")
    (directory / "chat.jinja").write_text(TEMPLATE)
    lines = (json.dumps({"messages": messages(texts)}) + "\n" for texts in ROWS)
    (directory / "rows.jsonl").write_text("".join(lines))
    return directory


def dump(world: Path, files: Path, store: Path, *more: str) -> list[str]:
    return [
        *SETTINGS,
        "teacher.kind=hf",
        f"model.restore_from_path={world}/llama",
        f"data.file_path={files}/rows.jsonl",
        f"data.chat_template={files}/chat.jinja",
        f"output_dir={store}",
        *more,
    ]


@pytest.fixture(scope="module")
def store(world: Path, files: Path) -> Path:
    """Dumped where NeMo is not installed."""
    done = run_script("dump_teacher_topk.py", *dump(world, files, files / "store"), PYTHONPATH=PATH)
    assert "its rows are read as messages; data.format sets it" in done.stderr
    assert "asks for today's date: it gets data.chat_date=2024-07-26" in done.stderr
    return files / "store"


def test_the_tokens_are_the_chat_templates(world: Path, store: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(world / "llama")
    fixed = TEMPLATE.replace("{{ strftime_now('%Y') }}", "2024")
    for sample, texts in zip(Store(store), ROWS, strict=True):
        ids = sample.input_ids.tolist()
        expected = tokenizer.apply_chat_template(messages(texts), chat_template=fixed)
        assert tokenizer.decode(ids) == tokenizer.decode(expected)
        # Only there would a token join the header's newline with what is learned.
        assert (ids == expected) == (texts[-1] != "    indented")
        learned = tokenizer.decode(sample.input_ids[sample.loss_mask == 1])
        assert learned == "".join(f"{text}</s>" for text in texts[1::2] if text)
        assert len(sample.topk.ids) == sample.loss_mask[1:].sum()


def test_the_template_travels_with_the_store(store: Path) -> None:
    recorded = Store(store).spec.template
    assert recorded["chat_template"] == TEMPLATE and recorded["format"] == "messages"
    assert recorded["chat_template_sha256"] == template_hash(TEMPLATE) and recorded["chat"]


def test_a_resumed_dump_has_the_same_template(world: Path, files: Path, store: Path) -> None:
    again = dump(world, files, store, "data.train_on=last_assistant")
    assert "template.train_on: 'all_assistant' in the store" in error_of(
        "dump_teacher_topk.py", *again
    )


def test_a_file_beside_the_store_is_read_in_the_same_way(
    world: Path, files: Path, store: Path
) -> None:
    """Validated on the store and on its file: the same rows, tokens and mask."""
    run_script(
        "train_gpt_sft_kd.py",
        f"model.restore_from_path={world}/llama.nemo",
        f"model.data.train_ds.store={store}",
        f"model.data.train_ds.file_names=[{files}/rows.jsonl]",
        f"model.data.validation_ds.store={store}",
        f"model.data.validation_ds.file_names=[{files}/rows.jsonl]",
        "model.data.validation_ds.names=[heldout,file]",
        f"exp_manager.explicit_log_dir={files}/run",
        "trainer.precision=32",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "trainer.enable_progress_bar=false",
        "model.global_batch_size=4",
        "model.micro_batch_size=2",
        "model.data.train_ds.max_seq_length=128",
    )
    (line,) = validations(files / "run")
    assert line["val/file/sft_loss"] == pytest.approx(line["val/heldout/sft_loss"], abs=SAME_LINE)
    (trained,) = (files / "run/checkpoints").glob("*.nemo")
    with tarfile.open(trained) as archive:
        (name,) = (name for name in archive.getnames() if name.endswith("model_config.yaml"))
        saved = yaml.safe_load(archive.extractfile(name))
    assert saved["data"]["train_ds"]["chat_template"] == TEMPLATE
