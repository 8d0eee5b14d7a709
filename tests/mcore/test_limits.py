"""A student that `gpt.build` made is not trained beyond what its config.json describes."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_program

SHAPE = "(1, {})"  # of the losses
REASONS = {
    "dynamic": "beyond 128 tokens its positions or its attention change",
    "window": "beyond 40 tokens its sliding window needs TransformerEngine",
}


def test_longer_sequences_are_refused_with_their_reason_and_packs_count_by_sequence(
    tmp_path: Path,
) -> None:
    done = run_program("tests/mcore/limits.py", tmp_path, fork=True)
    lines = done.stdout.splitlines()[-12:]
    for (case, reason), length in zip(REASONS.items(), (128, 40), strict=True):
        fits, longer, packed, long_pack = lines[:4]
        del lines[:4]
        assert fits == SHAPE.format(length), case
        assert longer.startswith(f"seq_length={length + 8}: {reason}"), case
        assert f"use sequences of {length} tokens or less" in longer
        assert packed == "(0,)"  # no sequence of the pack is longer
        assert long_pack.startswith("a packed sequence of 29 tokens: beyond 28 tokens"), case
    fits, longer, packed, again = lines
    assert (fits, longer) == (SHAPE.format(128), SHAPE.format(136)) and packed == again == "(0,)"
