# ruff: noqa: E402 (NeMo comes after its patches)
"""SFT files of every kind read as a dump reads them: `python rows_world.py RESULT.json`.

The data sets are NeMo's own, the tokenizer a real one, the model that they belong to a tiny one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from nemo_kd import cpu

cpu.install()
sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # `tests`

from hydra import compose, initialize_config_dir
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_kd.teacher.hf import HFTeacher
from nemo_kd.teacher.rows import RowError, SFTRows
from tests.checkpoints import models

LIMIT = 40
GOOD = {"input": "a question", "output": "an answer"}
TURNS = [{"from": "User", "value": "hello"}, {"from": "Assistant", "value": "the answer"}]
CHAT = {"system": "s", "mask": "User", "type": None, "conversations": TURNS}
LONG_TURNS = [TURNS[0], {"from": "Assistant", "value": "the answer " * 200}]


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


# name → (the file, further overrides)
FILES: dict[str, tuple[str, list[str]]] = {
    "empty": ("", []),
    "one row": (lines(GOOD).strip(), []),
    "not JSON": (lines(GOOD, "not json", GOOD), []),
    "a blank line": (lines(GOOD, "", GOOD), []),
    "a list": (lines(GOOD, [1, 2]), []),
    "a number": (lines(GOOD, {**GOOD, "output": 3}), []),
    "no answer": (lines(GOOD, {"input": "a question"}), []),
    "an empty answer": (
        lines(GOOD, {**GOOD, "output": ""}),
        ["data.prompt_template='{input}{output}'"],
    ),
    "a long prompt": (lines({**GOOD, "input": "a question " * 40}, GOOD), []),
    "a long answer": (lines({**GOOD, "output": "an answer " * 40}, GOOD), []),
    "an answer cut away": (
        lines({**GOOD, "input": "a question " * 40}),
        ["data.truncation_field=output", "data.truncation_method=left"],
    ),
    "conversations": (
        lines(CHAT, {**CHAT, "conversations": LONG_TURNS}),
        ["data.chat=true", "data.max_seq_length=300"],
    ),
    "a conversation whose answer is beyond the limit": (lines(CHAT), ["data.chat=true"]),
    "no conversation": (lines(GOOD), ["data.chat=true"]),
}


def read(path: Path, overrides: list[str], tokenizer: Any, model: LlamaForCausalLM) -> Any:
    """[tokens, first answer token, answer tokens, cut] of each row, or what the refusal says."""
    cfg = compose(
        "dump_teacher_topk",
        [
            f"data.file_path={path}",
            f"data.max_seq_length={LIMIT}",
            "model.restore_from_path=unused",
            "output_dir=unused",
            *overrides,
        ],
    )
    try:
        rows = SFTRows(HFTeacher(model, tokenizer, None, cfg), cfg.data)
        found = [rows[i] for i in range(len(rows))]
    except RowError as error:
        return str(error)
    return [
        [len(row), int(row.loss_mask.argmax()), int(row.loss_mask.sum()), row.cut] for row in found
    ]


def main(result: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        models.tokenizer().save_pretrained(f"{directory}/tokenizer")
        tokenizer = AutoTokenizer(f"{directory}/tokenizer", use_fast=True)
        config = LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
        model, found = LlamaForCausalLM(config), {}
        with initialize_config_dir(f"{sys.path[0]}/conf", version_base=None):
            for number, (name, (text, overrides)) in enumerate(FILES.items()):
                path = Path(directory, f"{number}.jsonl")
                path.write_text(text)
                found[name] = read(path, overrides, tokenizer, model)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
