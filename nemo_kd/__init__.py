"""Offline top-K logit distillation for supervised fine-tuning on NeMo/Megatron.

Data flow: `teacher` (dump) → `store` → `data` → `nemo` or `mcore` (training) → `loss`.
"""

__version__ = "0.1.0"
