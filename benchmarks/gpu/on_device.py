"""Plugin of pytest that makes a device the default of tests: `-p benchmarks.gpu.on_device`.

The device is in the environment. Tests with fixtures of the suite's conftest are left out: it
needs more packages, and such tests start other processes.
"""

from __future__ import annotations

import os
from typing import Any

import torch

VARIABLE = "NEMO_KD_TESTS_DEVICE"
BUILT_IN = {"request", "monkeypatch", "tmp_path", "capsys", "recwarn"}
OF_PROCESSES = {"ranks"}


def pytest_configure(config: Any) -> None:
    device = os.environ[VARIABLE]
    torch.set_default_device(device)

    class Generator(torch.Generator):
        def __new__(cls, device: str = device) -> Generator:
            return super().__new__(cls, device)

    torch.Generator = Generator  # type: ignore[misc]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    left_out = [item for item in items if not can_run(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def can_run(item: Any) -> bool:
    parameters = set(getattr(getattr(item, "callspec", None), "params", {})) - OF_PROCESSES
    return set(getattr(item, "fixturenames", ())) <= BUILT_IN | parameters
