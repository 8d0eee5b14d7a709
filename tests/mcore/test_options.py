"""Megatron-LM's `--kd-…` options: their errors name the option."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.megatron_lm import add_arguments, settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--kd-beta 0.3", "--kd-beta is 0.3, but divergence 'forward_kl' has no beta"),
        ("--kd-schedule cosine", "--kd-schedule is 'cosine', but neither alpha nor"),
        ("--kd-schedule-steps 9", "--kd-schedule-steps is 9, but neither alpha nor"),
        (
            "--kd-store-alpha 0.5 --kd-kd-weight 4",
            "--kd-store-alpha gives stores weights of their own: remove it, or --kd-sft-weight",
        ),
        ("--kd-store-alpha 0.5 --kd-alpha-end 0", "--kd-alpha-end 0.0 has no effect on the tr"),
        ("--kd-support vocab --kd-divergence reverse_kl", "divergence 'reverse_kl' is infinite"),
    ],
)
def test_settings_without_effect_are_refused_by_option(given: str, message: str) -> None:
    args = add_arguments(ArgumentParser()).parse_args(["--kd-store", "store", *given.split()])
    with pytest.raises(NemoKDError) as error:
        settings(args)
    assert message in str(error.value)


def test_the_settings_of_the_loss_are_the_options() -> None:
    line = "--kd-store a --kd-divergence jsd --kd-beta 0.3 --kd-alpha-end 0 --kd-schedule cosine"
    found = settings(add_arguments(ArgumentParser()).parse_args(line.split()))
    assert (found.divergence, found.beta, found.alpha_end) == ("jsd", 0.3, 0)
