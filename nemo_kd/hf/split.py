"""A causal LM of transformers in two halves, so that only answer positions reach the LM head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nemo_kd.errors import NemoKDError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HFTeacherError(NemoKDError):
    """A checkpoint that transformers does not load whole, or that cannot be a teacher here."""


class SplitModel:
    """A causal LM in two: tokens to hidden states, and hidden states to logits.

    The second is the model's own forward with its decoder's output put in, so whatever comes
    after the decoder (biases, soft caps, scales) is the model's own too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model

    def hidden(self, tokens: torch.Tensor) -> Any:
        """tokens [B, S] → the decoder's output, `last_hidden_state` [B, S, H].

        Right padding is a causal model's future: it needs no mask.
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
        """V, the number of logits; refuses a model whose halves do not make the whole."""
        tokens = torch.arange(16, device=self.model.device).unsqueeze(0)
        whole = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        output = self.hidden(tokens)
        halves = self.logits(output, output.last_hidden_state[0]).float()
        # The same operations on the same shapes: what differs is not rounding.
        largest = float(whole[whole.isfinite()].abs().amax()) if whole.isfinite().any() else 0.0
        if halves.shape != whole.shape or not torch.allclose(
            halves, whole, rtol=0, atol=0.01 * largest, equal_nan=True
        ):
            raise HFTeacherError(
                f"{type(self.model).__name__} does not compute its logits from the last hidden "
                "states of its decoder; it cannot be a teacher here"
            )
        return whole.shape[-1]


@contextmanager
def _answering(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """Within it `module` computes nothing and returns `output`."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
