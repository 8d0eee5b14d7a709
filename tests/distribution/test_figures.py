"""The numbers that pages quote from benchmarks/results are those of the files, rounded."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

import pytest

from benchmarks import long_context, loss, peers
from benchmarks.pages import with_table
from tests.processes import ROOT

RESULTS = {
    path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")
}
LOSS = {(row["shape"], row["against"]): row for row in RESULTS["loss"]["rows"]}
PROFILES = {row["profile"]: row for row in RESULTS["store"]["profiles"]}
WAYS = {row["way"]: row for row in RESULTS["dump"]["ways"]}
OPENING = RESULTS["store"]["opening"]
CONVERSION = RESULTS["conversion"]
SMALL, LARGE, HIDDEN = "(1024, 49152)", "(512, 128256)", "(2048, 49152, 576)"
ALONE, BF16 = "Megatron's cross-entropy alone, TP", "Megatron's, both on bf16 logits"
FUSED, TWICE_K = (
    LOSS[HIDDEN, "separate LM head and loss"],
    LOSS["(512, 49152)", "K = 200 against 100"],
)
WITHOUT_GRADIENT = LOSS[HIDDEN, "the same, without the weight's gradient"]
MEGATRON = [LOSS[shape, f"{ALONE} {tp}"] for shape in (SMALL, LARGE) for tp in (1, 2)]
FLOAT32 = [row["memory_ratio"] for row in MEGATRON]
EXTRA_MB = [row["mb"] - row["their_mb"] for row in MEGATRON]
HALVES = [LOSS["(512, 49152)", f"half the {what}"]["time_ratio"] for what in ("rows", "vocabulary")]
Quote = tuple[str, str, list[float]]
N = r"([−\d.,e-]*\d)"  # a number


def _ratios(row: dict[str, Any]) -> list[float]:
    return [row["time_ratio"], row["memory_ratio"]]


def _costs(name: str) -> list[float]:
    row = PROFILES[name]
    names = ["bytes", "ids", "stored_error", "dense_error", "loss_bias", "loss_bias_error"]
    return [row[name] for name in names if row[name] is not None]


# (page, regular expression whose groups are the numbers, their values)
SAMPLED, COMPACT, PLAIN = (PROFILES[name] for name in ("sampled, 40 draws", "compact", "plain"))
QUOTES: list[Quote] = [
    *(
        (
            "docs/checkpoints.md",
            rf"\| {way} \| {N} \| {N} MB \| {N} MB \|",
            [row["seconds"], row["anonymous"] / 1e6, row["resident"] / 1e6],
        )
        for way, row in CONVERSION["ways"].items()
    ),
    (
        "docs/checkpoints.md",
        rf"{N} million parameters in bfloat16, whose largest tensor has {N} MB",
        [CONVERSION["parameters"] / 1e6, CONVERSION["largest_tensor"] / 1e6],
    ),
    (
        "README.md",
        rf"\(1024, 49152\) \| {ALONE} 1 \| {N}× \| {N}×",
        _ratios(LOSS[SMALL, f"{ALONE} 1"]),
    ),
    (
        "README.md",
        rf"\(1024, 49152\) \| the same, TP 2 \| {N}× \| {N}×",
        _ratios(LOSS[SMALL, f"{ALONE} 2"]),
    ),
    (
        "README.md",
        rf"\(1024, 49152\) \| the same, both on bf16 logits \| {N}× \| {N}×",
        _ratios(LOSS[SMALL, BF16]),
    ),
    (
        "README.md",
        rf"dense KD \+ cross-entropy in PyTorch \| {N}× \| {N}×",
        _ratios(LOSS[SMALL, "dense KD + cross-entropy"]),
    ),
    (
        "README.md",
        rf"\(512, 128256\) \| {ALONE} 1 \| {N}× \| {N}×",
        _ratios(LOSS[LARGE, f"{ALONE} 1"]),
    ),
    (
        "README.md",
        rf"\(512, 128256\) \| the same, TP 2 \| {N}× \| {N}×",
        _ratios(LOSS[LARGE, f"{ALONE} 2"]),
    ),
    (
        "README.md",
        rf"\(512, 128256\) \| the same, both on bf16 logits \| {N}× \| {N}×",
        _ratios(LOSS[LARGE, BF16]),
    ),
    ("README.md", rf"separate LM head and loss; ours fused \| {N}× \| {N}×", _ratios(FUSED)),
    ("docs/choosing.md", rf"takes {N} times as long as with K = 100", [TWICE_K["time_ratio"]]),
    ("docs/choosing.md", rf"{N} of the memory for {N} of the time", _ratios(FUSED)[::-1]),
    ("docs/choosing.md", rf"`plain` \| {N}, or", [PLAIN["bytes"]]),
    (
        "docs/choosing.md",
        rf"`compact` \| {N} \|.*loses {N} nats",
        [COMPACT[name] for name in ("bytes", "stored_error")],
    ),
    ("docs/choosing.md", rf"`top_p`, p = 0.95 \| {N} \|", [PROFILES["top_p 0.95"]["bytes"]]),
    (
        "docs/choosing.md",
        rf"`sampled`, 40 draws \| {N} \|.*bias {N} nats",
        [SAMPLED["bytes"], -SAMPLED["loss_bias"]],
    ),
    ("docs/choosing.md", rf"loss is {N} nats below", [-PLAIN["loss_bias"]]),
    ("docs/loss.md", rf"made of them: {N} to {N} of Megatron's", [min(FLOAT32), max(FLOAT32)]),
    (
        "docs/loss.md",
        rf"this one does not: {N} to {N}\.",
        [LOSS[LARGE, BF16]["memory_ratio"], LOSS[SMALL, BF16]["memory_ratio"]],
    ),
    ("docs/loss.md", rf"vocabulary take {N} to {N} of the\s+time", [min(HALVES), max(HALVES)]),
    ("docs/loss.md", rf"needs another {N} to {N} MB here", [min(EXTRA_MB), max(EXTRA_MB)]),
    (
        "docs/loss.md",
        rf"the peak is {N}% of that of separate LM head and loss: {N} MB of both",
        [100 * FUSED["memory_ratio"], FUSED["mb"] - WITHOUT_GRADIENT["mb"]],
    ),
    (
        "docs/loss.md",
        rf"Without it the ratio is {N}\.",
        [WITHOUT_GRADIENT["memory_ratio"]],
    ),
    (
        "docs/offline_or_online.md",
        rf"forward pass: {N} %",
        [100 * (WAYS["dump"]["times_forward"] - 1)],
    ),
    (
        "docs/store.md",
        rf"over the {N} answer tokens of the demo",
        [RESULTS["store"]["answer_tokens"]],
    ),
    *(
        ("docs/store.md", rf"\| {label} \| {N} \| {N} \| {N} \| {N} \| {N} ± {N} \|", _costs(name))
        for label, name in {
            "`plain`": "plain",
            "`compact`": "compact",
            "`top_p`, p = 0.99": "top_p 0.99",
            "`top_p`, p = 0.95": "top_p 0.95",
        }.items()
    ),
    (
        "docs/store.md",
        rf"`sampled`, 40 draws \| {N} \| {N} \| \| \| {N} ± {N} \|",
        _costs("sampled, 40 draws"),
    ),
    (
        "docs/store.md",
        rf"`plain` written {N}, read {N} million",
        [PLAIN["write_tokens_per_s"], PLAIN["read_tokens_per_s"] / 1e6],
    ),
    (
        "docs/store.md",
        rf"`compact` written\s{N}, read {N}\.",
        [COMPACT[f"{way}_tokens_per_s"] for way in ("write", "read")],
    ),
    (
        "docs/store.md",
        rf"{N} files\) takes {N} s; all lengths are read in {N} s",
        [OPENING["files"], OPENING["seconds"], OPENING["seconds_for_lengths"]],
    ),
    (
        "docs/store.md",
        rf"`verify` reads {N} MB/s, and {N} MB/s with .*; `stats` reads {N} and\s`merge` {N} MB/s",
        [
            RESULTS["store"]["tools"][f"{n}_mb_per_s"]
            for n in ("verify", "checksums", "stats", "merge")
        ],
    ),
]


def is_rounded(text: str, value: float) -> bool:
    """Whether `709,000` is a rounding of the value: half a unit of its last digit at most."""
    digits = text.replace(",", "").replace("−", "-")
    unit = Decimal(1).scaleb(Decimal(digits).normalize().as_tuple().exponent)  # type: ignore[arg-type]
    if "." in digits:
        unit = Decimal(1).scaleb(Decimal(digits).as_tuple().exponent)  # type: ignore[arg-type]
    return abs(float(digits) - value) <= 0.5 * float(unit) * (1 + 1e-9)


@pytest.mark.parametrize(("page", "pattern", "values"), QUOTES)
def test_a_quoted_number_is_the_files(page: str, pattern: str, values: list[float]) -> None:
    (found,) = re.finditer(pattern, (ROOT / page).read_text())
    assert len(found.groups()) == len(values)
    for text, value in zip(found.groups(), values, strict=True):
        assert is_rounded(text, value), f"{page}: {found[0]!r} has {text} for {value}"


def test_every_ratio_of_the_readmes_table_is_compared() -> None:
    """A new row needs a line in `QUOTES`."""
    lines = [x for x in (ROOT / "README.md").read_text().splitlines() if re.search(r"\d× \|", x)]
    patterns = [pattern for page, pattern, _ in QUOTES if page == "README.md"]
    assert lines and all(any(re.search(p, line) for p in patterns) for line in lines)


def test_the_loss_page_has_the_generated_tables() -> None:
    page = (ROOT / "docs/loss.md").read_text()
    tables = {
        "loss": loss.table_of_page,
        "peers": peers.table_of_page,
        "long_context": long_context.table,
    }
    for name, table in tables.items():
        program = f"benchmarks/{name}.py"
        assert page == with_table(page, program, table(RESULTS[name])), f"run python {program}"


def test_the_laptop_page_has_the_readmes_figures() -> None:
    readme, laptop = ((ROOT / page).read_text() for page in ("README.md", "docs/laptop.md"))
    figures = re.findall(r"^\| ((?:KD \+ )?SFT) \| ([\d.]+) \| ([\d.]+) \|$", laptop, flags=re.M)
    assert len(figures) == 2
    for name, cross_entropy, kl in figures:
        assert re.search(
            rf"^\| {re.escape(name)}, 120 steps \| 14 \| \W*{cross_entropy}\W* \| \W*{kl}\W* \|",
            readme,
            flags=re.M,
        )
    sizes = set(re.findall(r"[\d.]+ GB", readme))
    assert len(sizes) == 4 and sizes <= set(re.findall(r"[\d.]+ GB", laptop))


@pytest.mark.parametrize(
    ("text", "value", "is_so"),
    [
        ("0.62", 0.622, True),
        ("0.62", 0.626, False),
        ("380,000", 379900, True),
        ("404", 404.6, False),
    ],
)
def test_a_changed_number_is_noticed(text: str, value: float, is_so: bool) -> None:
    assert is_rounded(text, value) == is_so
