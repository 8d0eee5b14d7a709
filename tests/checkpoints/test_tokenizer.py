"""Finding a `.nemo`'s tokenizer, and refusing one that does not fit."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_kd.checkpoints import CheckpointError, open_checkpoint, resolve_tokenizer, write_nemo
from nemo_kd.checkpoints.tokenizer import pack_tokenizer
from tests.checkpoints import models


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"library": "sentencepiece", "type": None, "model": "nemo:tokenizer.model"},
        {"library": "huggingface", "type": "meta-llama/Llama-3.2-1B", "model": None},
        {"library": "huggingface", "type": str(Path(__file__).parent), "model": "nemo:x.zip"},
    ],
)
def test_what_nemo_can_find_stays(tokenizer: dict[str, Any]) -> None:
    config = OmegaConf.create({"tokenizer": tokenizer})
    resolve_tokenizer(config, "model.nemo")
    assert OmegaConf.to_container(config) == {"tokenizer": tokenizer}


def test_a_lost_directory_without_a_copy_is_named() -> None:
    tokenizer = {"library": "huggingface", "type": "/nowhere/tokenizer", "model": None}
    with pytest.raises(CheckpointError, match=r"/nowhere/tokenizer.*model\.tokenizer\.type"):
        resolve_tokenizer(OmegaConf.create({"tokenizer": tokenizer}), "model.nemo")


def test_a_zip_depends_on_the_files_alone(tmp_path: Path) -> None:
    packed = []
    for name, when in (("one", 1_000_000_000), ("other", 1_700_000_000)):
        models.tokenizer().save_pretrained(tmp_path / name)
        for path in (tmp_path / name).iterdir():
            os.utime(path, (when, when))
        packed.append(pack_tokenizer(tmp_path / name))
    assert packed[0] == packed[1]


def test_more_tokens_than_embedding_rows_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models.save(models.llama("tied_grouped"), tmp_path / "hf"))
    larger = models.tokenizer()
    larger.add_tokens(["<one>", "<two>"])
    larger.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="largest id is 300, but the embedding has 300 rows"):
        write_nemo(checkpoint, tmp_path / "model.nemo", range(4))
    assert not (tmp_path / "model.nemo").exists()


def test_a_directory_with_other_ids_than_the_copy_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models.save(models.llama("tied_grouped"), tmp_path / "hf"))
    done = write_nemo(checkpoint, tmp_path / "model.nemo", [0])
    tokenizer = {"library": "huggingface", "type": str(done.tokenizer)}
    with tarfile.open(done.path) as archive:
        (artifact,) = (one for one in archive.getnames() if one.endswith("tokenizer.zip"))
    tokenizer["model"] = f"nemo:{artifact.removeprefix('./')}"
    template = done.tokenizer / "chat_template.jinja"
    template.write_text("{{ messages }}")  # changes no id
    resolve_tokenizer(OmegaConf.create({"tokenizer": tokenizer}), done.path)
    other = models.tokenizer()
    other.add_tokens(["<one>"])
    other.save_pretrained(done.tokenizer)
    with pytest.raises(CheckpointError, match=r"model\.tokenizer is not the tokenizer that"):
        resolve_tokenizer(OmegaConf.create({"tokenizer": tokenizer}), done.path)
    done.tokenizer.rename(tmp_path / "elsewhere")
    config = OmegaConf.create({"tokenizer": tokenizer})
    resolve_tokenizer(config, done.path)
    unpacked = Path(config.tokenizer.type)
    assert unpacked != done.tokenizer and (unpacked / "tokenizer.json").is_file()
