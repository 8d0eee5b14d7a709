"""The stores of a mix against the loss, and what each process needs of a batch."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import nemo_kd.mcore.dataset as dataset
from nemo_kd.data import context_parallel_positions
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


@pytest.mark.parametrize("packed", [False, True])
def test_stages_before_the_last_decode_no_teachers_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """The rest of their batches is that of the last stage."""
    monkeypatch.setattr(dataset, "own_positions", lambda length: None)
    samples = [sample(i, spec(), 3 + i, prompt=4) for i in range(4)]
    store = Store(write(tmp_path, spec(), samples))
    data = KDDataset(store, seq_length=9, packed=packed, over_long="truncate", shuffle=False)
    draws = range(len(data))
    monkeypatch.setattr(dataset, "on_last_stage", lambda: True)
    data.place()
    last = [data.collate_fn([data[draw]]) for draw in draws]
    monkeypatch.setattr(dataset, "on_last_stage", lambda: False)
    monkeypatch.setattr(Store, "__getitem__", None)  # it decodes
    data.place()
    for draw, expected in zip(draws, last, strict=True):
        batch = data.collate_fn([data[draw]])
        assert batch.pop("answers") is None
        assert expected.pop("answer_tokens") == batch.pop("answer_tokens")
        assert len(expected.pop("answers").positions) == int((batch["loss_mask"] != 0).sum())
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            same = value.equal(batch[name]) if hasattr(value, "equal") else value == batch[name]
            assert same, name


def test_a_worker_without_process_groups_has_the_positions_of_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data loader's worker that is spawned, not forked, unpickles the data set."""
    store = Store(write(tmp_path, spec(), [sample(0, spec(), 6, prompt=4)]))
    data = KDDataset(store, seq_length=16)
    monkeypatch.setattr(dataset, "on_last_stage", lambda: True)
    second = context_parallel_positions(16, 1, 2)
    monkeypatch.setattr(dataset, "own_positions", lambda length: second)
    data.place()
    monkeypatch.setattr(dataset, "own_positions", lambda length: None)  # as without groups
    worker = pickle.loads(pickle.dumps(data))
    batch = worker.collate_fn([worker[0]])
    assert batch["position_ids"].equal(second[None])
    assert batch["answer_tokens"] == 6 > len(batch["answers"].positions)
