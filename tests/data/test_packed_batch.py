"""A pack's row: every sample whole, its targets its own, whatever tokens it has."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.data import collate_packs

EOS = 2
# Few different tokens, end-of-sequence among them: samples with several of it, and at borders.
samples = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
        st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n),
    )
)


@settings(deadline=None)
@given(packs=st.lists(st.lists(samples, min_size=1, max_size=4), min_size=1, max_size=3))
def test_rows_are_their_samples_one_after_the_other(
    packs: list[list[tuple[list[int], list[float]]]],
) -> None:
    length = 24
    batch = collate_packs(packs, length, EOS)
    for b, pack in enumerate(packs):
        ends = batch["cu_seqlens"][b]
        count = int(batch["cu_seqlens_argmin"][b])
        assert (ends[count:] == -1).all() and len(ends) > count and ends.argmin() == count
        ends = ends[:count]
        assert ends[0] == 0 and ends[-1] == length
        assert int(batch["max_seqlen"][b]) == int(ends.diff().max())
        start = 0
        for tokens, mask in pack:
            part = slice(start, start + len(tokens) - 1)
            assert batch["tokens"][b, part].tolist() == tokens[:-1]
            assert batch["labels"][b, part].tolist() == tokens[1:]
            assert batch["loss_mask"][b, part].tolist() == [int(m) for m in mask[1:]]
            assert batch["position_ids"][b, part].tolist() == list(range(len(tokens) - 1))
            assert start in ends
            start += len(tokens) - 1
        rest = slice(start, length)
        assert not batch["loss_mask"][b, rest].any()
        assert (batch["tokens"][b, rest] == EOS).all()
        assert torch.isin(torch.tensor([start, length]), ends).all()
