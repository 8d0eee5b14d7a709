"""Answers that the teacher writes itself, stored with its top-K logits."""
