"""Batches for other trainers: their loss is that of each sample alone, whatever moves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import utils
from torch import Tensor
from torch.utils.data import DataLoader

from nemo_kd.errors import NemoKDError
from nemo_kd.hf import StoreCollator, StoreDataset
from nemo_kd.loss import KDConfig, KDSchedule
from nemo_kd.store import Store, StoreError
from tests.bare import extra, run_bare
from tests.conftest import ROOT
from tests.hf.student import (
    COLUMNS,
    VOCABULARY,
    assert_gradients,
    expected,
    expected_losses,
    student,
    write_store,
)
from tests.store.samples import sample, spec, write

Batch = dict[str, Tensor]
CONFIGS = [
    KDConfig(alpha=0.5),
    KDConfig(alpha=0.9, temperature=2.0),
    KDConfig(sft_weight=0.3, kd_weight=2.0, support="topk", divergence="jsd"),
    KDConfig(alpha=1.0, support="vocab"),
    KDConfig(alpha=0.0),
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store")


def logits_of(model: Any, batch: Batch) -> Tensor:
    of: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return of


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pad_to", [None, 20])
def test_a_batchs_loss_and_gradient_are_the_mean_over_its_answer_tokens(
    store: Path, config: KDConfig, pad_to: int | None
) -> None:
    data = StoreDataset(store, config)
    collator = StoreCollator(data, pad_token_id=5, pad_to=pad_to)
    batch = collator([data[i] for i in range(len(data))])
    model = student()
    loss = collator.loss(logits_of(model, batch), batch)
    loss.backward()
    value, gradients = expected(config, store)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert_gradients(model, gradients)


@pytest.mark.parametrize("form", [int, torch.tensor, lambda n: torch.tensor([[n], [n]])])
def test_the_number_of_items_divides_in_each_form_that_trainers_give(
    store: Path, form: Callable[[int], Any]
) -> None:
    """A number, a tensor, or repeated for each device of a process."""
    data = StoreDataset(store, KDConfig())
    collator = StoreCollator(data)
    batch = collator([data[0], data[1]])
    logits = torch.zeros(*batch["labels"].shape, COLUMNS)
    mean = collator.loss(logits, batch)
    torch.testing.assert_close(collator.loss(logits, batch, form(50)), mean * 5 / 50)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_batches_of_a_step_add_up_to_one(store: Path, size: int) -> None:
    config = KDConfig(alpha=0.7, temperature=2.0)
    data = StoreDataset(store, config)
    collator = StoreCollator(data)
    batches = list(DataLoader(data, batch_size=size, collate_fn=collator))
    count = sum((batch["labels"] != -100).sum() for batch in batches)
    model = student()
    total = 0.0
    for batch in batches:
        loss = collator.loss(logits_of(model, batch), batch, count)
        loss.backward()
        total += loss.item()
    value, gradients = expected(config, store)
    assert total == pytest.approx(value, rel=1e-6)
    assert_gradients(model, gradients)


def test_each_position_has_the_loss_of_the_next_token(store: Path) -> None:
    config = KDConfig(alpha=0.5)
    data = StoreDataset(store, config)
    collator, model = StoreCollator(data), student()
    samples = [data[4], data[1]]
    batch = collator(samples)
    losses = collator.token_losses(logits_of(model, batch), batch)
    for b, one in enumerate(samples):
        t = one.answer_positions()
        alone = expected_losses(model, one, config).float()
        assert torch.allclose(losses.loss[b, t - 1], alone, rtol=1e-5)
        assert torch.allclose(0.5 * (losses.nll + losses.kd)[b, t - 1], alone, rtol=1e-5)
        others = np.setdiff1d(np.arange(losses.loss.shape[1]), t - 1)
        assert not losses.loss[b, others].any()


def test_a_plain_loop_passes_the_settings_of_a_schedules_step(store: Path) -> None:
    schedule = KDSchedule(alpha=1.0, alpha_end=0.0)
    data = StoreDataset(store, schedule)
    collator = StoreCollator(data)
    batch = collator([data[i] for i in range(len(data))])
    logits = logits_of(student(), batch)
    with pytest.raises(NemoKDError, match=r"alpha_end=0.0, but not the step: pass config=config.a"):
        collator.loss(logits, batch)
    loss = collator.loss(logits, batch, config=schedule.at(1, 4))
    assert loss.item() == pytest.approx(expected(KDConfig(alpha=0.75), store)[0], rel=1e-6)


def test_stores_that_only_a_schedules_end_cannot_learn_from_are_refused(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", top_k=1)
    with pytest.raises(StoreError, match="nothing is learned from the teacher"):
        StoreDataset(one, KDSchedule(support="topk", alpha=0.0, alpha_end=1.0))


def halves(batch: Batch) -> Batch:
    """Cut in two and joined: what dispatching a batch to processes and gathering it does."""
    parts = [utils.slice_tensors(batch, slice(0, 2)), utils.slice_tensors(batch, slice(2, 6))]
    joined: Batch = utils.concatenate(parts)
    return joined


def cast(batch: Batch) -> Batch:
    """As DeepSpeed's configuration of bfloat16 casts a batch's floating-point tensors."""
    return {k: x.bfloat16() if x.is_floating_point() else x for k, x in batch.items()}


def left(batch: Batch) -> Batch:
    """Padded on the left by someone else; the teacher's rows have no positions of their own."""
    lengths = batch["attention_mask"].sum(1).tolist()
    shifts = [batch["input_ids"].shape[1] - length for length in lengths]
    return {
        name: x
        if name == "teacher"
        else torch.stack([row.roll(shift) for row, shift in zip(x, shifts, strict=True)])
        for name, x in batch.items()
    }


@pytest.mark.parametrize("change", [halves, cast, left])
def test_a_batch_may_be_sliced_cast_and_shifted(
    store: Path, change: Callable[[Batch], Batch]
) -> None:
    config = KDConfig(alpha=0.5)
    data = StoreDataset(store, config)
    collator, model = StoreCollator(data), student()
    batch = change(collator([data[i] for i in range(6)]))
    loss = collator.loss(logits_of(model, batch), batch)
    assert loss.item() == pytest.approx(expected(config, store)[0], rel=1e-5)


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_one_process_says_that_samples_are_truncated(
    rank: int,
    lines: int,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before there is a process group, by the launcher's rank."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    StoreDataset(store, KDConfig(), max_seq_length=8, over_long="truncate")
    assert capsys.readouterr().err.count("truncated on the left of their prompt") == lines


def test_batches_padded_alike_can_be_concatenated(tmp_path: Path) -> None:
    """What accelerate does when one process reads for all; the stores differ in K."""
    narrow = write_store(tmp_path / "narrow", [3, 2], top_k=2)
    wide = write_store(tmp_path / "wide", [6, 1], top_k=9)
    config = KDConfig(alpha=0.5)
    data = StoreDataset([narrow, wide], config)
    collator, model = StoreCollator(data, pad_to=12), student()
    batch = utils.concatenate([collator([data[0], data[1]]), collator([data[2], data[3]])])
    assert {x.shape[0] for x in batch.values()} == {4}
    loss = collator.loss(logits_of(model, batch), batch)
    assert loss.item() == pytest.approx(expected(config, narrow, wide)[0], rel=1e-6)


@pytest.mark.parametrize("profile", ["plain", "compact", "top_p"])
def test_stores_follow_one_another_in_any_profile(tmp_path: Path, profile: str) -> None:
    options = {"p": 0.5} if profile == "top_p" else {}
    changes = {"profile": profile, "profile_options": options}
    paths = [write_store(tmp_path / f"{i}", [2 + i, 3], **changes) for i in range(3)]
    config = KDConfig(alpha=0.8)
    data = StoreDataset([Store(paths[0]), *paths[1:]], config)
    assert len(data) == 6
    assert [len(data[i].topk) for i in range(-6, 6)] == [2, 3, 3, 3, 4, 3] * 2
    batch = StoreCollator(data)([data[i] for i in range(6)])
    rows = [one for path in paths for one in Store(path)]
    for b, one in enumerate(rows):
        teacher = batch["teacher"][b][: len(one.topk)]
        k = teacher.shape[1] // 2
        kept = one.topk.ids[:, :k]
        assert np.array_equal(teacher[:, :k].numpy(), kept) and (one.topk.ids[:, k:] == -1).all()
        values = teacher[:, k:].contiguous().view(torch.float32).numpy()
        assert np.array_equal(values[:, :-1], one.topk.logits[:, :k])  # to the bit
        assert np.array_equal(values[:, -1], one.topk.logsumexp[:, 0])
    with pytest.raises(IndexError):
        data[6]
    with pytest.raises(IndexError):
        data[-7]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_the_process_itself_reads(store: Path, start: str) -> None:
    data = StoreDataset(store, KDConfig(), max_seq_length=8, over_long="truncate")
    collator = StoreCollator(data)
    here = list(DataLoader(data, batch_size=2, collate_fn=collator))
    workers = DataLoader(
        data, batch_size=2, collate_fn=collator, num_workers=1, multiprocessing_context=start
    )
    there = list(workers)
    assert len(here) == len(there) == len(data) / 2
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_long_samples_are_refused_truncated_or_dropped_as_in_training(store: Path) -> None:
    """Lengths 6, 4, 11, 7, 11, 10; the answer of sample 2 fills 7 of its 11 tokens."""
    config = KDConfig()
    with pytest.raises(StoreError, match="3 of 6 samples with more than max_seq_length=7 tokens"):
        StoreDataset(store, config, max_seq_length=7)
    dropped = StoreDataset(store, config, max_seq_length=7, over_long="drop")
    assert [dropped[i].row for i in range(len(dropped))] == [0, 1, 3]
    cut = StoreDataset(store, config, max_seq_length=7, over_long="truncate")
    samples = [cut[i] for i in range(len(cut))]
    assert [one.row for one in samples] == [0, 1, 3, 4, 5]  # no prompt would be left of sample 2
    assert [len(one.input_ids) for one in samples] == [6, 4, 7, 7, 7]
    whole = Store(store)[4]
    assert np.array_equal(cut[3].input_ids, whole.input_ids[-7:])
    batch = StoreCollator(cut)([cut[3]])
    assert (batch["labels"] != -100).sum() == len(whole.topk) == 5


def test_a_batch_without_answers_has_loss_and_gradient_0(tmp_path: Path) -> None:
    data = StoreDataset(write_store(tmp_path / "store", [0, 0, 1]), KDConfig())
    collator, model = StoreCollator(data), student()
    batch = collator([data[0], data[1]])
    loss = collator.loss(logits_of(model, batch), batch)
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_padding_columns_of_the_logits_do_not_count(store: Path) -> None:
    data = StoreDataset(store, KDConfig())
    collator = StoreCollator(data)
    batch = collator([data[2]])
    logits = torch.randn(1, batch["labels"].shape[1], COLUMNS)
    before = collator.loss(logits, batch)
    logits[..., VOCABULARY:] += 10
    assert torch.equal(collator.loss(logits, batch), before)


def test_the_chat_template_of_the_stores_is_known_where_they_have_one(tmp_path: Path) -> None:
    paths = {
        name: write_store(tmp_path / name, template={"chat_template": text})
        for name, text in {"a": "{{ messages }}", "b": "{{ messages }}", "c": "nemo"}.items()
    }

    def of(*names: str) -> Any:
        return StoreDataset([paths[name] for name in names], KDConfig()).chat_template

    assert of("a") == of("a", "b") == "{{ messages }}"
    assert of("c") is of("a", "c") is None


def test_what_cannot_be_learned_is_refused(tmp_path: Path, store: Path) -> None:
    config = KDConfig(temperature=2.0)
    cold = write(
        tmp_path / "cold", spec(vocab_size=VOCABULARY), [sample(0, spec(vocab_size=VOCABULARY), 2)]
    )
    larger = spec(vocab_size=70, temperatures=(1.0, 2.0))
    other = write(tmp_path / "other", larger, [sample(0, larger, 2)])
    tokenizer = {"fingerprint": "c" * 64, "library": "huggingface", "path": None}
    for stores, message in (
        ([], "no store to train on"),
        ([store, cold], "temperature=2.0 was not dumped"),
        ([store, other], "vocabulary size is 70 in the store, expected 61"),
        ([store, write_store(tmp_path / "foreign", tokenizer=tokenizer)], "tokenizer is 'cccc"),
        (write_store(tmp_path / "empty", []), "has no samples"),
    ):
        with pytest.raises(StoreError, match=message):
            StoreDataset(stores, config)
    one = write_store(tmp_path / "one", top_k=1)
    with pytest.raises(StoreError, match="nothing is learned from the teacher"):
        StoreDataset(one, KDConfig(support="topk"))


def test_batches_that_do_not_fit_are_refused(tmp_path: Path, store: Path) -> None:
    data = StoreDataset(store, KDConfig(temperature=2.0))
    collator = StoreCollator(data, pad_to=10)
    larger = spec(vocab_size=70, temperatures=(1.0, 2.0))
    for items, message in (
        ([data[2]], "row 2 has 11 tokens, more than pad_to=10"),
        ([{"input_ids": [1]}], "got a dict; expected items of a StoreDataset"),
        ([sample(9, larger, 3)], "row 9 has id 69, but the vocabulary 61 ids"),
        ([sample(9, spec(vocab_size=VOCABULARY), 3)], "known at temperature 1, but the loss has"),
    ):
        with pytest.raises(NemoKDError, match=message):
            collator(items)  # type: ignore[arg-type]
    batch = collator([data[0]])
    for shape in ((1, 14, COLUMNS), (1, 10, VOCABULARY - 1), (10, COLUMNS)):
        with pytest.raises(NemoKDError, match="logits have shape"):
            collator.loss(torch.zeros(shape), batch)
    batch["labels"][0, 3] = -100
    with pytest.raises(NemoKDError, match="4 rows, but 3 positions"):
        collator.loss(torch.zeros(1, 10, COLUMNS), batch)


BARE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from nemo_kd.hf import StoreCollator, StoreDataset, StoreLossMixin
from nemo_kd.loss import KDConfig
data = StoreDataset(sys.argv[2], KDConfig())
collator = StoreCollator(data)
batch = collator([data[0], data[1]])
logits = torch.zeros(*batch["labels"].shape, 61, requires_grad=True)
collator.loss(logits, batch).backward()
print(float(logits.grad.abs().sum()) > 0, "transformers" in sys.modules)
"""


def test_a_plain_loop_needs_the_extra_store_alone(tmp_path: Path, store: Path) -> None:
    done = run_bare(tmp_path, extra("store"), "-c", BARE, str(ROOT), str(store))
    assert done.stdout == "True False\n", done.stderr
