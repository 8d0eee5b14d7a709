"""The demo's scripts are imported as they import one another: by file name, from their folder."""

from __future__ import annotations

import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "demo"))
