"""On-disk store of a teacher's top-K logits: compact, checksummed and written atomically.

`StoreWriter` writes `Sample`s to a directory of shards; `Store` reads them back in any order.
`StoreSpec` holds the settings that determine a store's bytes, `Manifest` lists its files. The
functions implement the `nemo-kd` commands of the same purpose. docs/store.md specifies the format.
"""

from nemo_kd.errors import StoreError
from nemo_kd.store.manifest import Manifest
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Sample
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.average import average
from nemo_kd.store.tools.copying import pull, push
from nemo_kd.store.tools.jsonl import read_jsonl, write_jsonl
from nemo_kd.store.tools.pack import pack
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
    "pack",
    "pull",
    "push",
    "read_jsonl",
    "split",
    "stats",
    "verify",
    "write_jsonl",
    "write_samples",
]
