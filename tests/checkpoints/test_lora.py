"""LoRA adapters of NeMo, merged and for PEFT, give the logits of transformers' weights with B A."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nemo_kd.checkpoints.config_json import read_model
from nemo_kd.checkpoints.export import export, open_student
from nemo_kd.checkpoints.families import by_query_group
from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.checkpoints.peft import export_adapters
from nemo_kd.cli import export as cli
from tests.checkpoints import models
from tests.checkpoints.test_export import SAFELY, converted, logits, saved, tensors

DIM, ALPHA = 3, 5
BLOCKS = {
    "self_attention.adapter_layer.lora_kqv_adapter": ("self_attn", ("q", "k", "v")),
    "self_attention.adapter_layer.lora_dense_attention_adapter": ("self_attn", ("o",)),
    "mlp.adapter_layer.lora_hto4h_adapter": ("mlp", ("gate", "up")),
    "mlp.adapter_layer.lora_4htoh_adapter": ("mlp", ("down",)),
}
INPUT_IS_PARALLEL = ("lora_dense_attention_adapter", "lora_4htoh_adapter")
State = dict[str, torch.Tensor]


def adapted(model: Any, layers: Sequence[int]) -> tuple[State, State]:
    """NeMo's state of random adapters, at one rank, and transformers' weights with B A added."""
    torch.manual_seed(3)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = read_model(model.config.to_dict())
    state: State = {}
    for layer in layers:
        for adapter, (block, names) in BLOCKS.items():
            keys = [f"model.layers.{layer}.{block}.{name}_proj.weight" for name in names]
            a = torch.randn(DIM, weights[keys[0]].shape[1])
            parts = [torch.randn(weights[key].shape[0], DIM) * 0.1 for key in keys]
            for key, b in zip(keys, parts, strict=True):
                weights[key] += ALPHA / DIM * (b @ a)
            joined = by_query_group(parts, sizes) if len(parts) == 3 else torch.cat(parts)
            state[f"model.decoder.layers.{layer}.{adapter}.linear_in.weight"] = a
            state[f"model.decoder.layers.{layer}.{adapter}.linear_out.weight"] = joined
    return state, weights


def divided(state: State, tensor: int, stages: int, layers: int) -> dict[str, State]:
    """The state of each rank, under NeMo's names of their folders."""
    ranks: dict[str, State] = {}
    for key, value in state.items():
        layer, rest = key.removeprefix("model.decoder.layers.").split(".", 1)
        stage, local = divmod(int(layer), layers // stages)
        rows = value.chunk(tensor)
        if "linear_in" in key and any(name in key for name in INPUT_IS_PARALLEL):
            rows = value.chunk(tensor, dim=1)
        if "lora_hto4h_adapter.linear_out" in key:  # each rank: its gate above its up
            gate, up = (half.chunk(tensor) for half in value.chunk(2))
            rows = tuple(torch.cat(pair) for pair in zip(gate, up, strict=True))
        for rank, part in enumerate(rows):
            folder = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/" if stages > 1 else ""
            folder = folder or (f"mp_rank_{rank:02d}/" if tensor > 1 else "")
            ranks.setdefault(folder, {})[f"model.decoder.layers.{local}.{rest}"] = part
    return ranks


def write_adapters(base: Path, path: Path, ranks: dict[str, State], **settings: Any) -> Path:
    """A `.nemo` of adapters, as NeMo saves them, with the configuration of the model `base`."""
    lora = {"adapter_dim": DIM, "alpha": ALPHA, "variant": "nemo", **settings.pop("lora", {})}
    peft = {"peft_scheme": "lora", "lora_tuning": lora}
    own = {"restore_from_path": str(base), "peft": peft}
    rewrite(base, path, weights=False, **{**own, **settings})
    with tarfile.open(path, "a:") as target:
        for folder, state in ranks.items():
            buffer = io.BytesIO()
            torch.save(state, buffer)
            add(target, f"./{folder}model_weights.ckpt", buffer.getvalue())
    return path


def rewrite(base: Path, path: Path, *, weights: bool = True, **settings: Any) -> Path:
    """The model `base` with other settings, or its settings without its weights."""
    with tarfile.open(base) as archive, tarfile.open(path, "w:") as target:
        for member in archive:
            if member.isfile() and (weights or "model_weights" not in member.name):
                data = archive.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith("model_config.yaml"):
                    data = yaml.safe_dump({**yaml.safe_load(data), **settings}).encode()
                add(target, member.name, data)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@torch.no_grad()
def expected(source: Path, weights: State) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32).eval()
    model.load_state_dict(weights)
    ids = models.tokenizer()(models.TEXT[:200], return_tensors="pt").input_ids
    found: torch.Tensor = model(ids).logits[0]
    return found


@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("layers", [range(4), [1, 2]])
def test_merged_and_by_peft_they_give_the_same_logits(
    tmp_path: Path, tensor: int, stages: int, layers: Sequence[int]
) -> None:
    model = models.llama("tied_grouped")
    source = saved(model, tmp_path / "source")
    nemo = converted(source)
    state, weights = adapted(model, layers)
    wanted = expected(source, weights)
    assert (wanted - logits(source)).abs().max() > 0.1  # the comparison can fail
    settings = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": stages}
    adapters = write_adapters(
        nemo, tmp_path / "adapters.nemo", divided(state, tensor, stages, 4), **settings
    )
    merged = export(open_student(adapters, base_model=nemo), tmp_path / "merged").path
    close(logits(merged), wanted[:, : models.TOKENS])
    export_adapters(adapters, tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
    ids = models.tokenizer()(models.TEXT[:200], return_tensors="pt").input_ids
    with torch.no_grad():
        close(by_peft(ids).logits[0], wanted)


def test_a_merge_into_bfloat16_is_rounded_once_when_it_is_written(tmp_path: Path) -> None:
    model = models.llama("tied_grouped").bfloat16()
    nemo = converted(saved(model, tmp_path / "source"))
    state, wanted = adapted(model.float(), range(4))
    adapters = write_adapters(nemo, tmp_path / "adapters.nemo", {"": state})
    for dtype in (torch.float32, torch.bfloat16):
        student = open_student(adapters, base_model=nemo)
        found = tensors(export(student, tmp_path / str(dtype), dtype=dtype).path)
        for name, tensor in found.items():
            rows = wanted[name][: len(tensor)]
            # Float32's error of B A and the sum, before the one rounding.
            error = (tensor.double() - rows.double()).abs() - 1e-5
            assert tensor.dtype == dtype
            assert (error <= torch.finfo(dtype).eps / 2 * rows.double().abs()).all(), name
    exported = tensors(export(open_student(adapters, base_model=nemo), tmp_path / "own").path)
    assert all(torch.equal(exported[name], found[name]) for name in found)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Float32 sums in another order: of logits below 100, 1e-5 each."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scheme": ({"peft": {"peft_scheme": "ia3"}}, "peft_scheme is ia3"),
    "variant": ({"lora": {"variant": "canonical"}}, "variant is canonical"),
    "tied": ({"lora": {"weight_tying": True}}, "weight_tying is True"),
    "rope": ({"rotary_base": 7.0}, r"model\.rotary_base is 7\.0"),
    "ranks": ({"tensor_model_parallel_size": 2}, r"lacks mp_rank_00/model_weights\.ckpt"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    return converted(saved(models.llama("tied_grouped"), directory / "source"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_its_name(
    base: Path, tmp_path: Path, case: str
) -> None:
    settings, message = REFUSED[case]
    state, _ = adapted(models.llama("tied_grouped"), range(4))
    adapters = write_adapters(base, tmp_path / "a.nemo", {"": state}, **settings)
    with pytest.raises(CheckpointError, match=message):
        open_student(adapters, base_model=base)
    with pytest.raises(CheckpointError, match=message):
        export_adapters(adapters, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_adapters_and_models_are_not_mistaken_for_each_other(base: Path, tmp_path: Path) -> None:
    state, _ = adapted(models.llama("tied_grouped"), range(4))
    adapters = write_adapters(base, tmp_path / "a.nemo", {"": state})
    with pytest.raises(CheckpointError, match="--base-model to merge them, or --peft"):
        open_student(adapters)
    with pytest.raises(CheckpointError, match="a complete model, not adapters"):
        open_student(base, base_model=base)
    other = converted(saved(models.llama("untied_llama3"), tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"model\.\w+ is|is for a weight of shape"):
        open_student(adapters, base_model=other)
    name = "model.decoder.layers.0.mlp.adapter_layer.mlp_infused.scalers"
    extra = state | {name: torch.ones(80)}
    broken = write_adapters(base, tmp_path / "b.nemo", {"": extra})
    with pytest.raises(CheckpointError, match="is not of a LoRA adapter"):
        open_student(broken, base_model=base)


def named_base(adapters: Path, output: Path, **more: Any) -> str:
    """The base that the exported adapters name."""
    export_adapters(adapters, output, **more)
    name: str = json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
    return name


def test_the_base_of_adapters_is_the_converted_directory_and_not_what_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.llama("tied_grouped")
    source, state = saved(model, tmp_path / "sft"), adapted(model, range(4))[0]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": "meta/Llama"}))
    monkeypatch.chdir(tmp_path)
    nemo = converted(Path("sft"))
    adapters = write_adapters(nemo.absolute(), tmp_path / "a.nemo", {"": state})
    monkeypatch.chdir("/")
    assert named_base(adapters, tmp_path / "one") == str(source)
    card = (tmp_path / "one/README.md").read_text()
    assert "| base model | sft |" in card and "meta/Llama" not in card
    model_card = export(open_student(tmp_path / "sft.nemo"), tmp_path / "out").path / "README.md"
    assert "| fine-tuned from | meta/Llama |" in model_card.read_text()
    shutil.move(source, tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"converted from \S+/sft, where there is no .*--base"
    ):
        export_adapters(adapters, tmp_path / "two")
    given = named_base(adapters, tmp_path / "two", base=tmp_path / "moved")
    assert given == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kd_trained_steps": 500}, "was trained after its conversion"),
        ({"restore_from_path": "other.nemo"}, "was trained after its conversion"),
        ({"converted_from": None}, "was not converted from a Hugging Face directory"),
    ],
)
def test_the_base_of_adapters_is_asked_for_if_it_is_no_plain_conversion(
    base: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    state, _ = adapted(models.llama("tied_grouped"), range(4))
    trained = rewrite(base, tmp_path / "trained.nemo", **settings)
    adapters = write_adapters(trained, tmp_path / "a.nemo", {"": state})
    with pytest.raises(CheckpointError, match=rf"trained\.nemo {reason}; give --base"):
        export_adapters(adapters, tmp_path / "peft")
    assert named_base(adapters, tmp_path / "peft", base=base.parent / "source")
    trained.unlink()
    with pytest.raises(CheckpointError, match=r"its base cannot be read: .* does not exist"):
        export_adapters(adapters, tmp_path / "again")


def test_adapters_are_not_said_to_be_compared(base: Path, tmp_path: Path) -> None:
    state, _ = adapted(models.llama("tied_grouped"), range(4))
    adapters = write_adapters(base, tmp_path / "a.nemo", {"": state})
    with pytest.raises(typer.BadParameter, match="adapters have no logits to compare"):
        cli.export(adapters, tmp_path / "peft", peft=True, verify=True)
    assert not (tmp_path / "peft").exists()


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    """A model of the same shapes as `base`, of which one value of one layer differs."""
    model = models.llama("tied_grouped")
    model.state_dict()["model.layers.2.mlp.down_proj.weight"][0, 0] += 1
    return converted(saved(model, base.parent / "other"))


def lora(base: Path, path: Path, **settings: Any) -> Path:
    state, _ = adapted(models.llama("tied_grouped"), range(4))
    return write_adapters(base, path, {"": state}, **settings)


def test_another_base_of_the_same_shapes_is_refused_with_both_names(
    base: Path, other: Path, tmp_path: Path
) -> None:
    adapters = lora(base, tmp_path / "a.nemo")
    difference = r"model\.layers\.2\.mlp\.down_proj\.weight differs"
    with pytest.raises(CheckpointError, match=rf"on {base}, but {other} is another .*{difference}"):
        open_student(adapters, base_model=other)
    source = other.with_suffix("")
    with pytest.raises(CheckpointError, match=rf"on {base}, but {source} is .*{difference}"):
        export_adapters(adapters, tmp_path / "peft", base=source)
    assert not (tmp_path / "peft").exists()


def test_a_base_with_the_weights_of_the_recorded_one_is_accepted_in_any_form(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unpacked, and rounded to bfloat16."""
    adapters = lora(base, tmp_path / "a.nemo")
    with tarfile.open(base) as archive:
        archive.extractall(tmp_path / "unpacked", **SAFELY)
    open_student(adapters, base_model=tmp_path / "unpacked")
    rounded = export(open_student(base), tmp_path / "rounded", dtype=torch.bfloat16).path
    open_student(adapters, base_model=converted(rounded))
    assert export_adapters(adapters, tmp_path / "peft", base=rounded) == 16
    assert capsys.readouterr().err == ""


def test_a_base_that_cannot_be_compared_is_named_beside_the_recorded_one(
    base: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone.nemo"
    adapters = lora(rewrite(base, gone), tmp_path / "a.nemo")
    gone.unlink()
    student = open_student(adapters, base_model=other)
    assert capsys.readouterr().err == (
        f"{adapters} was trained on {gone}, which is gone; {other} is taken for it\n"
    )
    card = (export(student, tmp_path / "out").path / "README.md").read_text()
    assert "| base model | other |" in card and "source" not in card
    unknown = lora(base, tmp_path / "b.nemo", restore_from_path=None)
    open_student(unknown, base_model=base)
    assert "does not record its base" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(other.with_suffix(""), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    export_adapters(lora(base, tmp_path / "c.nemo"), tmp_path / "peft", base=bare)
    assert f"{bare} cannot be compared with its base" in capsys.readouterr().err


def test_the_card_names_a_trained_base_and_not_what_that_was_converted_from(
    base: Path, tmp_path: Path
) -> None:
    trained = rewrite(base, tmp_path / "trained.nemo", kd_trained_steps=500)
    student = open_student(lora(trained, tmp_path / "a.nemo"), base_model=trained)
    card = (export(student, tmp_path / "out").path / "README.md").read_text()
    assert "| base model | trained.nemo |" in card
