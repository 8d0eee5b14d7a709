"""One step of writing an answer: from logits to the next token, and to what the store keeps of it.

greedy    next = argmax_v z_v, ties to the lower id
sampling  next ~ softmax(z / temperature), of the fewest tokens that hold `top_p` of its mass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.rows import Row
from nemo_kd.teacher.forward import AnswerTopK
from nemo_kd.teacher.sampling import uniforms
from nemo_kd.teacher.select import Selection


class GenerationError(NemoKDError):
    """Settings, prompts or filters that nothing can be generated with."""


@dataclass(frozen=True)
class Decoding:
    """How answers are written; `stop_ids` are the tokenizer's end-of-sequence and the user's."""

    max_new_tokens: int
    """Of an answer, its stop token included."""

    stop_ids: tuple[int, ...]
    """An answer ends with the first of them, which belongs to it."""

    temperature: float = 0.0
    """0: greedy."""

    top_p: float = 1.0
    """The fewest most probable tokens with this mass are drawn from."""

    samples_per_prompt: int = 1
    """Answers to each prompt."""

    seed: int = 0
    """Of the random numbers; each belongs to one (row, sample, position)."""

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
                "write the same answer again; set generation.temperature above 0"
            )


def choose(logits: Tensor, uniform: Tensor, decoding: Decoding) -> Tensor:
    """logits [B, V], uniform [B] float64 in [0, 1) → the next token of each row, [B] int64."""
    if decoding.temperature == 0:
        return logits.argmax(-1)  # of equal ones the first
    probability = torch.softmax(logits.double() / decoding.temperature, -1)
    ordered, ids = probability.sort(dim=-1, descending=True, stable=True)
    mass = ordered.cumsum(-1)  # [B, V]
    last = (mass < decoding.top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    total = mass.gather(-1, last)  # [B, 1]
    point = uniform.to(total.device).unsqueeze(-1) * total
    place = torch.minimum(torch.searchsorted(mass, point, right=True), last)
    return ids.gather(-1, place).squeeze(-1)


@dataclass(frozen=True)
class Prompt:
    """What answer `row % samples_per_prompt` to prompt `row // samples_per_prompt` follows."""

    row: int
    """Of the store."""

    ids: tuple[int, ...]

    room: int
    """Tokens that the answer may have."""

    def __len__(self) -> int:
        return len(self.ids) + self.room


@dataclass(frozen=True)
class Answer:
    """A answer tokens to one prompt, and the teacher at each."""

    prompt: Prompt
    ids: tuple[int, ...]
    topk: AnswerTopK

    logits: Tensor
    """[A] float32: each token's own."""

    finished: bool
    """It ends with a stop token, not at `max_new_tokens`."""


class Answers:
    """The answers to a batch of prompts, while they grow."""

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
        self.kept: list[list[tuple[Tensor, ...]]] = [[] for _ in prompts]

    def _draws(self) -> Tensor:
        """[B, max_new_tokens]: what the selection draws with, as in a dump of the answers."""
        length = self.decoding.max_new_tokens
        ones = np.ones(1 + length, np.uint8)
        rows = [Row(p.row, np.zeros(1 + length, np.int32), ones) for p in self.prompts]
        return self.select.uniform(rows).view(len(rows), length)

    def step(
        self, logits: Tensor, *, shard: Tensor | None = None, ready: Tensor | None = None
    ) -> Tensor:
        """logits [B, ≥ V] of the next token → its ids [B] int64, on the CPU.

        Only answers that have not ended grow, and of those only where `ready` [B] says so; the
        others' ids are a stop token. `shard` [B, Vp] is this rank's part of `logits`, which the
        selection wants; its group's ranks take the same steps.
        """
        ids = torch.full((len(self.prompts),), self.decoding.stop_ids[0])
        rows = (self.open if ready is None else self.open & ready).nonzero()[:, 0]  # [n]
        if len(rows):
            place = self.length[rows]
            here = rows.to(logits.device)
            topk = self.select((logits if shard is None else shard)[here], self.draws[rows, place])
            valid = logits[here, : self.select.spec.vocab_size].float()
            chosen = choose(valid, self.uniform[rows, place], self.decoding)  # [n]
            ids[rows] = chosen.cpu()
            assert topk.logsumexp is not None
            own = valid.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
            parts = (topk.logits, topk.ids, topk.logsumexp, own)
            kept = zip(*(part.cpu() for part in parts), strict=True)
            for b, one in zip(rows.tolist(), kept, strict=True):
                self.ids[b].append(int(ids[b]))
                self.kept[b].append(one)
            self.length[rows] += 1
            ended = torch.isin(ids[rows], self.stops)
            self.open[rows] = ~ended & (self.length[rows] < self.decoding.max_new_tokens)
        return ids

    def written(self) -> list[Answer]:
        """The answers, once none is open."""
        answers = []
        for prompt, ids, kept in zip(self.prompts, self.ids, self.kept, strict=True):
            *topk, own = map(torch.stack, zip(*kept, strict=True))
            finished = ids[-1] in self.decoding.stop_ids
            answers.append(Answer(prompt, tuple(ids), AnswerTopK(*topk), own, finished))
        return answers
