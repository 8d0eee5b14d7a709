"""An exported model is the same model in transformers, whatever saved it and in how many parts."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from nemo_kd.checkpoints import (
    distributed,
    families,
    megatron,
    open_checkpoint,
    safetensors_file,
    write_nemo,
)
from nemo_kd.checkpoints.distributed import Slice
from nemo_kd.checkpoints.export import export, open_student
from nemo_kd.checkpoints.model import CheckpointError
from tests.checkpoints import models
from tests.conftest import ROOT
from tests.store.test_writer import contents

FAMILIES = (*models.MODELS, *models.FAMILIES, *models.ROPES)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""Python 3.11.0 to 3.11.3 have no filters."""


def built(name: str) -> PreTrainedModel:
    return models.llama(name) if name in models.MODELS else models.family(name)


def saved(model: PreTrainedModel, directory: Path) -> Path:
    """The model and a tokenizer with a chat template, as `save_pretrained` writes them."""
    model.save_pretrained(directory)
    tokenizer = models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def converted(source: Path, layers: Sequence[int] | None = None) -> Path:
    """`source` as a `.nemo` beside it."""
    checkpoint = open_checkpoint(source)
    kept = range(checkpoint.model.num_layers) if layers is None else layers
    return write_nemo(checkpoint, source.with_suffix(".nemo"), kept).path


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def config(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return loaded


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    """Of transformers, `[S, V]`."""
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    ids = models.tokenizer()(models.TEXT[:200], return_tensors="pt").input_ids
    found: torch.Tensor = model.eval()(ids).logits[0]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_round_trip_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    model = built(name)
    if name in ("untied_llama3", "phi3", "mixtral"):
        model = model.bfloat16()
    source = saved(model, tmp_path / "source")
    output = export(open_student(converted(source)), tmp_path / "out").path
    assert_equal(tensors(output), tensors(source))
    assert config(output) == config(source)
    assert torch.equal(logits(output), logits(source))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer(models.TEXT).input_ids == models.tokenizer()(models.TEXT).input_ids
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ({"eos_token_id": [1, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": True}, [1, 7]),
        ({"eos_token_id": 7, "max_length": 50}, [1, 7]),
        ({"bos_token_id": 0}, 1),
        (None, 1),
    ],
)
def test_generation_ends_as_before_and_at_the_tokenizers_end(
    tmp_path: Path, given: dict[str, Any] | None, ends: int | list[int]
) -> None:
    """Never at the end of the configuration's class, 2 of a Llama, an ordinary token here."""
    source = saved(models.llama("tied_grouped"), tmp_path / "source")
    settings = config(source)
    for key in ("bos_token_id", "eos_token_id"):
        del settings[key]
    (source / "config.json").write_text(json.dumps(settings))
    (source / "generation_config.json").unlink()
    if given is not None:
        (source / "generation_config.json").write_text(json.dumps(given))
    output = export(open_student(converted(source)), tmp_path / "out").path
    found = json.loads((output / "generation_config.json").read_text())
    if given is None:
        given = {"bos_token_id": 0, "pad_token_id": 1}
    assert found == given | {"eos_token_id": ends}
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.generation_config.eos_token_id == ends


def test_an_unpacked_nemo_and_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(models.llama("untied_llama3"), tmp_path / "source")
    with tarfile.open(converted(source)) as archive:
        archive.extractall(tmp_path / "unpacked", **SAFELY)
    monkeypatch.setattr(
        safetensors_file.shards_of, "__defaults__", (safetensors_file.SINGLE, 100_000)
    )
    output = export(open_student(tmp_path / "unpacked"), tmp_path / "out").path
    files = sorted(output.glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size < 110_000 for path in files[1:])
    assert_equal(tensors(output), tensors(source))
    assert torch.equal(logits(output), logits(source))


def test_a_pruned_model_has_the_settings_of_its_layers(tmp_path: Path) -> None:
    """Of four layers every second has a window in Qwen 3's `layer_types`."""
    model = models.family("qwen3")
    source = saved(model, tmp_path / "source")
    kinds = ["full_attention"] * 4
    settings = config(source) | {"layer_types": kinds}
    (source / "config.json").write_text(json.dumps(settings))
    output = export(open_student(converted(source, [0, 3])), tmp_path / "out").path
    assert config(output) == settings | {"num_hidden_layers": 2, "layer_types": kinds[:2]}
    wanted = tensors(source)
    kept = {"model.layers.0.": "model.layers.0.", "model.layers.1.": "model.layers.3."}
    for name, tensor in tensors(output).items():
        for new, old in kept.items():
            name = name.replace(new, old) if name.startswith(new) else name
        assert torch.equal(tensor, wanted[name]), name
    assert len(tensors(output)) == len(wanted) - 2 * 11
    assert "2 of 4: 0, 3" in (output / "README.md").read_text()


def write_megatron(source: Path, directory: Path, rows: int) -> None:
    """Megatron-core's names, a padded vocabulary and an optimizer's state."""
    checkpoint = open_checkpoint(source)
    parts = []
    for one in megatron.slices(checkpoint, range(checkpoint.model.num_layers), torch.float32):
        key, shape, read = one.key.removeprefix("model."), one.shape, one.read
        if shape[0] == checkpoint.model.vocab_size:
            shape = (rows, *shape[1:])
            read = padded(one, rows)
        parts.append(Slice(key, shape, one.dtype, read, one.at))
        parts.append(Slice(f"optimizer.state.exp_avg.{key}", shape, one.dtype, read, one.at))
    distributed.write(parts, [], directory)


def padded(one: Slice, rows: int) -> Any:
    return lambda: torch.nn.functional.pad(one.read(), (0, 0, 0, rows - one.shape[0]), value=7.0)


def test_a_checkpoint_of_megatron_core_takes_settings_and_tokenizer_from_its_base(
    tmp_path: Path,
) -> None:
    source = saved(models.llama("untied_llama3"), tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": 5, "top_k": 7}')
    write_megatron(source, tmp_path / "run/iter_0000010", rows=384)
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(CheckpointError, match="give --base"):
        open_student(tmp_path / "run")
    output = export(open_student(tmp_path / "run", base=source), tmp_path / "out").path
    wanted = tensors(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted[name] = wanted[name][: models.TOKENS]
    assert_equal(tensors(output), wanted)
    assert config(output) == config(source) | {"vocab_size": models.TOKENS}
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["top_k"] == 7 and generation["eos_token_id"] == [1, 5]
    other = saved(models.llama("tied_grouped"), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"linear_qkv\.weight has shape"):
        open_student(tmp_path / "run", base=other)


ARGUMENTS: dict[str, Any] = {  # of tied_grouped
    "num_layers": 4,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "norm_epsilon": 1e-3,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "window_size": None,
    "max_position_embeddings": 4096,
    "num_experts": None,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "sinkhorn",  # not read without experts
}


TRAINING: dict[str, Any] = {  # what does not change the exported model
    "encoder_num_layers": 4,  # as Megatron-LM sets it
    "retro_attention_gate": 1,
    "attention_dropout": 0.1,
    "attention_backend": "flash",
    "recompute_granularity": "full",
    "loss_scale_window": 1000,
    "mtp_loss_scaling_factor": 0.1,
    "lr_of_next_year": 3,
    "fp8": "hybrid",
    "fp32_residual_connection": True,
    "rope_type": "rope",
    "softmax_type": "vanilla",
    "use_rotary_position_embeddings": True,
}


@pytest.fixture(scope="module")
def megatron_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source/` and `iter_0000010/`, the same model as Megatron-core saves it."""
    return as_megatron(models.llama("tied_grouped"), tmp_path_factory.mktemp("megatron"))


def as_megatron(model: Any, directory: Path) -> Path:
    source = saved(model, directory / "source")
    write_megatron(source, directory / "iter_0000010", rows=384)
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"rotary_base": 500}, r"rotary_base=500, but .* computes with 10000\.0"),
        ({"norm_epsilon": 1e-5}, "layernorm_epsilon=1e-05"),
        ({"use_rope_scaling": True}, "use_rope_scaling=True"),
        ({"rotary_percent": 0.5}, r"rotary_percent=0\.5"),
        ({"window_size": [15, 0]}, r"window_size=\(15, 0\), but .* computes with None"),
        ({"swiglu": False}, "swiglu=False"),
        ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma=True"),
        ({"position_embedding_type": "none"}, "position_embedding_type='none'"),
        ({"qk_l2_norm": True}, "had qk_l2_norm=True, which no config.json of a LlamaForCausalLM"),
        ({"no_rope_freq": 4}, "no_rope_freq=4, which no"),
        ({"softmax_type": "off-by-one"}, "softmax_type='off-by-one'"),
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value=7.0"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset=1.0"),
        ({"use_mup": True}, "use_mup=True"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
        ({"rope_type": "yarn"}, "rope_type='yarn'"),
        ({"window_attn_skip_freq": 2}, "window_attn_skip_freq=2"),
        ({"attention_of_next_year": 3}, "attention_of_next_year=3"),
        (TRAINING, None),
        ({"moe_layer_freq": 2, "moe_router_score_function": "sigmoid"}, None),  # no experts
    ],
)
def test_arguments_of_a_training_that_its_base_does_not_have_are_refused(
    changes: dict[str, Any],
    message: str | None,
    megatron_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(megatron_run / "iter_0000010", tmp_path / "run")
    state = {"args": argparse.Namespace(**{**ARGUMENTS, **changes})}
    torch.save(state, tmp_path / "run/common.pt")
    if message is None:
        open_student(tmp_path / "run", base=megatron_run / "source")
    else:
        with pytest.raises(CheckpointError, match=message):
            open_student(tmp_path / "run", base=megatron_run / "source")
    assert capsys.readouterr().err == ""


MIXTURE: dict[str, Any] = {
    **{**ARGUMENTS, "num_layers": 2, "num_experts": 4, "rotary_base": 1000000},
    "moe_router_load_balancing_type": "aux_loss",
    "moe_layer_freq": [1, 1],
}


@pytest.fixture(scope="module")
def mixture_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `megatron_run`, of a mixture of experts."""
    return as_megatron(models.family("mixtral"), tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_layer_freq": 2},
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_topk_scaling_factor": 2.5},
        {"moe_router_num_groups": 2},
        {"moe_expert_capacity_factor": 1.0},
        {"moe_apply_probs_on_input": True},
    ],
)
def test_a_router_that_its_base_does_not_have_is_refused(
    changes: dict[str, Any], mixture_run: Path
) -> None:
    state = {"args": argparse.Namespace(**{**MIXTURE, **changes})}
    torch.save(state, mixture_run / "iter_0000010/common.pt")
    if not changes:
        open_student(mixture_run / "iter_0000010", base=mixture_run / "source")
        return
    ((key, value),) = changes.items()
    with pytest.raises(CheckpointError, match=f"its training had {key}={value!r}, "):
        open_student(mixture_run / "iter_0000010", base=mixture_run / "source")


def test_a_checkpoint_without_arguments_is_exported_with_a_line(
    megatron_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_student(megatron_run / "iter_0000010", base=megatron_run / "source")
    assert "has no arguments of its training: its settings cannot be" in capsys.readouterr().err


def changed(nemo: Path, directory: Path, **settings: Any) -> Path:
    """The `.nemo` unpacked, with other settings."""
    with tarfile.open(nemo) as archive:
        archive.extractall(directory, **SAFELY)
    path = directory / "model_config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))
    return directory


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rope": ({"rotary_base": 1234.0}, r"model\.rotary_base is 1234\.0"),
    "interpolation": ({"seq_len_interpolation_factor": 2}, "seq_len_interpolation_factor is 2"),
    "epsilon": ({"layernorm_epsilon": 0.1}, r"layernorm_epsilon is 0\.1"),
    "activation": ({"activation": "gelu"}, "activation is 'gelu'"),
    "window": ({"window_size": [15, 0]}, "window_size is"),
    "scale": ({"softmax_scale": 2.0}, "softmax_scale is"),
    "fraction": ({"rotary_percentage": 0.5}, r"rotary_percentage is 0\.5"),
    "gemma": ({"apply_embedding_scaling": True}, "apply_embedding_scaling is True"),
    "layers": ({"num_layers": 3}, "num_layers is 3"),
    "untied": ({"share_embeddings_and_output_weights": False}, "output_weights is False"),
    "clamp": ({"activation_func_clamp_value": 3.0}, "activation_func_clamp_value is 3"),
    "norm": ({"qk_l2_norm": True}, "qk_l2_norm is True, which no config.json of a Llama"),
    "sink": ({"softmax_type": "learnable"}, "softmax_type is 'learnable', which no"),
    "no record": ({"converted_from": "abc"}, r"converted_from: Expected `object`"),
    "record": ({"converted_from": {"checkpoint": "a"}}, "missing required field `layers`"),
    "learned": ({"converted_from": None, "position_embedding_type": None}, "learned_absolute"),
    "layernorm": ({"converted_from": None, "normalization": "layernorm1p"}, "layernorm1p"),
    "tokenizer": ({"tokenizer": {"library": "megatron"}}, "'megatron', which is not converted"),
    "no tokenizer": ({"tokenizer": None}, "--tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_changes_the_model_is_refused_by_its_name(
    plain: Path, tmp_path: Path, case: str
) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        open_student(changed(plain, tmp_path / "changed", **settings))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    return converted(saved(models.llama("tied_grouped"), directory / "source"))


def test_a_router_that_a_training_changed_is_refused_and_a_balancing_loss_is_not(
    tmp_path: Path,
) -> None:
    source = saved(models.family("mixtral"), tmp_path / "source")
    nemo, key = converted(source), "moe_router_load_balancing_type"
    with pytest.raises(CheckpointError, match=rf"model\.{key} is 'sinkhorn'"):
        open_student(changed(nemo, tmp_path / "sinkhorn", **{key: "sinkhorn"}))
    other = changed(nemo, tmp_path / "other", **{key: ["seq_aux_loss", "global_aux_loss"]})
    output = export(open_student(other), tmp_path / "out").path
    assert torch.equal(logits(output), logits(source))


def test_a_llama_without_its_config_json_is_described_by_nemos_settings(
    plain: Path, tmp_path: Path
) -> None:
    nemo = changed(plain, tmp_path / "changed", converted_from=None)
    output = export(open_student(nemo), tmp_path / "out").path
    wanted = logits(plain.parent / "source")[:, : models.TOKENS]
    torch.testing.assert_close(logits(output)[:, : models.TOKENS], wanted, rtol=0, atol=1e-5)


def test_what_is_no_checkpoint_is_refused(plain: Path, tmp_path: Path) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text.nemo"
    empty.mkdir()
    text.write_text("text")
    for path in (empty, text, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"expected a \.nemo"):
            open_student(path)
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        open_student(plain, base=empty)
    bare = changed(plain, tmp_path / "bare")
    shutil.rmtree(bare / "model_weights")
    with pytest.raises(CheckpointError, match=r"has no model_weights/, and adapters neither"):
        open_student(bare)


def test_a_tokenizer_without_ids_for_trained_rows_is_refused(plain: Path, tmp_path: Path) -> None:
    smaller = Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    directory = tmp_path / "smaller"
    PreTrainedTokenizerFast(tokenizer_object=smaller).save_pretrained(directory)
    with pytest.raises(CheckpointError, match="largest id is 1, but the model was trained with"):
        open_student(plain, tokenizer=directory)


def test_only_what_an_export_wrote_is_replaced(plain: Path, tmp_path: Path) -> None:
    student, output = open_student(plain), tmp_path / "out"
    export(student, output)
    before = contents(output)
    with pytest.raises(CheckpointError, match="already exists; use --overwrite"):
        export(student, output)
    export(student, output, dtype=torch.bfloat16, overwrite=True)
    assert contents(output) != before
    assert config(output)["torch_dtype"] == "bfloat16"
    card = output / "README.md"
    text = card.read_text()
    card.write_text(text + "\nLicence: Apache 2.0\n")
    with pytest.raises(CheckpointError, match=r"README\.md was changed since the export wrote it"):
        export(student, output, overwrite=True)
    card.write_text(text)
    (output / "mine").write_text("mine")
    before = contents(output)
    with pytest.raises(CheckpointError, match="mine was not written by an export"):
        export(student, output, overwrite=True)
    foreign = plain.parent / "source"  # written by transformers
    with pytest.raises(CheckpointError, match="was not written by an export"):
        export(student, foreign, overwrite=True)
    assert contents(output) == before and not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
from nemo_kd.checkpoints.export import export, open_student
kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > total / 2 else None
export(open_student(sys.argv[1]), sys.argv[2], overwrite=True, progress=kill)
"""


def test_a_killed_export_leaves_the_old_one_and_the_next_cleans_up(
    plain: Path, tmp_path: Path
) -> None:
    output = export(open_student(plain), tmp_path / "out", dtype=torch.bfloat16).path
    before = contents(output)
    command = [sys.executable, "-c", KILLED, str(plain), str(output)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert contents(output) == before
    export(open_student(plain), output, overwrite=True)
    assert contents(output) != before
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_the_page_lists_the_families() -> None:
    listed = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \|$", (ROOT / "docs/checkpoints.md").read_text(), re.M
    )
    assert listed == [(name, family.model_type) for name, family in families.FAMILIES.items()]


def test_values_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = models.llama("tied_grouped")
    model.state_dict()["model.layers.2.mlp.down_proj.weight"][0, 0] = 1e6
    nemo = converted(saved(model, tmp_path / "source"))
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj\.weight has .* infinite"):
        export(open_student(nemo), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_settings_of_transformers_5_are_written_for_4_as_well(tmp_path: Path) -> None:
    source = saved(models.llama("untied_llama3"), tmp_path / "source")
    wanted, settings = logits(source), config(source)
    rope = settings.pop("rope_scaling") | {"rope_theta": settings.pop("rope_theta")}
    settings |= {"rope_parameters": rope, "dtype": settings.pop("torch_dtype")}
    (source / "config.json").write_text(json.dumps(settings))
    assert (logits(source) - wanted).abs().max() > 0.1  # transformers 4 does not read them
    output = export(open_student(converted(source)), tmp_path / "out").path
    assert torch.equal(logits(output), wanted)
    assert config(output)["rope_parameters"] == rope


def test_a_gguf_becomes_a_hugging_face_directory(tmp_path: Path) -> None:
    model = models.llama("tied_grouped")
    path = models.write_gguf(model, tmp_path / "model.gguf")
    nemo = write_nemo(open_checkpoint(path), tmp_path / "model.nemo", range(4)).path
    output = export(open_student(nemo), tmp_path / "out").path
    saved(model, tmp_path / "source")
    assert_equal(tensors(output), tensors(tmp_path / "source"))
    assert torch.equal(logits(output), logits(tmp_path / "source"))


def test_a_lost_tokenizer_is_found_by_its_hash_in_a_nemo_beside_the_checkpoint(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training's checkpoint names a temporary copy, which is gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    nemo = changed(plain, tmp_path / "run/checkpoint")
    path = nemo / "model_config.yaml"
    section = yaml.safe_load(path.read_text())
    (copy,) = nemo.glob("*_tokenizer.zip")
    copy.unlink()
    gone = {"type": "/gone/model.tokenizer", "model": f"/gone/{copy.name}"}
    path.write_text(yaml.safe_dump(section | {"tokenizer": section["tokenizer"] | gone}))
    with pytest.raises(CheckpointError, match=r"model\.tokenizer is gone.*--tokenizer"):
        open_student(nemo)
    (nemo.parent / "student.nemo").symlink_to(plain)
    assert open_student(nemo).tokenizer.chat_template == TEMPLATE
