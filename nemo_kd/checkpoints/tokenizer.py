"""The tokenizer of a `.nemo`: a directory beside it, and a copy of the directory inside it.

NeMo names a Hugging Face tokenizer by a directory or a model on the hub, never by a part of the
archive. So `<name>.tokenizer/` is written beside `<name>.nemo`, and its absolute path is the
archive's `tokenizer.type`: plain NeMo loads it as long as the directory stays there (or with
`model.tokenizer.type=<directory>`). A zip of the directory is the artifact `tokenizer.model`, which
NeMo does not read for such a tokenizer but copies into each `.nemo` that it saves later;
`resolve_tokenizer` unpacks it if the directory is gone.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig, open_dict

from nemo_kd.checkpoints.distributed import files_of
from nemo_kd.checkpoints.model import CheckpointError, reading
from nemo_kd.files import commit

ARTIFACT_NAME = "tokenizer.zip"
ARTIFACT_PREFIX = "nemo:"
MAX_BYTES, MAX_FILES = 256 << 20, 64
"""Bytes of a tokenizer, packed and unpacked, and number of its files."""


def pack_tokenizer(directory: Path) -> bytes:
    """A zip of the directory's files, the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(directory.iterdir()):
            info = zipfile.ZipInfo(path.name)  # dated 1980, whatever the file's own date
            archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def refuse_foreign_tokenizer(directory: Path, nemo: Path) -> None:
    """Raise CheckpointError if `directory` has a file that was not written with `nemo`."""
    if not os.path.lexists(directory):
        return
    known: set[str] = set()
    if nemo.is_file() and not directory.is_symlink():
        with suppress(tarfile.TarError), tarfile.open(nemo, "r:") as archive:
            names = [name for name in archive.getnames() if name.endswith(f"_{ARTIFACT_NAME}")]
            with suppress(zipfile.BadZipFile):
                for name in names:
                    data = read_member(nemo, name.removeprefix("./"))
                    known.update(zipfile.ZipFile(io.BytesIO(data)).namelist())
    paths = sorted(directory.iterdir()) if directory.is_dir() else [directory]
    foreign = next((one.name for one in paths if one.name not in known or not one.is_file()), None)
    if foreign is not None:
        raise CheckpointError(
            f"{directory} would be replaced, but {foreign} was not written with {nemo.name}; move "
            "the directory away, or choose another name for the model"
        )


def resolve_tokenizer(model_cfg: DictConfig, checkpoint: str | Path) -> None:
    """Point `model_cfg.tokenizer.type` at a directory that exists; call before `restore_from`.

    The checkpoint's own `trust_remote_code` is dropped: only the user's configuration may set it.
    Other kinds of tokenizers, names on the hub and existing directories stay as they are.
    Otherwise the copy inside `checkpoint` (a .nemo or a directory) is unpacked into the user's
    cache, once per content.
    """
    tokenizer = model_cfg.get("tokenizer")
    if tokenizer is None:
        return
    with open_dict(model_cfg):
        tokenizer.pop("trust_remote_code", None)
    if tokenizer.get("library") != "huggingface":
        return
    directory = str(tokenizer.get("type"))
    if not os.path.isabs(directory):
        return
    artifact = str(tokenizer.get("model") or "")
    if os.path.isdir(directory):
        _refuse_another(Path(directory), Path(checkpoint), artifact)
        return
    if not artifact.startswith(ARTIFACT_PREFIX):
        raise CheckpointError(
            f"{checkpoint} names the tokenizer directory {directory}, which does not exist, and "
            "contains no copy of it; set model.tokenizer.type to the tokenizer's directory"
        )
    with reading(str(checkpoint), "its copy of the tokenizer cannot be unpacked"):
        data = read_member(Path(checkpoint), artifact.removeprefix(ARTIFACT_PREFIX))
        directory = str(_unpack(data))
    with open_dict(model_cfg):
        tokenizer.type = directory


WITHOUT_IDS = {"chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json"}
"""Files of a tokenizer that a user may edit: they do not give the tokens their ids."""


def _refuse_another(directory: Path, checkpoint: Path, artifact: str) -> None:
    """Raise CheckpointError if the directory's tokens are not those of the copy in `checkpoint`."""
    name = artifact.removeprefix(ARTIFACT_PREFIX)
    if not artifact.startswith(ARTIFACT_PREFIX) or not checkpoint.exists():
        return
    if name not in files_of(checkpoint):
        return  # NeMo's own tokenizers are not copied
    with (
        reading(str(checkpoint), "its copy of the tokenizer cannot be read"),
        zipfile.ZipFile(io.BytesIO(read_member(checkpoint, name))) as archive,
    ):
        copies = {one.filename: archive.read(one) for one in _members(archive)}
    for one, content in copies.items():
        path = directory / one
        if one not in WITHOUT_IDS and (not path.is_file() or path.read_bytes() != content):
            raise CheckpointError(
                f"{directory} is not the tokenizer that {checkpoint} was written with ({one} "
                "differs); move it away to use the copy in the checkpoint, or name another "
                "directory for the tokenizer"
            )


def read_member(checkpoint: Path, name: str) -> bytes:
    """Read a file at the top of a `.nemo`, an archive or a directory.

    Errors: CheckpointError for one that is missing, elsewhere, or larger than `MAX_BYTES`.
    """
    member = files_of(checkpoint).get(name)
    if member is None:
        raise CheckpointError(f"{checkpoint}: {name!r} is not a file of the checkpoint itself")
    if member.size > MAX_BYTES:
        raise CheckpointError(f"{checkpoint}: {name} has more than {MAX_BYTES} bytes")
    with member.open() as file:
        return file.read()


def _unpack(data: bytes) -> Path:
    """The cached directory of these bytes; safe to call from several processes at once."""
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nemo_kd/tokenizers"
    target = root / hashlib.sha256(data).hexdigest()[:16]
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=root))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in _members(archive):
                (partial / member.filename).write_bytes(archive.read(member))
        with suppress(OSError):  # another process was first; its files are the same
            commit(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the archive's members; raise CheckpointError before one is unpacked if they are not
    plain files of a tokenizer's size."""
    members = archive.infolist()
    if any(Path(member.filename).name != member.filename for member in members):
        raise CheckpointError("a tokenizer's zip has files only, without directories")
    size = sum(member.file_size for member in members)  # zipfile reads no more than it states
    if size > MAX_BYTES or len(members) > MAX_FILES:
        raise CheckpointError(
            f"the tokenizer's zip unpacks to {len(members)} files of {size} bytes; at most "
            f"{MAX_FILES} of {MAX_BYTES} are"
        )
    return members
