"""The file of an evaluation's results: `output`, a JSON object of one number per name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from nemo_kd.errors import NemoKDError
from nemo_kd.files import publish
from nemo_kd.nemo.settings.training import FILES
from nemo_kd.outputs import json_object, refuse_foreign, refuse_inputs
from nemo_kd.settings import files
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.paths import expanded
from nemo_kd.visible import say

OUTPUTS = ("exp_manager.explicit_log_dir", "exp_manager.exp_dir")


def check_output(cfg: DictConfig) -> None:
    """Check that `output` replaces nothing but the results of an earlier evaluation.

    Errors: NemoKDError for an input, a place within one, and any other existing file.
    """
    check_path(cfg, files.output_file)
    for path in files.paths_at(cfg, "output"):
        try:
            refuse_foreign(Path(path), "the results of an evaluation", is_results)
        except NemoKDError as error:
            raise NemoKDError(f"output: {error}") from error


def check_path(cfg: DictConfig, problem: files.Problem) -> None:
    """Check that `output` is usable, a local path, and neither an input nor within one."""
    for path in files.paths_at(cfg, "output"):
        if files.REMOTE in path:
            raise NemoKDError(
                f"output: {path} is an address, but a file is written to a local disk: give a "
                "path, then copy the file"
            )
        files.check_files(cfg, [("output", problem)])
        try:
            refuse_inputs([path], inputs(cfg))
        except NemoKDError as error:
            raise NemoKDError(f"output: {error}") from error


def inputs(cfg: DictConfig) -> Iterator[str]:
    """Yield the local paths that a configuration reads, with globs replaced by their files."""
    for key, _ in FILES:
        for path in () if key in OUTPUTS else files.paths_at(cfg, key):
            if files.REMOTE in path:
                continue
            yield path
            if key.endswith(".file_names"):
                with suppress(RowError):  # reported with its key by the check of the inputs
                    yield from map(str, expanded(path))


def is_results(content: bytes) -> bool:
    """Whether the content of a file is a JSON object such as `write` makes."""
    value = json_object(content)
    return (
        value is not None
        and any("/" in name for name in value)  # NAME/loss of each set
        and all(type(number) is float for number in value.values())
    )


def write(path: Path, results: Mapping[str, float]) -> None:
    """Write the results; say that a file was replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    publish(path, json.dumps(results, indent=1) + "\n")
    if existed:
        say(f"replaced {path}")
