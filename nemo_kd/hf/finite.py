"""Stop a training whose loss stays NaN or infinite, and save no weights that are.

`Trainer` logs the mean of the other steps in place of such a loss (`logging_nan_inf_filter`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from nemo_kd.errors import NemoKDError
from nemo_kd.loss.finite import AT_THE_END, FiniteWatch
from nemo_kd.teacher.processes import say_once

STEPS_UNREAD = 10
"""Most steps whose losses stay on the device: to read one, the host waits for the device."""
REMEDY = (
    "resume from an earlier checkpoint, or start again in a new output_dir, with a smaller "
    "learning_rate, or bf16=True instead of fp16=True"
)


class FiniteLoss(TrainerCallback):
    """Read the loss of each training step; raise NemoKDError if it stays NaN or infinite.

    Losses are summed over the processes and read every `STEPS_UNREAD` steps, where `Trainer` logs,
    evaluates or saves, and at the end.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._unread: dict[int, Tensor] = {}
        self._watch = FiniteWatch(lambda text: say_once([text]), REMEDY)

    def add(self, step: int, loss: Tensor) -> None:
        """Add the loss of a batch, a scalar on the device, to that of its step."""
        self._unread[step] = self._unread.get(step, 0) + loss.detach().float()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._unread.clear()  # of a start with a larger batch, by `auto_find_batch_size`

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_due = state.global_step % STEPS_UNREAD == 0
        if is_due or control.should_log or control.should_evaluate or control.should_save:
            self._read()
            self._watch.refuse()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._read()
        self._watch.refuse(AT_THE_END)
        refuse_weights_not_finite(self.trainer.model)

    def _read(self) -> None:
        """Read the losses of the unread steps; collective."""
        unread, self._unread = self._unread, {}
        if not unread:
            return
        losses = self.trainer.accelerator.reduce(torch.stack(list(unread.values())), "sum")
        for step, loss in zip(unread, losses.tolist(), strict=True):
            self._watch.note(step, loss)


def refuse_weights_not_finite(model: Any) -> None:
    """Raise NemoKDError if a trained weight of the model is NaN or infinite."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    finite = [p.detach().isfinite().all() for _, p in trained if not p.is_meta]
    if not finite or torch.stack([one.to(finite[0].device) for one in finite]).all():
        return
    name = next(name for name, p in trained if not p.is_meta and not p.isfinite().all())
    raise NemoKDError(
        f"weights of the model are NaN or infinite, such as {name}, and are not saved: {REMEDY}"
    )
