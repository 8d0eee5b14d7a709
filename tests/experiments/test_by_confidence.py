"""A student's losses by the teacher's probability of the label are those of transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from by_confidence import FROM, app, label_probability
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from nemo_kd.store import Store
from tests.checkpoints import models
from tests.store.samples import sample, spec, write


def test_classes_are_those_of_each_token(tmp_path: Path) -> None:
    """One token at a time; a label that is not among the K has probability 0."""
    model = models.save(models.llama("tied_grouped"), tmp_path / "model")
    vocab_size = AutoModelForCausalLM.from_pretrained(model).config.vocab_size
    of = spec(vocab_size=vocab_size, top_k=5)
    samples = []
    for row in range(12):
        one = sample(row, of, answers=6, spread=4.0)
        labels, ids = one.input_ids[one.answer_positions()], one.topk.ids
        for a, label in enumerate(labels[:4]):  # the label at some place among the K
            if label not in ids[a]:
                ids[a, (row + a) % 5] = label
        samples.append(replace(one, topk=replace(one.topk, ids=ids)))
    store = write(tmp_path / "store", of, samples)
    output = tmp_path / "out.json"
    ran = CliRunner().invoke(app, [str(model), str(store), f"--output={output}"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(output.read_text())
    assert sum(found["tokens"]) == 72 and found["tokens"][0] >= 24  # the others' labels
    student = AutoModelForCausalLM.from_pretrained(model).eval().double()
    losses: dict[int, list[float]] = {}
    right: dict[int, list[bool]] = {}
    for one in Store(store):
        p = label_probability(one)
        for a, t in enumerate(one.answer_positions()):
            label = int(one.input_ids[t])
            expected = sum(
                float(np.exp(z - one.topk.logsumexp[a, 0]))
                for v, z in zip(one.topk.ids[a], one.topk.logits[a], strict=True)
                if v == label
            )
            assert np.isclose(p[a], expected)
            with torch.no_grad():
                z = student(torch.from_numpy(one.input_ids[None, :t].astype(np.int64))).logits
            log_q = z[0, -1].log_softmax(-1)
            kind = max(i for i, low in enumerate(FROM) if p[a] >= low)
            losses.setdefault(kind, []).append(-float(log_q[label]))
            right.setdefault(kind, []).append(int(log_q.argmax()) == label)
    for kind, count in enumerate(found["tokens"]):
        assert count == len(losses.get(kind, []))
        if count:
            assert np.isclose(found["sft_loss"][kind], np.mean(losses[kind]), atol=1e-4)
            assert np.isclose(found["right"][kind], np.mean(right[kind]), atol=1e-4)
        else:
            assert found["sft_loss"][kind] is None
