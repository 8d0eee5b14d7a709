"""The tokenizer of a NeMo model, as a directory that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_kd.checkpoints.distributed import Files, files_of
from nemo_kd.checkpoints.model import CheckpointError, reading
from nemo_kd.checkpoints.sentencepiece_tokenizer import from_sentencepiece
from nemo_kd.checkpoints.source import Source
from nemo_kd.checkpoints.tokenizer import ARTIFACT_PREFIX, MAX_BYTES, resolve_tokenizer
from nemo_kd.tokenizer_files import load_files

GIVE = "give its directory in Hugging Face's format by --tokenizer"


def load(directory: str | Path) -> Any:
    """Load a tokenizer of transformers from local files."""
    with reading(str(directory), f"no tokenizer that transformers can load; {GIVE}"):
        return load_files(directory)


def tokenizer_of(
    source: Source, base: str | Path | None = None, chosen: str | Path | None = None
) -> Any:
    """The tokenizer `chosen`, else the one that NeMo's configuration names, else the base's.

    Errors: CheckpointError if it is gone, of another library, or gives other ids in transformers.
    """
    return _of_decoder(_found(source, base, chosen))


def own_directory(source: Source) -> str | None:
    """The directory of the Hugging Face tokenizer that NeMo's configuration names; None for others.

    Errors: CheckpointError if it is gone.
    """
    given = (source.section or {}).get("tokenizer")
    if not isinstance(given, Mapping) or given.get("library") != "huggingface":
        return None
    return _directory(source, dict(given))


def _of_decoder(tokenizer: Any) -> Any:
    """Make a tokenizer return no `token_type_ids`, with which `generate` of a decoder fails.

    transformers' generic class returns them unless its configuration says otherwise.
    """
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def _found(source: Source, base: str | Path | None, chosen: str | Path | None) -> Any:
    if chosen is not None:
        return load(chosen)
    if source.section is None and base is not None:
        return load(base)
    given = (source.section or {}).get("tokenizer")
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{source.path} names no tokenizer; {GIVE}")
    library = given.get("library")
    if library == "huggingface":
        return load(_directory(source, dict(given)))
    if library == "sentencepiece":
        return _from_sentencepiece(source, given)
    raise CheckpointError(
        f"{source.path}: its tokenizer is one of {library!r}, which is not converted; {GIVE}"
    )


def _directory(source: Source, given: dict[str, Any]) -> str:
    """The tokenizer's directory, or the copy in the source or in the model before its training."""
    name = Path(str(given.get("model") or "").removeprefix(ARTIFACT_PREFIX)).name
    directory = str(given.get("type"))
    holder = next((path for path, files in _archives(source) if name in files), None)
    if name and holder is None and Path(directory).is_absolute() and not Path(directory).is_dir():
        raise CheckpointError(
            f"{source.path}: its tokenizer {directory} is gone, and so is the .nemo with a copy of "
            f"it; {GIVE}"
        )
    section = OmegaConf.create({"tokenizer": given | {"model": f"{ARTIFACT_PREFIX}{name}"}})
    assert isinstance(section, DictConfig)
    try:
        resolve_tokenizer(section, holder or source.path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or {GIVE}") from error
    return str(section.tokenizer.type)


def _archives(source: Source) -> Iterator[tuple[Path, Files]]:
    """Yield the source, the `.nemo` that its training started from, and those beside a checkpoint.

    A file's name has the hash of its content, so that the same name is the same tokenizer.
    """
    yield source.path, source.files
    before = Path(str((source.section or {}).get("restore_from_path") or ""))
    for path in (before, *sorted(source.path.absolute().parent.glob("*.nemo"))):
        if path.suffix == ".nemo" and path.exists():
            yield path, files_of(path)


def _from_sentencepiece(source: Source, given: Mapping[str, Any]) -> Any:
    name = Path(str(given.get("model") or "").removeprefix(ARTIFACT_PREFIX)).name
    files = next((files for _, files in _archives(source) if name in files), None)
    if not name or files is None:
        raise CheckpointError(f"{source.path}: its tokenizer {given.get('model')} is gone; {GIVE}")
    with files[name].open() as file:
        data = file.read(MAX_BYTES)
    with reading(f"{source.path}: {name}", f"not a SentencePiece model that is converted; {GIVE}"):
        return from_sentencepiece(f"{source.path}: {name}", data)
