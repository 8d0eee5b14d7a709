"""Stores of stores: what is copied stays bit for bit; plans and statistics against plain sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.store import Store, StoreError, verify
from nemo_kd.store.tools.average import average
from nemo_kd.store.tools.overlap import in_common
from nemo_kd.store.tools.stats import stats
from nemo_kd.store.tools.transform import convert, merge, split, write_samples
from nemo_kd.teacher.plan import Workload, plan
from tests.store.samples import sample, spec, store, write
from tests.store.test_writer import contents

PROFILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compact": {"profile": "compact"},
    "top_p": {"profile": "top_p", "profile_options": {"p": 0.9}},
}
OTHER = spec(source={"name": "other.jsonl"})


def bits(opened: Store, offset: int = 0) -> dict[int, tuple[bytes, ...]]:
    return {
        one.row + offset: tuple(
            array.tobytes()
            for array in (one.input_ids, one.topk.ids, one.topk.logits, one.topk.logsumexp)
        )
        for one in opened
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_a_split_and_merged_store_has_the_same_bits(tmp_path: Path, profile: str) -> None:
    opened = Store(store(tmp_path / "s", spec(**PROFILES[profile]), rows=20))
    targets = [tmp_path / name for name in "abc"]
    split(opened, targets, [2, 1, 1], seed=3)
    parts = [Store(target) for target in targets]
    assert {k: v for part in parts for k, v in bits(part).items()} == bits(opened)
    merge(parts, tmp_path / "merged")
    merged, offset = Store(tmp_path / "merged"), 0
    expected: dict[int, tuple[bytes, ...]] = {}
    for part in parts:
        expected |= bits(part, offset)
        offset += int(part.rows[-1]) + 1
    assert bits(merged) == expected
    assert list(verify(merged)) == []
    assert [one["store"] for one in merged.spec.source["merged"]] == [
        part.fingerprint for part in parts
    ]


def test_a_split_follows_from_seed_and_row_alone(tmp_path: Path) -> None:
    plain = Store(store(tmp_path / "plain", spec(), rows=20))
    compact = Store(store(tmp_path / "compact", spec(profile="compact", rows_per_shard=5), rows=20))
    rows = []
    for name, opened, seed in (("p", plain, 0), ("c", compact, 0), ("q", plain, 1)):
        split(opened, [tmp_path / f"{name}0", tmp_path / f"{name}1"], [1, 1], seed=seed)
        rows.append(Store(tmp_path / f"{name}0").rows.tolist())
    assert rows[0] == rows[1] != rows[2]


def test_a_split_keeps_the_answers_to_a_prompt_together(tmp_path: Path) -> None:
    """Also in merged stores, whose later parts begin at any row; every second answer is missing."""
    of = spec(template={"generation": {"samples_per_prompt": 4}})
    samples = [sample(row, of, 1 + row % 3) for row in range(0, 98, 2)]
    write(tmp_path / "s", of, samples)
    write(tmp_path / "other", replace(of, source=OTHER.source), samples)
    merge([Store(tmp_path / "s"), Store(tmp_path / "other")], tmp_path / "two")
    merge([Store(tmp_path / "s"), Store(tmp_path / "two")], tmp_path / "three")
    for name, starts in {"s": [0], "two": [0, 97], "three": [0, 97, 194]}.items():
        targets = [tmp_path / f"{name}-{part}" for part in range(2)]
        split(Store(tmp_path / name), targets, [1, 1])
        prompts: list[set[tuple[int, int]]] = []
        for target in targets:
            rows = Store(target).rows.tolist()
            begin = [max(start for start in starts if start <= row) for row in rows]
            prompts.append({(b, (row - b) // 4) for row, b in zip(rows, begin, strict=True)})
        assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def rows_split(source: Path, seed: int, *weights: float) -> list[Path]:
    """Split a store beside itself; returns the parts."""
    targets = [source.with_name(f"{source.name}-{seed}-{part}") for part in range(len(weights))]
    split(Store(source), targets, weights, seed=seed)
    return targets


def shares(parts: list[Path]) -> list[float]:
    sizes = [len(Store(part)) for part in parts]
    return [size / sum(sizes) for size in sizes]


def test_a_part_is_split_again_by_other_draws(tmp_path: Path) -> None:
    """With the same seed too, directly or after another; also where parts have been merged."""
    of = spec()
    write(tmp_path / "s", of, [sample(row, of, 1) for row in range(400)])
    train, held = rows_split(tmp_path / "s", 0, 0.8, 0.2)
    assert Store(held).rows[:5].tolist() == [1, 4, 10, 20, 21]  # as ever
    again = rows_split(train, 0, 0.8, 0.2)
    assert shares(again) == pytest.approx([0.8, 0.2], abs=0.1)
    third = rows_split(rows_split(again[0], 1, 0.5, 0.5)[0], 0, 0.8, 0.2)
    assert shares(third) == pytest.approx([0.8, 0.2], abs=0.15)
    merge([Store(train), Store(held)], tmp_path / "merged")
    parts = [set(Store(part).rows.tolist()) for part in rows_split(tmp_path / "merged", 0, 1, 1)]
    first = set(Store(train).rows.tolist())  # of the merged store they are the same numbers
    assert len(parts[0] & first) / len(first) == pytest.approx(0.5, abs=0.1)
    assert Store(third[0]).spec.source["split"]["earlier"]["seed"] == 1


def test_a_part_without_samples_is_refused(tmp_path: Path) -> None:
    opened, targets = Store(store(tmp_path / "s", spec())), [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(StoreError, match=r"/b, of weight 0.001, would have none of the 7 samples"):
        split(opened, targets, [1, 0.001])
    assert not any(target.exists() for target in targets)
    split(opened, targets, [1, 0])
    assert len(Store(targets[1])) == 0


def test_a_store_is_not_merged_with_itself(tmp_path: Path) -> None:
    one = Store(store(tmp_path / "a", spec()))
    copied = Store(store(tmp_path / "b", spec()))
    for given in ([one, one], [one, copied]):
        with pytest.raises(StoreError, match="are the same store; give it once"):
            merge(given, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_store_is_not_merged_with_a_part_of_it(tmp_path: Path) -> None:
    """Wherever the part has gone since; parts of one store can be merged again."""
    of = spec(source={"name": "a.jsonl", "rows": 60, "sha256": "a" * 64})
    whole = Store(store(tmp_path / "s", of, rows=60))
    other = Store(
        store(tmp_path / "o", replace(of, source={**of.source, "sha256": "b" * 64}), rows=60)
    )
    left, right = (Store(part) for part in rows_split(tmp_path / "s", 0, 1, 1))
    merge([other, left], tmp_path / "with-other")
    row = left.rows[0]
    for given in ([whole, left], [right, Store(tmp_path / "with-other"), left]):
        message = f"have {len(left)} samples in common, such as row {row} of their SFT file"
        with pytest.raises(StoreError, match=message):
            merge(given, tmp_path / "m")
    assert len(merge([left, right], tmp_path / "m").totals) and len(Store(tmp_path / "m")) == 60
    again = replace(of, teacher={"name": "other.nemo", "fingerprint": "c" * 64})
    write(tmp_path / "t", again, [sample(row, of, 1) for row in range(60)])
    assert list(in_common([whole, Store(tmp_path / "t")])) == []


def test_samples_in_common_are_seen_across_the_versions_of_a_fingerprint(tmp_path: Path) -> None:
    """Also if a greedy generation of an earlier version has recorded an idle seed."""
    of = spec(source={"name": "a.jsonl", "rows": 60, "sha256": "a" * 64})

    def of_teacher(fingerprint: str, seed: int, temperature: float = 0.0) -> Store:
        generation = {"temperature": temperature, "seed": seed}
        made = replace(
            of,
            teacher={"name": "t.nemo", "fingerprint": fingerprint},
            template={**of.template, "generation": generation},
        )
        path = tmp_path / f"{fingerprint[0]}-{seed}-{temperature}"
        write(path, made, [sample(row, of, seed) for row in range(60)])
        return Store(path)

    earlier, now, other = "a" * 64, "b" * 64 + ":full", "c" * 64 + ":full"
    found = list(in_common([of_teacher(earlier, 7), of_teacher(now, 1234)]))
    assert len(found) == 1 and "60 samples in common, such as row 0" in found[0]
    assert not list(in_common([of_teacher(now, 1), of_teacher(other, 1)]))
    assert not list(in_common([of_teacher(now, 2, 1.0), of_teacher(now, 3, 1.0)]))


def test_more_than_the_source_holds_is_refused(tmp_path: Path) -> None:
    opened = Store(store(tmp_path / "s", spec(profile="top_p", profile_options={"p": 0.3})))
    convert(opened, tmp_path / "less", profile_options={"p": 0.2})
    with pytest.raises(StoreError, match=r"holds the logits of p=0\.3, but p is 0\.9; lower it"):
        convert(opened, tmp_path / "more", profile_options={"p": 0.9})
    with pytest.raises(StoreError, match=r"logits per token, but top_k is"):
        convert(opened, tmp_path / "more", top_k=opened.spec.top_k + 1)


@pytest.mark.parametrize("profile", PROFILES)
def test_converting_to_the_same_profile_changes_nothing(tmp_path: Path, profile: str) -> None:
    opened = Store(store(tmp_path / "s", spec(**PROFILES[profile]), parts=False))
    convert(opened, tmp_path / "t", profile=profile)
    assert contents(tmp_path / "t") == contents(tmp_path / "s")
    convert(opened, tmp_path / "v", segment_bytes=200)
    assert bits(Store(tmp_path / "v")) == bits(opened) and len(Store(tmp_path / "v").rows) == 7
    assert len(list((tmp_path / "v").glob("segment-*"))) > 1
    with pytest.raises(StoreError, match="holds 5 logits per token, but top_k is 6"):
        convert(opened, tmp_path / "u", top_k=6)


def test_unlike_stores_are_not_merged(tmp_path: Path) -> None:
    one = Store(store(tmp_path / "a", spec()))
    tokenizer = {**one.spec.tokenizer, "path": "elsewhere"}
    moved = Store(store(tmp_path / "b", spec(tokenizer=tokenizer)))
    merge([one, moved], tmp_path / "fine")
    other = Store(store(tmp_path / "c", spec(teacher={"name": "other.nemo"})))
    with pytest.raises(StoreError, match=r"teacher.name: 'teacher.nemo' and 'other.nemo'"):
        merge([one, other], tmp_path / "d")
    teacher = {**one.spec.teacher, "fingerprint": "d" * 64 + ":full"}
    later = Store(store(tmp_path / "e", spec(teacher=teacher)))
    with pytest.raises(StoreError, match="An earlier version has made one of the fingerprints"):
        merge([one, later], tmp_path / "f")


def test_statistics_are_the_plain_sums(tmp_path: Path) -> None:
    of = spec(top_k=6, vocab_size=12)
    opened = Store(write(tmp_path / "s", of, [sample(row, of, row) for row in range(6)]))
    masses, entropies, first, kept, nll = [], [], 0, 0, 0.0
    for one in opened:
        for a, position in enumerate(one.answer_positions()):
            p = np.exp(one.topk.logits[a].astype(float) - one.topk.logsumexp[a, 0])
            outcomes = np.append(p, max(1 - p.sum(), 1e-300))
            masses.append(p.sum())
            entropies.append(-(outcomes * np.log(outcomes)).sum())
            found = one.topk.ids[a].tolist()
            label = int(one.input_ids[position])
            first += found[0] == label
            if label in found:
                kept += 1
                nll -= np.log(p[found.index(label)])
    value = stats(opened).to_json()
    assert value["answer_tokens"] == len(masses) == 15
    assert value["mass"] == pytest.approx(np.mean(masses), rel=1e-6)
    assert value["entropy_of_kept_and_rest"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert value["label_is_first"] == first / 15 and value["label_is_kept"] == kept / 15
    assert value["nll_of_kept_labels"] == pytest.approx(nll / max(kept, 1), rel=1e-5)
    assert value["agreement"] == pytest.approx(first / 15, abs=1e-4)
    assert value["perplexity_expected"] >= np.exp(value["entropy_of_kept_and_rest"]) - 1e-3
    ranks = value["label_rank_histogram"]
    assert ranks["edges"][:4] == [1, 2, 3, 5] and ranks["counts"][0] == first
    assert sum(ranks["counts"]) == kept and ranks["not_kept"] == 15 - kept > 0
    for name in ("mass", "entropy_of_kept_and_rest"):
        assert sum(value[f"{name}_histogram"]["counts"]) == 15
    assert sum(value["answer_length_histogram"]["counts"]) == 6


@pytest.mark.parametrize("profile", ["plain", "compact"])
def test_planned_disk_is_what_a_store_takes(tmp_path: Path, profile: str) -> None:
    of = spec(profile=profile, top_k=20, rows_per_shard=50)
    opened = Store(write(tmp_path / "s", of, [sample(row, of, 30) for row in range(50)]))
    totals = opened.manifest.totals
    work = Workload(
        answer_tokens=totals["answer_tokens"],
        total_tokens=totals["tokens"],
        samples=totals["samples"],
        teacher_parameters=1e9,
        gpus=1,
    )
    assert plan(of, work).disk_bytes == pytest.approx(totals["bytes"], rel=0.01)


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    one = Store(store(tmp_path / "a", spec(), rows=20))
    two = Store(store(tmp_path / "b", spec(), rows=9))
    for jobs in (1, 2):
        at = tmp_path / str(jobs)
        convert(one, at / "compact", profile="compact", top_k=3, jobs=jobs)
        merge([one, two], at / "merged", jobs=jobs)
        split(one, [at / "train", at / "rest"], [3, 1], jobs=jobs)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("file", ["segment-00001/topk_ids.bin", "index.bin"])
def test_damage_is_not_copied(tmp_path: Path, file: str) -> None:
    """Two words exchanged: no sum of words shows it, and new hashes would hide it."""
    opened = Store(store(tmp_path / "s", spec()))
    path = tmp_path / "s" / file
    data = path.read_bytes()
    path.write_bytes(data[:8] + data[10:12] + data[8:10] + data[12:])
    for jobs in (1, 2):
        with pytest.raises(StoreError, match=f"{file} is damaged"):
            convert(opened, tmp_path / "t", jobs=jobs)
    with pytest.raises(StoreError, match=f"{file} is damaged"):
        merge([Store(store(tmp_path / "v", OTHER)), opened], tmp_path / "t")
    with pytest.raises(StoreError, match=f"{file} is damaged"):
        split(opened, [tmp_path / "t", tmp_path / "u"], [1, 1])
    assert not (tmp_path / "t").exists()


def test_rows_far_sparser_than_samples_cost_nothing(tmp_path: Path) -> None:
    rows = [0, 10**9, 10**12]
    of = spec(rows_per_shard=10**12)
    sparse = Store(write(tmp_path / "s", of, [sample(row, of, 2) for row in rows], parts=False))
    merge([sparse, Store(store(tmp_path / "other", OTHER))], tmp_path / "merged")
    merged = Store(tmp_path / "merged")
    assert merged.rows.tolist() == [*rows, *(row + 10**12 + 1 for row in range(7))]
    assert sum(1 for _ in (tmp_path / "merged").rglob("*")) < 20
    assert list(verify(merged)) == []


def test_a_row_number_that_is_none_is_refused(tmp_path: Path) -> None:
    of = spec()
    samples = [sample(row, of, 2) for row in (0, 1_700_000_000)]
    with pytest.raises(StoreError, match=r"row 1700000000 is far larger .* so far, 2"):
        write_samples(samples, tmp_path / "s", of)
    assert not list(tmp_path.iterdir())


def test_an_average_of_sparse_rows_costs_nothing(tmp_path: Path) -> None:
    rows = [0, 10**9, 10**15 - 1]
    for name in "ab":
        of = spec(rows_per_shard=10**15, teacher={"name": name})
        write_samples([sample(row, of, 2) for row in rows], tmp_path / name, of)
    average([Store(tmp_path / "a"), Store(tmp_path / "b")], tmp_path / "mixed", [1, 1])
    assert Store(tmp_path / "mixed").rows.tolist() == rows
    assert sum(1 for _ in (tmp_path / "mixed").rglob("*")) < 20


def test_rows_beyond_any_file_are_not_merged(tmp_path: Path) -> None:
    of = spec(rows_per_shard=1 << 62)
    write_samples([sample((1 << 62) - 1, of, 1)], tmp_path / "s", of)
    opened = Store(tmp_path / "s")
    with pytest.raises(StoreError, match="row numbers that cannot be those of a file"):
        merge([opened, Store(store(tmp_path / "other", OTHER))], tmp_path / "t")
