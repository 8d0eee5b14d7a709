"""One step of generation: choose the next token from the logits and select the top-K to store.

greedy    next = argmax_v z_v, ties to the lower id
sampling  next ~ softmax(z / temperature), restricted to the smallest set with mass `top_p`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.rows import Row
from nemo_kd.teacher.sampling import uniforms
from nemo_kd.teacher.select import Selection, joined
from nemo_kd.topk import TopK

HEAD = 512
"""Most probable tokens that are put in order to draw one; a draw beyond them orders all."""


class GenerationError(NemoKDError):
    """Settings, prompts or filters with which generation is impossible."""


@dataclass(frozen=True)
class Decoding:
    """Decoding settings."""

    max_new_tokens: int
    """Maximum number of tokens per answer, including the stop token."""

    stop_ids: tuple[int, ...]
    """Tokens that end an answer and are part of it: the tokenizer's end of sequence, the user's
    stop ids, and those of the checkpoint's generation_config.json."""

    temperature: float = 0.0
    """Sampling temperature; 0 means greedy decoding."""

    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens with this total probability."""

    samples_per_prompt: int = 1
    """Number of answers per prompt."""

    seed: int = 0
    """Random seed; each random number depends only on seed, row, sample and position."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise GenerationError(f"generation.{name} must be at least 1")
        if self.temperature < 0:
            raise GenerationError(f"generation.temperature={self.temperature} is below 0")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"generation.top_p={self.top_p} is not in (0, 1]")
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise GenerationError(
                f"generation.samples_per_prompt={self.samples_per_prompt} with temperature 0 would "
                "generate the same answer each time; set generation.temperature above 0"
            )
        if self.top_p < 1 and self.temperature == 0:
            raise GenerationError(
                f"generation.top_p={self.top_p} with temperature 0 has no effect: only the most "
                "probable token is chosen; set generation.temperature above 0, or leave it out"
            )


def are_distributions(logits: Tensor) -> Tensor:
    """Return [B] bool, whether the softmax of logits [B, V] is defined: no NaN, no +inf, and not
    all -inf."""
    return logits.amax(-1).isfinite()  # the maximum of NaN is NaN


def choose(logits: Tensor, uniform: Tensor, decoding: Decoding) -> Tensor:
    """Choose the next tokens [B] int64 from logits [B, V] and uniform [B] float64 in [0, 1).

    Raises GenerationError if the softmax of any of the logits is not defined.
    """
    if not are_distributions(logits).all():
        raise GenerationError(
            "the teacher's logits are not a distribution (NaN, +inf, or all -inf); check the "
            "checkpoint and trainer.precision"
        )
    return _choose(logits, uniform, decoding)


def _choose(logits: Tensor, uniform: Tensor, decoding: Decoding) -> Tensor:
    if decoding.temperature == 0:
        return logits.argmax(-1)  # ties go to the lower id
    below = logits.double()
    below = below - below.amax(-1, keepdim=True)  # [B, V], at most 0: logits / T could overflow
    # CUDA multiplies by 1 / T, which is inf for the smallest T; 0 · inf would be NaN.
    scaled = torch.where(below == 0, below, below / decoding.temperature)
    probability = torch.softmax(scaled, -1)
    point = uniform.to(probability.device).unsqueeze(-1)  # [B, 1]
    if probability.shape[-1] <= HEAD:
        return _drawn(*_ordered(probability), point, decoding.top_p)
    # The order of the whole vocabulary is only needed for a token that is not among the first.
    values, ids = probability.topk(HEAD)
    ids, at = ids.sort()
    values, at = _ordered(values.gather(-1, at))
    ids = ids.gather(-1, at)
    whole = probability.sum(-1, keepdim=True) if decoding.top_p == 1 else None
    chosen = _drawn(values, ids, point, decoding.top_p, whole)
    known = probability.gather(-1, chosen.unsqueeze(-1)) > values[:, -1:]
    if whole is None:
        known &= values.sum(-1, keepdim=True) >= decoding.top_p
    rest = ~known.squeeze(-1)
    if rest.any():
        chosen[rest] = _drawn(*_ordered(probability[rest]), point[rest], decoding.top_p)
    return chosen


def _ordered(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and indices [B, n] in descending order; of equal ones the lower index first."""
    values, ids = probability.sort(dim=-1, descending=True, stable=True)
    return values, ids


def _drawn(
    values: Tensor, ids: Tensor, uniform: Tensor, top_p: float, whole: Tensor | None = None
) -> Tensor:
    """Draw from the smallest leading part of descending probabilities that has `top_p`.

    values, ids [B, n], uniform [B, 1]. `whole` [B, 1]: mass to draw from, if more than that of the
    values; a draw beyond them is their last. Returns ids [B].
    """
    mass = values.cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    total = mass.gather(-1, last) if whole is None else whole  # [B, 1]
    index = torch.minimum(torch.searchsorted(mass, uniform * total, right=True), last)
    return ids.gather(-1, index).squeeze(-1)


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt for one answer; `len` is its length with a maximal answer.

    Store row `row` holds answer `row % samples_per_prompt` to prompt `row // samples_per_prompt`.
    """

    row: int
    """Row number in the store."""

    ids: tuple[int, ...]

    room: int
    """Maximum number of tokens of the answer."""

    truncated: bool = False
    """Whether the prompt lost tokens to leave this room."""

    def __len__(self) -> int:
        return len(self.ids) + self.room


class Answers:
    """The growing answers to a batch of B prompts, with the top-K of each generated token."""

    def __init__(self, prompts: Sequence[Prompt], decoding: Decoding, select: Selection) -> None:
        self.prompts = prompts
        self.decoding = decoding
        self.select = select
        length = decoding.max_new_tokens
        self.uniform = torch.stack([uniforms(decoding.seed, p.row, length) for p in prompts])
        self.draws = self._draws()
        self.stops = torch.tensor(decoding.stop_ids)
        self.open = torch.ones(len(prompts), dtype=torch.bool)
        self.length = torch.zeros(len(prompts), dtype=torch.int64)
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.own: list[list[Tensor]] = [[] for _ in prompts]
        """The logit of each generated token, per answer."""
        self._kept: list[list[TopK]] = [[] for _ in prompts]

    def _draws(self) -> Tensor:
        """Return the selection's random numbers [B, max_new_tokens], as a dump would use."""
        length = self.decoding.max_new_tokens
        ones = np.ones(1 + length, np.uint8)
        rows = [Row(p.row, np.zeros(1 + length, np.int32), ones) for p in self.prompts]
        return self.select.uniform(rows).view(len(rows), length)

    def step(
        self, logits: Tensor, *, shard: Tensor | None = None, ready: Tensor | None = None
    ) -> Tensor:
        """Append the next token to each open answer, given its logits [B, ≥ V].

        Returns the tokens [B] int64 on the CPU. If `ready` [B] is given, only answers for which it
        is set grow; for answers that do not grow, the returned token is a stop token. `shard`
        [B, Vp] is this rank's part of `logits`, used for the selection; all ranks of the tensor
        group must take the same steps. An answer whose logits are no distribution ends: its top-K,
        which `usable` refuses, says so.
        """
        ids = torch.full((len(self.prompts),), self.decoding.stop_ids[0])
        rows = (self.open if ready is None else self.open & ready).nonzero()[:, 0]  # [n]
        if len(rows):
            position = self.length[rows]
            here = rows.to(logits.device)
            part = (logits if shard is None else shard)[here]
            topk = joined([self.select(part, self.draws[rows, position])])
            valid = logits[here, : self.select.spec.vocab_size].float()
            chosen = self._chosen(valid, self.uniform[rows, position])  # [n]
            ids[rows] = chosen.cpu()
            own = valid.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).cpu()
            for i, b in enumerate(rows.tolist()):
                self.ids[b].append(int(ids[b]))
                self.own[b].append(own[i])
                self._kept[b].append(topk[i : i + 1])
            self.length[rows] += 1
            ended = torch.isin(ids[rows], self.stops)
            self.open[rows] = ~ended & (self.length[rows] < self.decoding.max_new_tokens)
        return ids

    def _chosen(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Return the next tokens [n] for logits [n, V]; a stop token where there is none."""
        usable = are_distributions(logits)
        if usable.all():
            return _choose(logits, uniform, self.decoding)
        chosen = torch.full((len(logits),), self.decoding.stop_ids[0], device=logits.device)
        chosen[usable] = _choose(logits[usable], uniform[usable.to(uniform.device)], self.decoding)
        return chosen

    def finished(self, b: int) -> bool:
        """Return whether answer b ends with a stop token, not because of `max_new_tokens`."""
        return self.ids[b][-1] in self.decoding.stop_ids

    def rows(self) -> list[tuple[Row, TopK]]:
        """Return each prompt with its answer as a row, and the top-K of its answer tokens."""
        return [(self._row(b), joined(kept)) for b, kept in enumerate(self._kept)]

    def _row(self, b: int) -> Row:
        prompt, ids = self.prompts[b], self.ids[b]
        mask = [0] * len(prompt.ids) + [1] * len(ids)
        tokens = np.array([*prompt.ids, *ids], dtype=np.int32)
        return Row(prompt.row, tokens, np.array(mask, dtype=np.uint8), prompt.truncated)
