"""AdamW whose state Megatron's checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class ShardableAdamW(torch.optim.AdamW):
    """AdamW that keeps `step` in the parameter group, like apex's FusedAdam.

    torch's AdamW keeps a scalar `step` for each parameter; Megatron's sharded optimizer state
    accepts only tensors of the parameter's shape. The arithmetic is torch's `adamw`.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        both = (betas[0], betas[1])  # YAML gives a list
        super().__init__(params, lr=lr, betas=both, eps=eps, weight_decay=weight_decay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's needs each parameter's `step`

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        done = float(group.get("step", 0))
        adamw(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(done) for _ in params],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        group["step"] = int(done) + 1


def register_adamw() -> None:
    """Make it NeMo's `adamw`, whose state torch's class could not save."""
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    AVAILABLE_OPTIMIZERS["adamw"] = ShardableAdamW
