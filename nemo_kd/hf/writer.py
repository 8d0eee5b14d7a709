"""Generation by a transformers model, with its own `generate` and key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from nemo_kd.hf.split import SplitModel
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.generation.step import Answers, Decoding, GenerationError, Prompt
from nemo_kd.teacher.select import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative to the largest logit: bf16 rounding over many layers stays below it; the error of a wrong
# position or mask exceeds it.
TOLERANCE = 0.03


class HFWriter:
    """Implementation of `teacher.interface.Writer`.

    `generate` handles each model's cache and positions. The next token is chosen by
    `Answers.step` from the model's own logits, whatever `generation_config.json` says about
    sampling.

    For models with a fixed-size cache (Gemma 2 and 3, Cohere 2) the cache is disabled, because in
    transformers 4.51 it drops a key too early. One answer of the first batch is compared with a
    pass without a cache.
    """

    def __init__(self, model: PreTrainedModel, spec: StoreSpec, decoding: Decoding) -> None:
        self.model, self.split = model, SplitModel(model)
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
    def __call__(self, prompts: Sequence[Prompt]) -> Answers:
        answers = Answers(prompts, self.decoding, self.select)
        longest = max(len(prompt.ids) for prompt in prompts)
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for b, prompt in enumerate(prompts):  # left padding: all answers start at the same position
            tokens[b, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[b, longest - len(prompt.ids) :] = 1
        self.split.rope.reset()
        self.model.generate(
            tokens.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=self.settings,
            use_model_defaults=False,
            logits_processor=LogitsProcessorList([_Chooser(answers)]),
        )
        if not self.checked:
            self._check(answers)
            self.checked = True
        return answers

    def _check(self, answers: Answers) -> None:
        """Raise GenerationError if the model's cache or left padding changes its logits."""
        # The shortest prompt has the most padding.
        b = min(range(len(answers.prompts)), key=lambda b: len(answers.prompts[b].ids))
        prompt, answer = answers.prompts[b].ids, answers.ids[b]
        split = self.split
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=self.model.device)
        output = split.hidden(ids)
        hidden = output.last_hidden_state[0, len(prompt) - 1 :]
        logits = split.logits(output, hidden).float().cpu()  # [A, V]
        own = logits[torch.arange(len(answer)), answer]
        # The median is robust: in a mixture of experts, rounding may route some tokens differently.
        apart = (torch.stack(answers.own[b]) - own).abs().median()
        finite = logits[logits.isfinite()]  # empty if all are NaN, which is checked elsewhere
        if finite.numel() and apart > TOLERANCE * finite.abs().max():
            raise GenerationError(
                f"the logits with which {type(self.model).__name__} generates differ by "
                f"{apart:.2g} from those of a plain pass over the same tokens: its key-value cache "
                "or its left padding is wrong in this version of transformers; generate one answer "
                "at a time (model.micro_batch_size=1), or convert the teacher to .nemo"
            )


class _Chooser(LogitsProcessor):
    """Logits processor that chooses the next token and masks all other logits."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self.answers.step(scores).to(scores.device).unsqueeze(-1)  # [B, 1]
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)
