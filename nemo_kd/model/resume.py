"""Going on after a kill exactly where the checkpoint was: same samples, same stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingBatchSampler,
)

from nemo_kd.store import Store, StoreError

CHECKPOINT_KEY = "nemo_kd"


class WholeRunBatchSampler(MegatronPretrainingBatchSampler):
    """NeMo's sampler with the batches of the whole run for its length.

    NeMo's is what remains to be consumed, and Lightning, which remembers how many batches it has
    had, would end the epoch early and begin again with the first samples.
    """

    def __len__(self) -> int:
        whole, rest = divmod(self.total_samples, self.global_batch_size)
        return whole + bool(rest and not self.drop_last)


def trained_on(stores: Sequence[Store]) -> list[dict[str, str]]:
    """Where the stores are, and the fingerprint of all their bytes."""
    return [{"path": str(s.directory), "fingerprint": s.fingerprint} for s in stores]


def remember_stores(stores: Sequence[Store], checkpoint: dict[str, Any], kd: Any) -> None:
    """Into a checkpoint: which stores the student is trained on, and how."""
    checkpoint[CHECKPOINT_KEY] = {"train_stores": trained_on(stores), "kd": kd}


def check_same_stores(stores: Sequence[Store], checkpoint: dict[str, Any]) -> None:
    """Refuse to go on with other training data than the checkpoint's.

    Errors: StoreError that names both, for other stores, another order of them, or none.
    """
    if CHECKPOINT_KEY not in checkpoint:  # NeMo's own, or an SFT run's
        return
    then = checkpoint[CHECKPOINT_KEY]["train_stores"]
    if [store["fingerprint"] for store in then] == [store.fingerprint for store in stores]:
        return
    before = ", ".join(f"{s['path']} ({s['fingerprint'][:12]})" for s in then) or "none"
    now = ", ".join(f"{s.directory} ({s.fingerprint[:12]})" for s in stores) or "none"
    raise StoreError(
        f"the checkpoint to resume from was trained on the stores {before}, but "
        f"model.data.train_ds.store is {now}; go on with the same stores, or start a new run in "
        "another exp_manager.explicit_log_dir (its student may be the .nemo of this one)"
    )
