"""Distillation in Megatron-Bridge."""
