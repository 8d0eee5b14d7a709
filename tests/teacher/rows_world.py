# ruff: noqa: E402 (NeMo comes after its patches)
"""Read SFT files of every kind as a dump reads them: `python rows_world.py RESULT.json`.

The tokenizer is a real one, the model that it belongs to a tiny one.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_kd.nemo import cpu

cpu.install()
sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # `tests`

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import JSONLMemMapDataset
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_kd.cli.teacher import nemos_encoder
from nemo_kd.cli.teacher import read as read_settings
from nemo_kd.hf.teacher import HFTeacher
from nemo_kd.nemo.blend import blend
from nemo_kd.nemo.dataset import BlendedFileSFTDataset, MicroBatches
from nemo_kd.nemo.sft_files import file_rows, sft_arguments
from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.reader import prompt_template
from nemo_kd.sft.tokenizer import HFTokenizer
from nemo_kd.teacher.generation.prompts import Prompts
from nemo_kd.teacher.generation.step import Decoding
from nemo_kd.teacher.rows import model_of, sft_rows
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
    "not UTF-8": (lines(GOOD, '{"input": "\udcff"}'), []),
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
    "no turns": (lines(CHAT, {"system": "s"}), ["data.max_seq_length=100"]),
    "by nemo": (
        lines(CHAT, GOOD),
        ["data.chat=true", "data.reader=nemo", "data.max_seq_length=100"],
    ),
}


def read(path: Path, overrides: list[str], tokenizer: Any, model: LlamaForCausalLM) -> Any:
    """[tokens, first answer token, answer tokens, truncated] of each row, or the refusal."""
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
        rows = sft_rows(read_settings(cfg), HFTeacher(model, tokenizer), nemos_encoder())
        found = [rows[i] for i in range(len(rows))]
    except RowError as error:
        return str(error)
    return [
        [len(row), int(row.loss_mask.argmax()), int(row.loss_mask.sum()), row.truncated]
        for row in found
    ]


def grown(directory: Path, tokenizer: Any, model: LlamaForCausalLM) -> dict[str, Any]:
    """How many rows each reader finds: NeMo made an index of two, and three were added later."""
    file, chat = directory / "grown.jsonl", directory / "grown_chat.jsonl"
    for path, row in ((file, GOOD), (chat, CHAT)):
        path.write_text(lines(row, row))
        JSONLMemMapDataset([str(path)], workers=1)
        path.write_text(lines(row, row, *[{**row, "more": 1}] * 3))
    base = ["model.restore_from_path=unused", "output_dir=unused"]
    cfg = compose("dump_teacher_topk", [f"data.file_path={file}", *base])
    talk = compose("dump_teacher_topk", [f"data.file_path={chat}", "data.chat=true", *base])
    teacher = HFTeacher(model, tokenizer)
    read = [sft_rows(read_settings(each), teacher, nemos_encoder()) for each in (cfg, talk)]
    block, said = (
        OmegaConf.create({**cfg.data, "min_seq_length": 1, "memmap_workers": 7}),
        io.StringIO(),
    )
    quiet = OmegaConf.create({**cfg.data, "min_seq_length": 1, "max_seq_length": LIMIT})
    nemos = {"answer_only_loss": True, "position_embedding_type": "rope", "data": {}}
    student = SimpleNamespace(
        cfg=OmegaConf.create(nemos), tokenizer=tokenizer, sep_id=0, virtual_tokens=0
    )
    where = "model.data.train_ds"
    arguments = sft_arguments(student, block, where)
    arguments["micro_batches"] = MicroBatches(size=1, temperature=1.0)
    with redirect_stderr(said):
        file_rows(student, str(file), block, where)
    datasets = [
        BlendedFileSFTDataset(file_rows(student, str(path), block, where), **arguments)
        for path in (file, chat, directory / "1.jsonl")
    ]
    torch.distributed.init_process_group(  # NeMo's blend has a barrier
        "gloo",
        store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    train = OmegaConf.create({"global_batch_size": 4})
    blended = blend(datasets, 275, train)
    drawn = np.bincount(blended.dataset_index, minlength=3)
    decoding = Decoding(3, (1,), temperature=0.0)
    config = read_settings(cfg)
    template = prompt_template(config.data, model_of(config, teacher))
    prompts = Prompts(JsonlFile(file), template, decoding)
    try:
        refused = str(
            file_rows(student, str(file), OmegaConf.create({**block, "hf_dataset": True}), "data")
        )
    except ValueError as error:
        refused = str(error)
    try:  # before the training, not when the row is drawn
        file_rows(student, str(file), OmegaConf.create({**block, "format": "conversations"}), where)
        other = "accepted"
    except RowError as error:
        other = str(error)
    room = io.StringIO()
    with redirect_stderr(room):  # the prompts have room without generation, and not with it
        for generated in (0, LIMIT - 1):
            block = OmegaConf.create({**quiet, "tokens_to_generate": generated})
            file_rows(student, str(file), block, "model.data.validation_ds")
    return {
        "no room": room.getvalue().replace(str(file), "grown.jsonl"),
        "other format": other,
        "rows": [len(one) for one in read],
        "last rows": [len(one[4]) > 10 for one in read],
        "prompts": len(prompts),
        "training": [len(one.indexed_dataset) for one in datasets],
        "drawn": (drawn / drawn.sum()).tolist(),
        "files": sorted(path.name for path in directory.glob("grown*")),
        "said": said.getvalue(),
        "refused": refused,
    }


def main(result: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        models.tokenizer().save_pretrained(f"{directory}/tokenizer")
        tokenizer = HFTokenizer(f"{directory}/tokenizer")
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
                path.write_bytes(text.encode("utf-8", "surrogateescape"))
                found[name] = read(path, overrides, tokenizer, model)
            found["grown"] = grown(Path(directory), tokenizer, model)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
