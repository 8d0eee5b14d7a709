"""What the Hydra scripts share: spellings of `model.kd` overrides, help, quiet logs, errors."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

KD_OVERRIDE = re.compile(r"^\+{0,2}(model\.kd\.[\w.]+=)")
SELECTION = re.compile(r"=(top_entropy\(.*\))$")


def accept_every_spelling(arguments: list[str]) -> list[str]:
    """`+model.kd.x=`, `model.kd.x=` and `++model.kd.x=` all become the last.

    Plain Hydra refuses `+` for a key that the YAML has and the bare form for one that it lacks;
    nobody should have to know which of them a key of `model.kd` is. Unknown keys are refused
    later, by name. `positions=top_entropy(0.2)` is quoted: Hydra would call a function.
    """
    arguments = [KD_OVERRIDE.sub(r"++\1", argument) for argument in arguments]
    return [SELECTION.sub(r"='\1'", argument) for argument in arguments]


def commented(*names: str) -> str:
    """The files `conf/NAME.yaml` beside the running script's folder as its help shows them: with
    their comments, without what Hydra alone reads."""
    conf = Path(sys.argv[0]).resolve().parent.parent / "conf"
    texts = {name: (conf / f"{name}.yaml").read_text().partition("\nhydra:\n")[0] for name in names}
    shown = "\n\n".join(f"# --- conf/{name}.yaml\n{text}" for name, text in texts.items())
    return shown.replace("$", "$$")  # Hydra's template gives one of them back


def script(main: Callable[[], None]) -> None:
    """Run a Hydra entry point; a user's mistake ends in one line, not in a stack of frames."""
    sys.argv[1:] = accept_every_spelling(sys.argv[1:])
    _quiet()
    OmegaConf.register_new_resolver("commented", commented, replace=True)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("NEMO_KD_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(NEMO_KD_TRACEBACK=1 shows where)")


def _quiet() -> None:
    """No hub is asked, and imports do not warn of things that a run does not use."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
