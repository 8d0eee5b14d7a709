"""From stored samples to micro-batches: teacher tensors only at answer positions."""

from nemo_kd.data.collate import (
    TEACHER_KEYS,
    TeacherRows,
    TeacherSelection,
    collate_teacher,
    teacher_at,
)
from nemo_kd.data.lengths import OVER_LONG, Fitting, cut_prompt, fit_lengths
from nemo_kd.data.packing import Packs, first_fit_decreasing

__all__ = [
    "OVER_LONG",
    "TEACHER_KEYS",
    "Fitting",
    "Packs",
    "TeacherRows",
    "TeacherSelection",
    "collate_teacher",
    "cut_prompt",
    "first_fit_decreasing",
    "fit_lengths",
    "teacher_at",
]
