"""Hugging Face teachers: the model's own logits, at answer positions only, in the same store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir

from nemo_kd.cli.teacher import check_kind, read
from nemo_kd.hf.split import HFTeacherError, SplitModel
from nemo_kd.store import Store, StoreWriter
from nemo_kd.store.tools.verify import verify
from tests.conftest import ROOT, Script
from tests.runs import metrics
from tests.teacher.conftest import SETTINGS

TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**TINY, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
# Each does something else with its last hidden states, or is built in another way.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Gemma2": {**LLAMA, "head_dim": 8, "final_logit_softcapping": 2.0},
    "Granite": {**LLAMA, "logits_scaling": 8.0},
    "Cohere": {**LLAMA, "logit_scale": 0.0625},
    "Phi": LLAMA,  # a bias in the LM head
    "Mixtral": {**LLAMA, "num_local_experts": 4, "output_router_logits": True},
    "GPT2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoX": {**TINY, "intermediate_size": 48},
    "OPT": {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "Bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mamba": {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def tiny_model(name: str, **more: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    spread = {"init_std" if name == "OPT" else "initializer_range": 0.3}
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name], **spread, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)  # biases and norms that can be seen
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_halves_make_the_models_own_logits(name: str) -> None:
    model = tiny_model(name)
    split = SplitModel(model)
    assert split.check() == 61
    tokens = torch.randint(0, 61, (2, 23), generator=torch.Generator().manual_seed(0))
    # Right padding, as the dump pads: the first row is 9 tokens shorter.
    padded = tokens.clone()
    padded[0, 14:] = 0
    output = split.hidden(padded)
    for b, length in enumerate((14, 23)):
        expected = model(tokens[b : b + 1, :length]).logits[0]
        some = torch.tensor([1, 5, 6, length - 1])
        actual = split.logits(output, output.last_hidden_state[b, some])
        assert expected.abs().max() > 0.1
        assert torch.allclose(actual, expected[some], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(padded).logits, model(padded).logits)  # both halves restored


def test_a_model_whose_halves_do_not_give_its_logits_is_refused() -> None:
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
            output = super().forward(input_ids, **more)
            output.logits = output.logits + self.model.embed_tokens(input_ids).sum(-1, keepdim=True)
            return output

    model = Odd(transformers.LlamaConfig(**LLAMA, initializer_range=0.3)).eval()
    with pytest.raises(HFTeacherError, match="Odd does not compute its logits from the last"):
        SplitModel(model).check()


def test_the_converted_teacher_has_the_same_ids_and_logits(world: Path) -> None:
    figures = json.loads((world / "parity.json").read_text())
    assert figures["tokens"] > 500 and figures["largest_logit"] > 1
    assert figures["samples_equal"] and figures["ids_equal"]
    assert figures["logits"] < 1e-4 and figures["logsumexp"] < 1e-4
    assert figures["store_fits_the_converted_student"]


@pytest.mark.parametrize("store", ["gap_hf", "gap_nemo"])
@torch.no_grad()
def test_a_token_beyond_a_gap_of_the_ids_keeps_its_logit(world: Path, store: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        world / "gap", torch_dtype=torch.float64
    )
    found = Store(world / store)
    assert found.spec.vocab_size == 351  # its end of sequence is 350; the model has 360 rows
    for sample in found:
        assert sample.input_ids[-1] == 350
        logits = model(torch.tensor(sample.input_ids)[None].long()).logits[0, :, :351]
        expected = logits[sample.answer_positions() - 1].numpy()
        kept = np.take_along_axis(expected, sample.topk.ids, 1)
        assert (sample.topk.ids == 350).any(1).all()
        assert np.abs(kept - sample.topk.logits).max() < 2**-6  # float16
        logsumexp = np.log(np.exp(expected).sum(1))
        assert np.abs(logsumexp - sample.topk.logsumexp[:, 0]).max() < 1e-4


def test_a_tokenizer_beyond_the_rows_of_a_nemo_is_refused(world: Path) -> None:
    said = (world / "cut.txt").read_text()
    assert "the tokenizer's largest id is 350, but the embedding has 300 rows" in said


def test_another_tokenizer_is_refused_by_its_first_other_token(world: Path) -> None:
    renamed, longer, unknown = json.loads((world / "parity.json").read_text())["differences"]
    assert renamed == "; the first difference is id 1: '<end>' in the store, '</s>' here"
    assert longer == "; the store's has 300 tokens, this one 299, and the first 299 are equal"
    assert unknown == ""


@pytest.mark.slow
def test_a_nemo_student_trains_on_the_stores(world: Path, script: Script, tmp_path: Path) -> None:
    """On a dump by transformers, and on generated answers."""
    for store, student in (("store", "llama"), ("answers", "typist")):
        script(
            "train_gpt_sft_kd.py",
            f"model.restore_from_path={world}/{student}.nemo",
            f"model.data.train_ds.store={world}/{store}",
            f"exp_manager.explicit_log_dir={tmp_path}/{store}",
            "exp_manager.checkpoint_callback_params.save_top_k=0",
            "trainer.precision=32",
            "trainer.max_steps=3",
            "trainer.enable_progress_bar=false",
            "model.global_batch_size=2",
            "model.micro_batch_size=1",
            "model.data.train_ds.max_seq_length=128",
            "model.optim.lr=0.001",
            "model.optim.sched.warmup_steps=1",
            "model.kd.alpha=1",
        )
        first = metrics(tmp_path / store)[0]
        # The student is the teacher: nothing is to learn but float16's rounding.
        assert abs(first["reduced_train_loss"]) < 1e-3, first


def same_files(a: Path, b: Path) -> None:
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert len(files) > 5
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def test_rows_without_an_answer_are_left_out_if_asked(world: Path) -> None:
    assert [sample.row for sample in Store(world / "gaps")] == [0, 1, 3, 8]
    assert not list(verify(world / "gaps"))
    assert "left out: 5 rows without an answer token" in (world / "gaps.txt").read_text()


def test_two_ranks_write_the_same_bytes_as_one_and_resume(
    world: Path, script: Script, tmp_path: Path
) -> None:
    store, whole = tmp_path / "store", Store(world / "store")
    with StoreWriter(store, replace(whole.spec, rows_per_shard=4)).shard(1) as out:
        for index in range(len(whole)):
            tokens, arrays = whole.part(0).encoded(index)
            if tokens.row // 4 == 1:
                out.add_encoded(tokens, arrays)
    settings = [*SETTINGS, "teacher.kind=hf", f"output_dir={store}"]
    paths = [f"model.restore_from_path={world}/llama", f"data.file_path={world}/train.jsonl"]
    done = script("dump_teacher_topk.py", *settings, *paths, processes=2)
    assert "this run: 5 rows" in done.stdout
    same_files(world / "store", store)


def test_a_gguf_file_gives_what_the_directory_gives(world: Path) -> None:
    compared = 0
    for a, b in zip(Store(world / "store"), Store(world / "gguf_store"), strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        # The file's vocabulary has one token more, which may push out the last of the K.
        for ids, logits, theirs, their_logits in zip(
            a.topk.ids, a.topk.logits, b.topk.ids, b.topk.logits, strict=True
        ):
            common, here, there = np.intersect1d(ids, theirs, return_indices=True)
            assert len(common) >= len(ids) - 1
            assert np.abs(logits[here] - their_logits[there]).max() < 2**-6  # float16
            compared += len(common)
    assert compared > 5000


def configuration(*overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("dump_teacher_topk", [*overrides, "data.file_path=x", "output_dir=y"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("teacher.kind=huggingface", "expected one of nemo, hf"),
        ("teacher.kind=hf model.tensor_model_parallel_size=2", "only data parallelism works"),
        ("teacher.kind=hf model.pipeline_model_parallel_size=4", "only data parallelism works"),
        ("teacher.kind=hf model.sequence_parallel=true", "only data parallelism works"),
        ("+model.context_parallel_size=2", "needs no context parallelism"),
        ("teacher.kind=hf model.restore_from_path=a.nemo", "set teacher.kind=nemo"),
        ("model.restore_from_path=a.gguf", "set teacher.kind=hf"),
        ("jsonl=true dump.profile=sampled", "cannot record that its ids are draws"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_kind(read(configuration("model.restore_from_path=llama", *overrides.split())))


def test_unusable_checkpoints_are_refused(world: Path) -> None:
    refusals = json.loads((world / "refusals.json").read_text())
    assert "lacks 1 of the model's tensors, such as lm_head.weight" in refusals["headless"]
    assert "the tokenizer's largest id is 298, but the model has 61 logits" in refusals["small"]
    assert "set data.max_seq_length=128 or less" in refusals["long"]
    assert "no checkpoint at" in refusals["nowhere"]
    assert "transformers does not load" in refusals["empty"]
    assert "trainer.precision is 8" in refusals["precision"]
