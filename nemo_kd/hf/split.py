"""Split a transformers causal LM before its LM head, so that only answer positions reach it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nemo_kd.errors import NemoKDError
from nemo_kd.hf.rope import LengthDependentRope

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HFTeacherError(NemoKDError):
    """Error for a checkpoint that transformers cannot fully load or that cannot be a teacher."""


class SplitModel:
    """A causal LM in two halves: tokens to hidden states, and hidden states to logits.

    The second half runs the model's own forward on a given decoder output, so that all operations
    after the decoder (biases, soft caps, scales) are included.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.rope = LengthDependentRope(model)

    def hidden(self, tokens: torch.Tensor) -> Any:
        """Run the decoder on tokens [B, S]; its output has `last_hidden_state` [B, S, H].

        Right padding needs no mask: in a causal model, earlier positions do not attend to it.
        """
        self.rope.reset()
        return self.decoder(input_ids=tokens, use_cache=False)

    def logits(self, output: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits [N, V] from hidden [N, H], taken from any positions of `output`."""
        chunk = type(output)(**{**output, "last_hidden_state": hidden.unsqueeze(0)})
        tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with _answering(self.decoder, chunk):
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits[0]
        return logits

    @torch.no_grad()
    def check(self) -> int:
        """Check that the two halves reproduce the model's logits; return V, their number.

        Raises HFTeacherError if they do not.
        """
        tokens = torch.arange(16, device=self.model.device).unsqueeze(0)
        self.rope.reset()
        full = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        output = self.hidden(tokens)
        halves = self.logits(output, output.last_hidden_state[0]).float()
        # Both run the same operations on the same shapes, so differences are not due to rounding.
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
    """Context manager that makes `module` return `output` instead of computing its forward."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
