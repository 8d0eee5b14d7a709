"""NeMo starts without a word about apex and TransformerEngine, which a CPU does not need."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT, environment

START = """
import sys; sys.path.insert(0, "examples/demo")
import complete
from nemo_kd import megatron
megatron.prepare(complete.settings())
import nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model
"""


def test_starting_nemo_prints_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout + done.stderr == ""
