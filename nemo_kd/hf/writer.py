"""Answers by a model of transformers: its own `generate`, with its key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from nemo_kd.hf.split import SplitModel
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.generation.step import Answer, Answers, Decoding, GenerationError, Prompt
from nemo_kd.teacher.select import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the largest logit: bf16 over many layers stays below it, a wrong position or mask does not.
TOLERANCE = 0.03


class HFWriter:
    """Prompts in, answers with the teacher's top-K at each of their tokens out.

    `generate` knows each model's cache and positions; the next token is chosen here, from the
    model's own logits, whatever its `generation_config.json` says of sampling.

    Models that ask for a cache of fixed size (Gemma 2 and 3, Cohere 2) go without one: it drops a
    key too early in transformers 4.51. The first batch is held against a pass without a cache.
    """

    def __init__(self, model: PreTrainedModel, spec: StoreSpec, decoding: Decoding) -> None:
        self.model = model
        self.decoding = decoding
        self.select = Selection(spec)
        self.settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=list(decoding.stop_ids),
            pad_token_id=decoding.stop_ids[0],
            use_cache=not getattr(model.config.get_text_config(), "cache_implementation", None),
            disable_compile=True,
        )
        self.checked = False

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        answers = Answers(prompts, self.decoding, self.select)
        longest = max(len(prompt.ids) for prompt in prompts)
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for b, prompt in enumerate(prompts):  # padded on the left: all answers begin at one place
            tokens[b, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[b, longest - len(prompt.ids) :] = 1
        self.model.generate(
            tokens.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=self.settings,
            use_model_defaults=False,
            logits_processor=LogitsProcessorList([_Chooser(answers)]),
        )
        written = answers.written()
        if not self.checked:
            # The shortest prompt has most padding.
            self._check(min(written, key=lambda answer: len(answer.prompt.ids)))
            self.checked = True
        return written

    def _check(self, answer: Answer) -> None:
        """Refuse a model whose cache, or whose padding, gives other logits than a plain pass."""
        split = SplitModel(self.model)
        before = len(answer.prompt.ids) - 1
        ids = torch.tensor([answer.prompt.ids + answer.ids[:-1]], device=self.model.device)
        output = split.hidden(ids)
        logits = split.logits(output, output.last_hidden_state[0, before:]).float().cpu()  # [A, V]
        own = logits[torch.arange(len(answer.ids)), list(answer.ids)]
        # The median: rounding may send a token of a mixture of experts another way.
        apart = (answer.logits - own).abs().median()
        finite = logits[logits.isfinite()]  # none where the teacher gives NaN: said elsewhere
        if finite.numel() and apart > TOLERANCE * finite.abs().max():
            raise GenerationError(
                f"{type(self.model).__name__} writes with logits that differ from those of a pass "
                f"over the same tokens by {apart:.2g}: its key-value cache or its padding on the "
                "left is wrong in this version of transformers; write one prompt at a time "
                "(model.micro_batch_size=1), or use a .nemo of it"
            )


class _Chooser(LogitsProcessor):
    """Leaves `generate` the chosen token alone."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self.answers.step(scores).to(scores.device).unsqueeze(-1)  # [B, 1]
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)
