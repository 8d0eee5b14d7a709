"""Distillation into quantised students."""
