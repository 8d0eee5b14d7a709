"""A converted checkpoint is the same model in NeMo, at every layout it is loaded at."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.checkpoints import models
from tests.processes import run_program

LAYOUTS = ("tp2", "pp2")
TINY = ("tied_grouped", "untied_llama3", "pruned", *models.FAMILIES, *models.ROPES)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints and `parity.json` of `parity.py`, run once on two processes."""
    directory = tmp_path_factory.mktemp("converted")
    cache = str(directory / "cache")
    run_program(
        "tests/checkpoints/parity.py", directory, processes=2, fork=True, XDG_CACHE_HOME=cache
    )
    return directory


@pytest.mark.parametrize(
    ("model", "layout"),
    [(model, layout) for model in TINY for layout in LAYOUTS] + [("smollm2", "dp2")],
)
def test_logits_equal_those_of_transformers(converted: Path, model: str, layout: str) -> None:
    difference, largest = json.loads((converted / "parity.json").read_text())[model][layout]
    assert largest > 1  # the comparison can fail
    assert difference < 1e-3


def test_a_lost_tokenizer_is_unpacked_from_the_archive(converted: Path) -> None:
    """`pruned` was restored after its directory had been renamed."""
    (unpacked,) = (converted / "cache/nemo_kd/tokenizers").iterdir()
    original = converted / "elsewhere"
    assert {path.name for path in unpacked.iterdir()} == {p.name for p in original.iterdir()}
    for path in original.iterdir():
        assert (unpacked / path.name).read_bytes() == path.read_bytes()


def test_the_tokenizer_travels_with_what_nemo_saves(converted: Path) -> None:
    members = []
    for path in (converted / "tied_grouped.nemo", converted / "saved/saved.nemo"):
        with tarfile.open(path) as archive:
            config = yaml.safe_load(archive.extractfile("./model_config.yaml"))
            name = config["tokenizer"]["model"].removeprefix("nemo:")
            member = archive.extractfile(f"./{name}")
            assert member is not None
            members.append(member.read())
    assert members[0] == members[1]


def test_a_pruned_checkpoint_names_its_layers(converted: Path) -> None:
    with tarfile.open(converted / "pruned.nemo") as archive:
        config = yaml.safe_load(archive.extractfile("./model_config.yaml"))
    assert config["num_layers"] == 2
    assert config["converted_from"]["layers"] == [0, 3]


@pytest.mark.slow
def test_gguf_weights_and_ids_equal_those_of_transformers_own_loader() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_kd.checkpoints.families import shapes_of
    from nemo_kd.checkpoints.gguf_file import GGUFCheckpoint
    from nemo_kd.checkpoints.gguf_tokenizer import build_tokenizer
    from tests.checkpoints.parity import smollm2_gguf

    path = smollm2_gguf()
    ours = GGUFCheckpoint(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, torch_dtype=torch.float32
    ).state_dict()
    for name in shapes_of(ours.model):
        assert torch.equal(ours.tensor(name), theirs[name]), name
    tokenizer = build_tokenizer(ours.name, ours.field)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for source in sorted(Path(json.__file__).parent.glob("*.py")):
        # transformers leaves out the file's splitting at digits, which shows where several
        # spaces stand before one.
        for line in source.read_text().splitlines():
            text = line.strip()
            expected = reference(text, add_special_tokens=False).input_ids
            assert tokenizer(text).input_ids == expected, text
