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


def test_samples_that_two_stores_of_a_mix_have_in_common_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = spec(source={"name": "a.jsonl", "rows": 8, "sha256": "a" * 64})
    whole = Store(write(tmp_path / "s", of, [sample(i, of, 3) for i in range(8)]))
    part = Store(write(tmp_path / "p", of, [sample(i, of, 3) for i in (2, 5)]))
    rest = Store(write(tmp_path / "r", of, [sample(i, of, 3) for i in (3, 4)]))
    KDDataset([Source(part), Source(rest)], seq_length=127)
    assert "in common" not in capsys.readouterr().err
    KDDataset([Source(whole), Source(part)], seq_length=127)
    said = f"{whole.directory} and {part.directory} have 2 samples in common, such as row 2 of"
    assert said in capsys.readouterr().err
