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
import tarfile
import tempfile
import zipfile
from pathlib import Path

from omegaconf import DictConfig, open_dict

from nemo_kd.checkpoints.llama import CheckpointError
from nemo_kd.files import commit

ARTIFACT_NAME = "tokenizer.zip"
ARTIFACT_PREFIX = "nemo:"


def pack_tokenizer(directory: Path) -> bytes:
    """A zip of the directory's files, the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(directory.iterdir()):
            info = zipfile.ZipInfo(path.name)  # dated 1980, whatever the file's own date
            archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


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
    if not os.path.isabs(directory) or os.path.isdir(directory):
        return
    artifact = str(tokenizer.get("model") or "")
    if not artifact.startswith(ARTIFACT_PREFIX):
        raise CheckpointError(
            f"{checkpoint} names the tokenizer directory {directory}, which does not exist, and "
            "contains no copy of it; set model.tokenizer.type to the tokenizer's directory"
        )
    data = _read_member(Path(checkpoint), artifact.removeprefix(ARTIFACT_PREFIX))
    with open_dict(model_cfg):
        tokenizer.type = str(_unpack(data))


def _read_member(checkpoint: Path, name: str) -> bytes:
    if checkpoint.is_dir():
        return (checkpoint / name).read_bytes()
    with tarfile.open(checkpoint, "r:") as archive:
        member = archive.extractfile(f"./{name}")
        assert member is not None  # a regular file: NeMo wrote it from one
        return member.read()


def _unpack(data: bytes) -> Path:
    """The cached directory of these bytes; safe to call from several processes at once."""
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nemo_kd/tokenizers"
    target = root / hashlib.sha256(data).hexdigest()[:16]
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=root))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            (partial / Path(name).name).write_bytes(archive.read(name))
    try:
        commit(partial, target)
    except OSError:  # another process was first; its files are the same
        for path in partial.iterdir():
            path.unlink()
        partial.rmdir()
    return target
