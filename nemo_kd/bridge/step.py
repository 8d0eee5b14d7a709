"""The forward step of Megatron-Bridge's training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_kd.loss import KDConfig
from nemo_kd.mcore.dataset import Batch
from nemo_kd.mcore.training import LossFunction, kd_forward_step

if TYPE_CHECKING:
    from megatron.bridge.training.state import GlobalState


class KDForwardStep:
    """`forward_step_func` of Bridge's `pretrain` and `finetune`; see `kd_forward_step`.

    `config`: a `KDSchedule` follows Bridge's `train_state.step` and `train.train_iters`.
    `vocab_size`: number of ids of the stores' tokenizer; further columns of the logits are padding.
    """

    def __init__(self, config: KDConfig, vocab_size: int) -> None:
        self._state: GlobalState | None = None
        self._step = kd_forward_step(config, vocab_size, progress=self._progress)

    # Bridge passes its state to a parameter of this name and annotation.
    def __call__(
        self,
        state: GlobalState,
        data_iterator: Iterator[Batch],
        model: Any,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, LossFunction]:
        """Run the model on the next micro-batch; return its output and the loss function."""
        self._state = state
        return self._step(data_iterator, model, return_schedule_plan)

    def _progress(self) -> tuple[int, int]:
        assert self._state is not None  # a loss is computed within a step
        return self._state.train_state.step, self._state.cfg.train.train_iters
