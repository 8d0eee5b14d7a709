"""From stored samples to micro-batches, with teacher rows at answer tokens only."""

from nemo_kd.data.collate import AnswerTokens, answer_tokens, joined, no_teacher, teacher_of
from nemo_kd.data.context import context_parallel_positions
from nemo_kd.data.learnable import Naming, StoreFacts, check_learnable, check_schedule
from nemo_kd.data.lengths import (
    OVER_LONG,
    OVER_LONG_ALIASES,
    Fitting,
    LengthLimit,
    fit_lengths,
    truncate_prompt,
)
from nemo_kd.data.notices import notices
from nemo_kd.data.packed_batch import collate_packs
from nemo_kd.data.packing import Packing, Packs, first_fit_decreasing, pack_samples

__all__ = [
    "OVER_LONG",
    "OVER_LONG_ALIASES",
    "AnswerTokens",
    "Fitting",
    "LengthLimit",
    "Naming",
    "Packing",
    "Packs",
    "StoreFacts",
    "answer_tokens",
    "check_learnable",
    "check_schedule",
    "collate_packs",
    "context_parallel_positions",
    "first_fit_decreasing",
    "fit_lengths",
    "joined",
    "no_teacher",
    "notices",
    "pack_samples",
    "teacher_of",
    "truncate_prompt",
]
