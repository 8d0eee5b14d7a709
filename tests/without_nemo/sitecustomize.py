"""Hides NeMo, Lightning and Megatron from a Python whose PYTHONPATH has this directory."""

import sys
from importlib.machinery import PathFinder

HIDDEN = ("nemo", "lightning", "pytorch_lightning", "megatron")


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
