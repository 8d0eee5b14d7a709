"""The experiments' modules are imported as they import one another: by file name."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))


@pytest.fixture
def cfg() -> Any:
    """The committed configuration."""
    with initialize_config_dir(str(ROOT / "experiments" / "conf"), version_base=None):
        return compose("config")
