"""What a teacher's logits may depend on: real models of transformers, before the first shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nemo_kd.cli.teacher import read
from nemo_kd.hf.teacher import HFTeacher
from nemo_kd.sft.tokenizer import HFTokenizer
from nemo_kd.store import Store
from nemo_kd.teacher.checks import TeacherError
from nemo_kd.teacher.dump import dump
from tests.checkpoints import models
from tests.teacher.test_hf import configuration

SIZES = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"initializer_range": 0.3, "pad_token_id": 0},
}
LENGTHS = (20, 31, 45, 59, 60, 77, 95, 96, 97, 130, 130, 131)
LONG = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64}
BERT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
XLNET = {"vocab_size": 300, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    models.tokenizer().save_pretrained(path)
    return HFTokenizer(path)


def model(family: str, **settings: Any) -> Any:
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**settings)
    made: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return made.eval().requires_grad_(False)


def dumped(teacher: HFTeacher, directory: Path, *settings: str) -> Store:
    """Dump rows of `LENGTHS` tokens, all in one micro-batch if the teacher allows it."""
    rows = [{"input": "", "output": "x y"[: 1 + n % 3] + " " * (n % 2) + "z" * n} for n in LENGTHS]
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = configuration(
        *("teacher.kind=hf", "model.restore_from_path=x", "data.max_seq_length=256"),
        *("data.prompt_template='{input}{output}'", "dump.top_k=20", "trainer.precision=32"),
        *("model.micro_batch_size=12", "rows_per_shard=64", *settings),
    )
    cfg.data.file_path, cfg.output_dir = str(path), str(directory / "store")
    teacher.identity = {"name": "tiny"}  # type: ignore[assignment]
    dump(read(cfg), teacher)
    return Store(directory / "store")


@torch.no_grad()
def assert_as_alone(store: Store, original: Any) -> None:
    """The logits are those of a fresh copy of the model for each row, run alone."""
    assert len({len(sample.input_ids) for sample in store}) > 5
    for sample in store:
        fresh = type(original)(original.config).eval()
        fresh.load_state_dict(original.state_dict())
        ids = torch.tensor(sample.input_ids[:-1])[None].long()
        expected = fresh(ids).logits[0, sample.answer_positions() - 1, :299].numpy()
        kept = np.take_along_axis(expected, sample.topk.ids, 1)
        assert np.abs(kept - sample.topk.logits).max() < 2**-6  # float16


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {}),
        ("Phi3", LONG),
        ("Llama", DYNAMIC),
        ("Gemma2", {"attn_logit_softcapping": 2.0, "sliding_window": 16, "head_dim": 8}),
        ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
        ("Bert", {**dict.fromkeys(["num_key_value_heads"], None), "is_decoder": True}),
    ],
)
def test_every_row_has_the_logits_that_it_has_alone(
    family: str, settings: dict[str, Any], tokenizer: HFTokenizer, tmp_path: Path, capsys: Any
) -> None:
    original = model(family, **SIZES | settings)
    teacher = HFTeacher(original, tokenizer)
    assert_as_alone(dumped(teacher, tmp_path), original)
    assert "teacher's logits" not in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_rounding_is_no_dependence(
    precision: str, tokenizer: HFTokenizer, tmp_path: Path, capsys: Any
) -> None:
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}[precision]
    teacher = HFTeacher(model("Llama", **SIZES).to(dtype), tokenizer)
    dumped(teacher, tmp_path, f"trainer.precision={precision}")
    assert "teacher's logits" not in capsys.readouterr().err


@pytest.mark.parametrize(("family", "settings"), [("Bert", BERT), ("XLNet", XLNET)])
def test_a_model_that_sees_later_tokens_is_refused(
    family: str, settings: dict[str, Any], tokenizer: HFTokenizer, tmp_path: Path
) -> None:
    teacher = HFTeacher(model(family, **settings), tokenizer)
    with pytest.raises(TeacherError, match=r"change with later tokens \(row 11, other tokens from"):
        dumped(teacher, tmp_path)


def test_dropout_is_refused(tokenizer: HFTokenizer, tmp_path: Path) -> None:
    teacher = HFTeacher(model("Llama", **SIZES, attention_dropout=0.1).train(), tokenizer)
    with pytest.raises(TeacherError, match="change from one pass to the next"):
        dumped(teacher, tmp_path)


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (lambda tokens: 1 + tokens.shape[1] / 30, "rows run with rows of their own length"),
        (lambda tokens: 1 + len(tokens), "each row runs alone"),
    ],
)
def test_rows_run_in_company_that_does_not_change_them(
    scale: Any, said: str, tokenizer: HFTokenizer, tmp_path: Path, capsys: Any
) -> None:
    original = model("Llama", **SIZES)
    original.model.embed_tokens.register_forward_hook(
        lambda _, given, output: output * scale(given[0])
    )
    teacher = HFTeacher(original, tokenizer)
    store = dumped(teacher, tmp_path)
    assert said in capsys.readouterr().err
    for sample in store:
        ids = torch.tensor(sample.input_ids[:-1])[None].long()
        expected = original(ids).logits[0, sample.answer_positions() - 1, :299].numpy()
        kept = np.take_along_axis(expected, sample.topk.ids, 1)
        assert np.abs(kept - sample.topk.logits).max() < 2**-5
