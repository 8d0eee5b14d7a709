"""From stored samples to micro-batches: teacher tensors only at answer positions."""

from nemo_kd.data.collate import TEACHER_KEYS, TeacherSelection, collate_teacher, teacher_at

__all__ = ["TEACHER_KEYS", "TeacherSelection", "collate_teacher", "teacher_at"]
