"""Offline top-K logit distillation for supervised fine-tuning on NeMo/Megatron.

The data's way: `teacher` (dump) → `store` → `data` → `model` → `loss`.
"""

__version__ = "0.1.0"
