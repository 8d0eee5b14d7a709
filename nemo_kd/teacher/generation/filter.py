"""Filter answers by a regular expression or a function on their text."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_kd.files import sha256_of
from nemo_kd.teacher.generation.step import GenerationError


class AnswerFilter:
    """Filter that keeps answers that match the pattern and for which the function returns true.

    `function` is `module:function`, called as `function(answer: str, row: dict) -> bool` with the
    prompt's row of the SFT file; modules are also searched in the working directory. The function
    must be deterministic, or a resumed run would write a different store. `identity` is recorded
    in the store: the file of the function's module, but not what it imports.
    """

    def __init__(self, pattern: str | None = None, function: str | None = None) -> None:
        try:
            self._pattern = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise GenerationError(
                f"generation.filter.pattern={pattern!r} is not a regular expression: {error}"
            ) from error
        self._name = function
        self._function = None if function is None else _load(function)
        self.identity = {} if function is None else _identity(function)

    def keeps(self, answer: str, row: dict[str, Any]) -> bool:
        """Return whether an answer is kept; raise GenerationError if the function raises."""
        if self._pattern is not None and not self._pattern.search(answer):
            return False
        if self._function is None:
            return True
        try:
            return bool(self._function(answer, row))
        except Exception as error:
            raise GenerationError(
                f"generation.filter.function={self._name} failed with {type(error).__name__}: "
                f"{error}"
            ) from error


def _load(name: str) -> Callable[[str, dict[str, Any]], Any]:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise GenerationError(
            f"generation.filter.function={name!r}: expected module:function, such as "
            "checks:is_right"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise GenerationError(f"generation.filter.function={name}: {error}") from error
    except Exception as error:  # of the module itself
        raise GenerationError(
            f"generation.filter.function={name}: importing {module_name} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise GenerationError(f"generation.filter.function={name} is not a function")
    return function


def _identity(name: str) -> dict[str, str]:
    """The SHA-256 of the file of the function's module, which has been imported."""
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return {"function_sha256": sha256_of(Path(file))} if file else {}
