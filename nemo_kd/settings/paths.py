"""Paths in a configuration: which keys hold them, and the home directory in their values."""

from __future__ import annotations

from collections.abc import Iterable

from omegaconf import DictConfig

from nemo_kd.paths import expand_home
from nemo_kd.settings.values import Kind

PATHS = {
    "restore_from_path",
    "file_path",
    "output",
    "output_dir",
    "index_mapping_dir",
    "explicit_log_dir",
    "exp_dir",
    "resume_from_checkpoint",
    "dirpath",
    "output_file_path_prefix",
    "vocab_file",
    "merge_file",
    "tokenizer",
    "url",
}
"""Last parts of the keys of paths and addresses, those of NeMo included."""
PATH_LISTS = {"store", "file_names"}


def expand_paths(cfg: DictConfig, key: str, kind: Kind) -> None:
    """Replace a leading `~/` in the path, or in each path of the list, at `key` of `cfg`.

    Other values, and keys that hold no path, are left as they are.
    """
    if not (kind.is_path or key in PATHS or key in PATH_LISTS):
        return
    value = cfg[key]
    if isinstance(value, str):
        expanded: object = expand_home(value)
    elif isinstance(value, Iterable) and not isinstance(value, DictConfig):
        value = list(value)
        expanded = [expand_home(each) if isinstance(each, str) else each for each in value]
    else:
        return
    if expanded != value:
        cfg[key] = expanded
