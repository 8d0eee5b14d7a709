"""Keys of a data block that would change nothing are refused by name; sets have their own names."""

from __future__ import annotations

import re
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.data_settings import check_data_settings
from tests.conftest import ROOT

STORE = {"train_ds.store": "a", "validation_ds.store": "b"}
FILES = {"train_ds.file_names": ["a"], "validation_ds.file_names": ["b"]}
MIXED = {**STORE, "train_ds.file_names": ["c"]}
PACKED = {**STORE, "train_ds.packed_sequence": True}


def check(*changes: dict[str, Any]) -> None:
    data = OmegaConf.load(ROOT / "conf/train_gpt_sft_kd.yaml")
    assert isinstance(data, DictConfig)
    for change in changes:
        for key, value in change.items():
            OmegaConf.update(data, f"model.data.{key}", value, force_add=True)
    check_data_settings(data.model.data)


@pytest.mark.parametrize("sources", [STORE, FILES, MIXED, PACKED])
def test_the_defaults_here_and_in_nemos_yaml_ask_for_nothing(sources: dict[str, Any]) -> None:
    nemos = {"train_ds.memmap_workers": 2, "validation_ds.tokens_to_generate": 32}
    for changes in ({}, nemos, {"train_ds.shuffle": None, "train_ds.shuffle_seed": None}):
        check(sources, changes)


@pytest.mark.parametrize(
    ("sources", "key", "value", "reason"),
    [
        (STORE, "train_ds.seed", 7, "shuffle_seed decides the order"),
        (STORE, "train_ds.seed", 0, "shuffle_seed decides the order"),
        (STORE, "train_ds.seed", 1234, "shuffle_seed decides the order"),
        (MIXED, "train_ds.seed", 7, "shuffle_seed decides the order"),
        (FILES, "train_ds.seed", 7, "shuffle_seed decides the order"),
        (STORE, "validation_ds.seed", 7, "keeps the order of its stores"),
        (STORE, "validation_ds.shuffle", True, "keeps the order of its stores"),
        (STORE, "validation_ds.global_sample_mapping", True, "each sample once"),
        (STORE, "train_ds.min_seq_length", 5, "does not drop samples"),
        (FILES, "validation_ds.min_seq_length", 5, "does not drop samples"),
        (STORE, "train_ds.sample_weight", "constant", "means over answer tokens"),
        (STORE, "train_ds.memmap_workers", 8, "SFT files"),
        (STORE, "train_ds.index_mapping_dir", "/tmp", "SFT files"),
        (STORE, "validation_ds.hf_dataset", True, "SFT files"),
        (STORE, "train_ds.global_sample_mapping", True, "shuffle_seed decides"),
        (MIXED, "train_ds.global_sample_mapping", True, "shuffle_seed decides"),
        (STORE, "train_ds.tokens_to_generate", 8, "nothing is generated in training"),
        (PACKED, "train_ds.get_attention_mask_from_fusion", False, "cu_seqlens"),
        (PACKED, "train_ds.packed_sequence_return_cu_seqlen", False, "cu_seqlens"),
        (FILES, "train_ds.over_long", "drop", "truncation_field"),
    ],
)
def test_a_key_without_effect_is_refused(
    sources: dict[str, Any], key: str, value: Any, reason: str
) -> None:
    with pytest.raises(
        NemoKDError, match=re.escape(f"model.data.{key}={value} has no effect: ")
    ) as e:
        check(sources, {key: value})
    assert reason in str(e.value)


@pytest.mark.parametrize(
    ("sources", "key", "value"),
    [
        (FILES, "train_ds.memmap_workers", 8),
        (MIXED, "train_ds.index_mapping_dir", "/tmp"),
        (MIXED, "train_ds.hf_dataset", True),
        (FILES, "train_ds.tokens_to_generate", 8),
        (STORE, "train_ds.shuffle", False),
        (FILES, "train_ds.shuffle", False),
        (PACKED, "train_ds.shuffle", False),
        (FILES, "train_ds.shuffle_seed", 5),
        (STORE, "train_ds.get_attention_mask_from_fusion", False),
        (STORE, "train_ds.pad_to_max_length", True),
        (STORE, "train_ds.ceil_to_power_2", True),
        (STORE, "train_ds.drop_last", False),
        (STORE, "validation_ds.tokens_to_generate", 8),
    ],
)
def test_a_key_with_an_effect_is_accepted(sources: dict[str, Any], key: str, value: Any) -> None:
    check(sources, {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_ds.shuffle": False, "train_ds.shuffle_seed": 5}, "shuffle_seed=5 has no effect"),
        ({"train_ds.shuffle_seed": -1}, "shuffle_seed=-1: expected a whole number"),
        ({"train_ds.shuffle_seed": 1.5}, "shuffle_seed=1.5: expected a whole number"),
        ({"train_ds.shuffle": "no"}, "shuffle=no: expected true or false"),
    ],
)
def test_an_order_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NemoKDError, match=re.escape(message)):
        check(STORE, changes)


def test_nemos_own_orders_of_files_know_nemos_seed_alone() -> None:
    for key in ("global_sample_mapping", "packed_sequence"):
        own = {f"train_ds.{key}": True}
        check(FILES, own, {"train_ds.seed": 7})
        for asked in ({"train_ds.shuffle": False}, {"train_ds.shuffle_seed": 5}):
            with pytest.raises(NemoKDError, match=f"has no effect: {key}=true of SFT files"):
                check(FILES, own, asked)


@pytest.mark.parametrize(
    ("sets", "names", "message"),
    [
        (["a", "b"], ["x", "x"], "names has 'x' twice"),
        (["a", "b", "c"], ["x", "y", "x"], "names has 'x' twice"),
        (["a", "a"], ["x", "x"], "names has 'x' twice"),
        (["a", "b"], ["x"], "does not name the 2"),
        (["a", "b"], "x", "does not name the 2"),
        (["a"], ["x", "y"], "does not name the 1"),
        (["a", "b"], [1, 2], "names has 1: expected text"),
        (["a", "b"], ["x", None], "names has None: expected text"),
        (["a", "b"], ["x", ""], "names has '': expected text"),
        (["a"], ["x/y"], "names has 'x/y': expected text without a slash"),
    ],
)
def test_names_that_would_mix_sets_are_refused(sets: list[str], names: Any, message: str) -> None:
    given = {"validation_ds.store": sets, "validation_ds.names": names}
    with pytest.raises(NemoKDError, match=re.escape(message)):
        check(STORE, given)
    files = {"validation_ds.store": sets[:-1], "validation_ds.file_names": sets[-1:]}
    with pytest.raises(NemoKDError, match=re.escape(message)):
        check(STORE, given, files)


@pytest.mark.parametrize(
    ("sets", "names"), [("a", "x"), (["a"], "x"), (["a", "b"], ["x", "y"]), (["a", "a"], None)]
)
def test_names_of_their_own_are_accepted(sets: Any, names: Any) -> None:
    check(STORE, {"validation_ds.store": sets, "validation_ds.names": names})
