"""Distillation in trainers of transformers' kind."""
