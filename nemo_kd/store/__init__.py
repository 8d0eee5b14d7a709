"""The store: a teacher's top-K logits on disk, small, verified and never half-written.

`StoreWriter` writes a directory of shards from `Sample`s, `Store` reads them in any order.
`StoreSpec` decides a store's bytes, `Manifest` lists them. The other functions do what the
commands of `nemo-kd` do. The format: docs/store.md.
"""

from nemo_kd.errors import StoreError
from nemo_kd.store.manifest import Manifest
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Sample
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.average import average
from nemo_kd.store.tools.jsonl import read_jsonl, write_jsonl
from nemo_kd.store.tools.stats import stats
from nemo_kd.store.tools.transform import convert, merge, split, write_samples
from nemo_kd.store.tools.verify import Problem, verify
from nemo_kd.store.writer import ShardWriter, StoreWriter

__all__ = [
    "Manifest",
    "Problem",
    "Sample",
    "ShardWriter",
    "Store",
    "StoreError",
    "StoreSpec",
    "StoreWriter",
    "average",
    "convert",
    "merge",
    "read_jsonl",
    "split",
    "stats",
    "verify",
    "write_jsonl",
    "write_samples",
]
