"""The stores of a mix against the loss, before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, KDSchedule
from nemo_kd.mcore import KDDataset, Source
from nemo_kd.mcore.megatron_lm import option
from nemo_kd.store import Store
from tests.store.samples import sample, spec, write


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (KDConfig(sft_weight=1.0, kd_weight=4.0), "use --kd-alpha for the others, not --kd-sft-w"),
        (KDSchedule(alpha=0.9, alpha_end=0.1), "--kd-alpha-end=0.1 has no effect on the training"),
    ],
)
def test_weights_that_the_alphas_of_stores_contradict_are_refused(
    tmp_path: Path, config: KDConfig, message: str
) -> None:
    store = Store(write(tmp_path, spec(), [sample(i, spec(), 3) for i in range(4)]))
    with pytest.raises(NemoKDError, match=message):
        KDDataset(Source(store, 0.5), seq_length=127).check(config, naming=option)
    KDDataset(store, seq_length=127).check(config, naming=option)
