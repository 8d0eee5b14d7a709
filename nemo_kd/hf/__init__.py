"""Hugging Face: teachers run by transformers, and stores in other trainers than NeMo's.

Needs neither NeMo nor Megatron; the names below need only torch and the extra `store`.
"""

from nemo_kd.hf.collator import StoreCollator
from nemo_kd.hf.dataset import StoreDataset
from nemo_kd.hf.mixin import StoreLossMixin

__all__ = ["StoreCollator", "StoreDataset", "StoreLossMixin"]
