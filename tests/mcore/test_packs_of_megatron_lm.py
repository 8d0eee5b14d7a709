"""`--sft` packs samples; Megatron-LM's loop itself does not see it."""

from __future__ import annotations

from argparse import Namespace

import pytest

from nemo_kd.mcore.megatron_lm import _take_sft


@pytest.mark.parametrize("given", [True, False])
def test_megatron_lm_logs_means_over_answer_tokens(given: bool) -> None:
    """With `args.sft` it divides the sum of each pack by its number, which may be 0."""
    args = Namespace(sft=given)
    for _ in range(2):  # a virtual pipeline asks for each chunk
        _take_sft(args)
        assert args.kd_packed is given and args.sft is False
