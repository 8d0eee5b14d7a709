"""The losses of `benchmarks/peers.py` have the gradients of the formulas that they stand for."""

from __future__ import annotations

import pytest

from benchmarks.peers import PEERS, case, gradient_error, obstacle
from tests.loss.ranks import Ranks

V, K = 480, 5


def check_gradients() -> None:
    import torch.distributed as dist

    for name in [*PEERS, "bucket", "topk", "vocab"]:
        if name in PEERS and obstacle(name, dist.get_world_size()):
            continue
        made = case(7, V, "float32", name, k=K)
        assert gradient_error(made, V, name, raised=0.0) < 3e-7, name


@pytest.mark.parametrize("ranks", [1, 2], indirect=True)
def test_every_peers_gradient_is_that_of_its_formula(ranks: Ranks) -> None:
    ranks.run(check_gradients)
