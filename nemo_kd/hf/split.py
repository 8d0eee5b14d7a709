"""A causal LM of transformers in two halves: only answer positions need reach the LM head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nemo_kd.errors import NemoKDError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HFTeacherError(NemoKDError):
    """A checkpoint that transformers cannot load completely, or that cannot be a teacher."""


class SplitModel:
    """A causal LM in two halves: tokens to hidden states, and hidden states to logits.

    The second half is the model's own forward with a given decoder output, so that whatever comes
    after the decoder (biases, soft caps, scales) is the model's own too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model

    def hidden(self, tokens: torch.Tensor) -> Any:
        """tokens [B, S] → the decoder's output, `last_hidden_state` [B, S, H].

        Right padding lies in a causal model's future and needs no mask.
        """
        return self.decoder(input_ids=tokens, use_cache=False)

    def logits(self, output: Any, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, H], of any positions of `output` → logits [N, V]."""
        chunk = type(output)(**{**output, "last_hidden_state": hidden.unsqueeze(0)})
        tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with _answering(self.decoder, chunk):
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits[0]
        return logits

    @torch.no_grad()
    def check(self) -> int:
        """V, the number of logits.

        Errors: HFTeacherError for a model whose halves do not give its own logits.
        """
        tokens = torch.arange(16, device=self.model.device).unsqueeze(0)
        full = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        output = self.hidden(tokens)
        halves = self.logits(output, output.last_hidden_state[0]).float()
        # The same operations on the same shapes: what differs is not rounding.
        largest = float(full[full.isfinite()].abs().amax()) if full.isfinite().any() else 0.0
        if halves.shape != full.shape or not torch.allclose(
            halves, full, rtol=0, atol=0.01 * largest, equal_nan=True
        ):
            raise HFTeacherError(
                f"{type(self.model).__name__} does not compute its logits from the last hidden "
                "states of its decoder; it cannot be a teacher"
            )
        return full.shape[-1]


@contextmanager
def _answering(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """Make `module` return `output` without computing anything."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
