"""From stored samples to micro-batches: teacher tensors only at answer positions."""

from nemo_kd.data.collate import (
    TEACHER_KEYS,
    TeacherRows,
    TeacherSelection,
    collate_teacher,
    teacher_at,
)
from nemo_kd.data.lengths import OVER_LONG, Fitting, cut_prompt, fit_lengths

__all__ = [
    "OVER_LONG",
    "TEACHER_KEYS",
    "Fitting",
    "TeacherRows",
    "TeacherSelection",
    "collate_teacher",
    "cut_prompt",
    "fit_lengths",
    "teacher_at",
]
