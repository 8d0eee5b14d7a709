"""Write a `.nemo`, or a checkpoint of NeMo or Megatron-core, as a Hugging Face directory.

    python examples/convert_nemo_to_hf.py student.nemo student-hf/

The same as `nemo-kd export`.
"""

from __future__ import annotations

import typer

from nemo_kd.cli.export import export
from nemo_kd.cli.failures import reported

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(export)
    with reported(resume="nothing was written; the same command starts over"):
        app()
