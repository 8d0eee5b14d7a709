"""Block influence, on a tiny Llama whose layers are known."""

from __future__ import annotations

from pathlib import Path

import block_influence
import pytest
import torch
from torch.nn.functional import cosine_similarity

from nemo_kd.errors import NemoKDError
from tests.checkpoints import models


def samples() -> list[torch.Tensor]:
    ids = models.tokenizer()(models.TEXT[:300], return_tensors="pt").input_ids
    return [ids[:, :50], ids[:, 50:51], ids[:, 51:90]]


def test_influence_is_the_mean_turn_of_the_residual_stream() -> None:
    model = models.llama("tied_grouped")
    streams = [model(ids, output_hidden_states=True).hidden_states for ids in samples()]
    influence = block_influence.block_influence(model, samples())
    for layer in range(3):  # the last of transformers' states has passed the final norm
        pairs = [(states[layer], states[layer + 1]) for states in streams]
        turns = torch.cat([1 - cosine_similarity(a, b, dim=-1)[0].double() for a, b in pairs])
        torch.testing.assert_close(influence[layer], turns.mean(), rtol=1e-5, atol=1e-6)


def test_a_layer_that_does_nothing_has_none_and_goes_first() -> None:
    model = models.llama("untied_llama3")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    influence = block_influence.block_influence(model, samples())
    assert abs(influence[2]) < 1e-6
    assert block_influence.most_influential(influence, 3) == [0, 1, 3]


def test_the_output_replaces_neither_an_input_nor_another_file(tmp_path: Path) -> None:
    data, other = tmp_path / "rows.jsonl", tmp_path / "notes.json"
    data.write_text("{}\n")
    other.write_text('{"kept": [0]}')
    for output, message in ((data, "is a source"), (other, "is not the layers that this script")):
        before = output.read_bytes()
        with pytest.raises(NemoKDError, match=message):
            block_influence.main(tmp_path / "teacher", data, 2, output)
        assert output.read_bytes() == before
