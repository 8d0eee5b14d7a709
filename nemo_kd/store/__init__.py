"""The store: what the teacher said, small, verified, and never half-written.

`StoreWriter` makes a directory of shards from `Sample`s, `Store` reads it back in any order;
`StoreSpec` is what decides its bytes, `Manifest` what is in it. See docs/store.md.
"""

from nemo_kd.errors import StoreError
from nemo_kd.store.manifest import Manifest
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Sample
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.jsonl import read_jsonl, write_jsonl
from nemo_kd.store.writer import ShardWriter, StoreWriter

__all__ = [
    "Manifest",
    "Sample",
    "ShardWriter",
    "Store",
    "StoreError",
    "StoreSpec",
    "StoreWriter",
    "read_jsonl",
    "write_jsonl",
]
