"""Going on after a kill exactly where the checkpoint was: same samples, same stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingBatchSampler,
)

from nemo_kd.store import Store, StoreError
from nemo_kd.teacher.fingerprint import file_sha256

CHECKPOINT_KEY = "nemo_kd"


class WholeRunBatchSampler(MegatronPretrainingBatchSampler):
    """NeMo's sampler with the batches of the whole run for its length.

    NeMo's is what remains to be consumed, and Lightning, which remembers how many batches it has
    had, would end the epoch early and begin again with the first samples.
    """

    def __len__(self) -> int:
        whole, rest = divmod(self.total_samples, self.global_batch_size)
        return whole + bool(rest and not self.drop_last)


def trained_on(datasets: Sequence[Any]) -> list[dict[str, str]]:
    """Where the data of these data sets is, and a fingerprint of all its bytes."""
    return [_origin(dataset) for dataset in datasets]


def _origin(dataset: Any) -> dict[str, str]:
    store = getattr(dataset, "store", None)
    if isinstance(store, Store):
        return {"path": str(store.directory), "fingerprint": store.fingerprint}
    path = Path(dataset.file_path)
    return {"path": str(path), "fingerprint": file_sha256(path)}


def remember_data(data: list[dict[str, str]], checkpoint: dict[str, Any], kd: Any) -> None:
    """Into a checkpoint: what the student is trained on (`trained_on`), and how."""
    checkpoint[CHECKPOINT_KEY] = {"train_stores": data, "kd": kd}


def check_same_data(data: list[dict[str, str]], checkpoint: dict[str, Any]) -> None:
    """Refuse to go on with other training data than the checkpoint's.

    Errors: StoreError that names both, for other stores or files, another order, or none.
    """
    if CHECKPOINT_KEY not in checkpoint:  # NeMo's own, or an SFT run's
        return
    then = checkpoint[CHECKPOINT_KEY]["train_stores"]
    if [origin["fingerprint"] for origin in then] == [origin["fingerprint"] for origin in data]:
        return
    before, now = (
        ", ".join(f"{origin['path']} ({origin['fingerprint'][:12]})" for origin in origins)
        for origins in (then, data)
    )
    raise StoreError(
        f"the checkpoint to resume from was trained on {before or 'no store'}, but "
        f"the training data now is {now or 'no store'}; go on with the same, or start a new run in "
        "another exp_manager.explicit_log_dir (its student may be the .nemo of this one)"
    )
