"""Generate answers with a Megatron-core model and its key-value cache, at any TP and PP.

The first pass of a batch covers the length of its shortest prompt, and each later pass one token.
A longer prompt is fed its own next token instead of a chosen one. This needs no left padding, and
little is wasted if the prompts of a batch have similar lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from nemo_kd.mcore.lm_head import gpt_module, in_head_dtype, split_lm_head
from nemo_kd.mcore.teacher import forward_only
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.forward import LMHead
from nemo_kd.teacher.generation.step import Answers, Decoding, GenerationError, Prompt
from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.select import Selection


class MegatronWriter:
    """A `teacher.interface.Writer` on any tensor and pipeline layout.

    `model`: this stage's GPTModel in its wrappers, as for `TopKForward`.

    Collectives: those of the model's forward pass; on the last stage an all-gather of the logits of
    B tokens and those of `Selection`, over the tensor-parallel group; a broadcast of the B chosen
    tokens over the pipeline.
    """

    def __init__(
        self, model: torch.nn.Module, spec: StoreSpec, layout: Layout, decoding: Decoding
    ) -> None:
        self.model, self.device = model, layout.device
        self.gpt = gpt_module(model)
        if self.gpt.config.sequence_parallel:
            raise GenerationError(
                "sequence parallelism cannot divide the single token of a generation step; set "
                "model.sequence_parallel=false"
            )
        self.decoding = decoding
        self.select = Selection(spec, layout.tensor_group)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt]) -> Answers | None:
        """Generate the answers to `prompts`.

        Returns them on the last pipeline stage, the same on every tensor-parallel rank; None on
        the other stages.
        """
        answers = Answers(prompts, self.decoding, self.select)
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        size = int(lengths.max()) + self.decoding.max_new_tokens
        tokens = torch.zeros(len(prompts), size, dtype=torch.int64)
        for b, prompt in enumerate(prompts):
            tokens[b, : len(prompt.ids)] = torch.tensor(prompt.ids)
        cache = StaticInferenceContext(len(prompts), size)
        start, end = 0, int(lengths.min())
        with split_lm_head(self.gpt) as head:
            while True:
                ready = lengths <= end
                chosen, left = self._pass(tokens[:, start:end], cache, head, answers, ready)
                if not left:
                    break
                tokens[ready, end] = chosen[ready]
                cache.sequence_len_offset = start = end
                end += 1
        return None if head is None else answers

    def _pass(
        self,
        tokens: torch.Tensor,
        cache: StaticInferenceContext,
        head: LMHead | None,
        answers: Answers,
        ready: torch.Tensor,
    ) -> tuple[torch.Tensor, bool]:
        """Run the model on the tokens [B, s] that follow those in the cache.

        Returns the next tokens [B] and whether any answer is unfinished, the same on every rank of
        the replica.
        """
        batch, length = tokens.shape
        first = cache.sequence_len_offset
        positions = torch.arange(first, first + length).expand(batch, -1)

        def step(_: object, model: torch.nn.Module) -> tuple[torch.Tensor, object]:
            output = model(
                input_ids=tokens.to(self.device),
                position_ids=positions.to(self.device),
                attention_mask=None,
                labels=None,
                inference_context=cache,
                runtime_gather_output=True,  # asserted from Megatron-core 0.14 on
            )
            return output, lambda hidden, non_loss_data: self._choose(hidden, head, answers, ready)

        results = forward_only(self.model, step, [None], length=length, micro_batch_size=batch)
        message = torch.zeros(batch + 1, dtype=torch.int64, device=self.device)
        if head is not None:
            message[:batch], message[batch] = results[0].to(self.device), int(answers.open.any())
        torch.distributed.broadcast(
            message,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return message[:batch].cpu(), bool(message[batch])

    def _choose(
        self, hidden: torch.Tensor, head: LMHead | None, answers: Answers, ready: torch.Tensor
    ) -> torch.Tensor:
        """Choose the next tokens [B] from the hidden states [s, B, H] of the last stage."""
        assert head is not None  # the schedule calls this on the last stage only
        config = self.gpt.config
        with torch.autocast("cuda", config.autocast_dtype, enabled=config.enable_autocast):
            shard = head(in_head_dtype(hidden[-1], self.gpt))  # [B, Vp]
        logits = gather_from_tensor_model_parallel_region(shard)  # [B, V padded]
        return answers.step(logits, shard=shard, ready=ready)
