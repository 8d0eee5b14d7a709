"""Hides NeMo, Lightning and Megatron from a Python whose PYTHONPATH has this directory.

HIDDEN in the environment names other packages instead.
"""

import os
import sys
from importlib.machinery import PathFinder

HIDDEN = os.environ.get("HIDDEN", "nemo lightning pytorch_lightning megatron").split()


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
