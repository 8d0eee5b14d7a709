"""From stored samples to micro-batches: teacher tensors only at answer positions."""

from nemo_kd.data.collate import (
    TEACHER_KEYS,
    TeacherRows,
    TeacherSelection,
    collate_teacher,
    teacher_at,
)
from nemo_kd.data.context import context_parallel_positions
from nemo_kd.data.learnable import check_learnable
from nemo_kd.data.lengths import OVER_LONG, Fitting, cut_prompt, fit_lengths
from nemo_kd.data.packed_batch import collate_packs
from nemo_kd.data.packing import Packing, Packs, first_fit_decreasing, pack_samples

__all__ = [
    "OVER_LONG",
    "TEACHER_KEYS",
    "Fitting",
    "Packing",
    "Packs",
    "TeacherRows",
    "TeacherSelection",
    "check_learnable",
    "collate_packs",
    "collate_teacher",
    "context_parallel_positions",
    "cut_prompt",
    "first_fit_decreasing",
    "fit_lengths",
    "pack_samples",
    "teacher_at",
]
