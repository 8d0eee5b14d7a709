"""Progress bars for output to a file: a line per bar instead of a redraw per step.

Imports NeMo: call `nemo_kd.nemo.cpu.install()` first.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from nemo.collections.nlp.parts.nlp_overrides import CustomProgressBar

SECONDS = 300
"""Seconds between the lines of a bar."""


class LineBar(Tqdm):
    """A bar that prints one line when it closes, and one every `SECONDS` until then."""

    def __init__(self, **options: Any) -> None:
        self.printed = time.monotonic()
        line = "{desc}{n_fmt}/{total_fmt} in {elapsed}{postfix}"
        super().__init__(file=io.StringIO(), bar_format=line, **options)

    def refresh(self, *args: Any, **options: Any) -> None:
        if not self.disable and time.monotonic() - self.printed > SECONDS:
            self.print_line()

    def display(self, *args: Any, **options: Any) -> None:
        """Suppress tqdm's redraws."""

    def close(self) -> None:
        if not self.disable:
            self.print_line()
        super().close()

    def print_line(self) -> None:
        self.printed = time.monotonic()
        print(str(self), file=sys.stdout, flush=True)


class LineProgressBar(CustomProgressBar):
    """NeMo's progress bar with a `LineBar` for training and one for each validation."""

    def init_train_tqdm(self) -> Tqdm:
        self.bar = LineBar(desc="Training: ", disable=self.is_disabled)
        return self.bar

    def init_validation_tqdm(self) -> Tqdm:
        return LineBar(desc="Validation: ", disable=self.is_disabled)

    init_sanity_tqdm = init_validation_tqdm


class TrainerBuilder(MegatronLMPPTrainerBuilder):
    """NeMo's trainer builder, with a `LineProgressBar` if standard output is not a terminal."""

    def _callbacks(self, callbacks: list[Any] | None) -> list[Any]:
        built: list[Any] = super()._callbacks(callbacks)
        if sys.stdout.isatty():
            return built
        return [LineProgressBar() if isinstance(c, CustomProgressBar) else c for c in built]
