"""A dump by a server has the content of a dump by the same model in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.store import Store
from nemo_kd.store.fingerprint import tokenizer_files_fingerprint
from nemo_kd.store.tools.verify import verify
from tests.checkpoints import models
from tests.processes import ROOT
from tests.served.conftest import ROWS, hf, run, served
from tests.served.server import Server

HALF = 2.0**-11
"""Relative error of rounding to float16."""


def same_to_float16(ours: Store, theirs: Store) -> float:
    """Compare tokens, ids and log-probabilities; return the largest difference in nats."""
    most = 0.0
    assert len(ours) == len(theirs) == ROWS
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.loss_mask, b.loss_mask)
        assert not a.topk.logsumexp.any()
        left, right = a.topk.logits, b.topk.logits - b.topk.logsumexp
        assert np.allclose(left, right, rtol=3 * HALF, atol=1e-5)
        # Ids may be in another order where log-probabilities are equal in float16.
        for i, k in zip(*(a.topk.ids != b.topk.ids).nonzero(), strict=True):
            assert np.isclose(left[i], right[i, k], rtol=3 * HALF).sum() > 1
        most = max(most, float(np.abs(left - right).max()))
    return most


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_the_store_is_that_of_the_same_model_in_transformers(
    teacher: Path, server: Server, tmp_path: Path, api: str
) -> None:
    ours = run(*served(server, teacher, tmp_path / "store", f"teacher.api={api}"))
    assert same_to_float16(ours, Store(teacher / "store")) < 0.01
    assert not list(verify(tmp_path / "store"))
    files = tokenizer_files_fingerprint(teacher / "llama")
    of = {"name": "teacher", "fingerprint": None, "api": api, "tokenizer": files}
    assert ours.spec.teacher == of
    assert ours.spec.tokenizer == Store(teacher / "store").spec.tokenizer
    assert str(server.port) not in (tmp_path / "store/manifest.json").read_text()
    assert len(server.requests) == ROWS + 1


def test_conversations_by_a_chat_template(teacher: Path, server: Server, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (teacher / "train.jsonl").read_text().splitlines()]
    turns = [
        {"messages": [{"role": "user", "content": r["input"][:30]}, answer, answer]}
        for r in rows
        for answer in [{"role": "assistant", "content": r["output"][:30]}]
    ]
    data = tmp_path / "messages.jsonl"
    data.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    template = f"data.chat_template={ROOT}/tests/sft/templates/qwen3.jinja"
    more = [f"data.file_path={data}", template]
    ours = run(*served(server, teacher, tmp_path / "store", *more))
    theirs = run(*hf(teacher, tmp_path / "hf"), *more)
    same_to_float16(ours, theirs)
    assert ours.spec.template == theirs.spec.template


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_all_ids_of_the_vocabulary(teacher: Path, server: Server, tmp_path: Path, api: str) -> None:
    more = [f"teacher.api={api}", "dump.top_k=299", "data.max_seq_length=30"]
    for sample in run(*served(server, teacher, tmp_path / "store", *more)):
        assert np.allclose(np.exp(sample.topk.logits).sum(1), 1, atol=1e-3)


def test_the_bucket_of_other_ids_is_exact(teacher: Path, server: Server, tmp_path: Path) -> None:
    """1 - Σ p of a served store is that of the model in transformers."""
    ours = run(*served(server, teacher, tmp_path / "store"))
    for a, b in zip(ours, Store(teacher / "store"), strict=True):
        rest = 1 - np.exp(a.topk.logits.astype(float)).sum(1)
        expected = 1 - np.exp((b.topk.logits - b.topk.logsumexp).astype(float)).sum(1)
        assert np.allclose(rest, expected, atol=2e-3)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_padding_of_the_lm_head_becomes_absent(teacher: Path, tmp_path: Path, api: str) -> None:
    with Server(teacher / "padded") as server:
        server.model.lm_head.weight.data[-1] = 0  # tied: the padding's logit is 0
        server.model.lm_head.weight.data[:-1] *= 3
        more = [f"teacher.api={api}", "dump.top_k=299", "on_bad_row=drop"]
        store = run(*served(server, teacher, tmp_path / "store", *more))
        ids = np.concatenate([sample.topk.ids for sample in store])
    assert len(store) and ids.max() == 298
    assert (ids[:, -1] == -1).any() and (ids[:, :-1] >= 0).all()


def test_requests_ask_for_unprocessed_log_probabilities_without_the_cache(
    teacher: Path, server: Server, tmp_path: Path
) -> None:
    run(*served(server, teacher, tmp_path / "store"))
    bodies = server.requests[1:]
    sent = {tuple(body["prompt"]) for body in bodies}
    assert sent == {tuple(s.input_ids.tolist()) for s in Store(teacher / "store")}
    assert len({body["cache_salt"] for body in bodies}) == ROWS
    for body in bodies:
        assert (body["temperature"], body["top_p"], body["repetition_penalty"]) == (1, 1, 1)
        assert (body["max_tokens"], body["prompt_logprobs"]) == (1, 20)


def test_requests_in_flight_are_bounded_and_used(
    teacher: Path, server: Server, tmp_path: Path
) -> None:
    server.seconds = 0.1
    more = ["teacher.concurrency=3", "rows_per_shard=256"]
    run(*served(server, teacher, tmp_path / "store", *more))
    assert server.most_in_flight == 3


def same_files(a: Path, b: Path) -> None:
    names = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert len(names) > 5
    assert names == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_another_replica_finishes_the_store(teacher: Path, server: Server, tmp_path: Path) -> None:
    run(*served(server, teacher, tmp_path / "one"))
    overrides = served(server, teacher, tmp_path / "two", "teacher.retries=0")
    server.faults = lambda number: "500" if number >= ROWS + 10 else ""
    with pytest.raises(ValueError, match="EngineCore encountered an issue, after 1 attempts"):
        run(*overrides)
    assert len(list((tmp_path / "two").glob("shard-*"))) >= 1
    with Server(teacher / "llama") as other:
        run(*served(other, teacher, tmp_path / "two"))
        assert 1 < len(other.requests) < ROWS
    same_files(tmp_path / "one", tmp_path / "two")


def test_another_model_of_the_same_name_does_not_finish_the_store(
    teacher: Path, server: Server, tmp_path: Path
) -> None:
    overrides = served(server, teacher, tmp_path / "store", "teacher.retries=0")
    server.faults = lambda number: "500" if number >= ROWS else ""
    with pytest.raises(ValueError, match="EngineCore encountered an issue"):
        run(*overrides)
    kept = {path: path.read_bytes() for path in (tmp_path / "store").glob("shard-*/*")}
    assert kept
    model = models.llama("untied_llama3")
    model.resize_token_embeddings(models.TOKENS)
    models.save(model, tmp_path / "other")
    with Server(tmp_path / "other") as other:
        again = served(other, teacher, tmp_path / "store")
        with pytest.raises(NemoKDError, match="another model is served under the same name"):
            run(*again)
        assert {path: path.read_bytes() for path in kept} == kept
        assert len(run(*served(other, teacher, tmp_path / "another"))) == ROWS


def test_a_changed_tokenizer_of_the_same_vocabulary_is_another_configuration(
    teacher: Path, server: Server, tmp_path: Path
) -> None:
    own = shutil.copytree(teacher / "llama", tmp_path / "tokenizer")
    overrides = served(server, teacher, tmp_path / "store", f"teacher.tokenizer={own}")
    run(*overrides)
    moved = own.rename(tmp_path / "moved")  # the same files in another place
    overrides += [f"teacher.tokenizer={moved}"]
    assert run(*overrides).spec.tokenizer["path"] == str(own)
    own = moved
    tokens = json.loads((own / "tokenizer.json").read_text())
    tokens["normalizer"] = {"type": "Replace", "pattern": {"String": "ZZ"}, "content": "r"}
    (own / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(NemoKDError, match=r"of another configuration:\n  teacher\.tokenizer: "):
        run(*overrides)


def test_a_server_makes_the_batches(
    teacher: Path, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(*served(server, teacher, tmp_path / "store", "model.micro_batch_size=4"))
    assert (
        "model.micro_batch_size=4 has no effect with teacher.kind=served" in capfd.readouterr().err
    )


def test_rows_are_sent_as_tokens_of_the_given_tokenizer_only(
    teacher: Path, server: Server, tmp_path: Path
) -> None:
    """A model name that a LoRA adapter of the server has beside the base model."""
    server.names = ["base", "teacher"]
    more = ["teacher.model=base", f"teacher.url={server.url}/v1/"]
    store = run(*served(server, teacher, tmp_path / "store", *more))
    assert store.spec.teacher["name"] == "base"
    assert {body["model"] for body in server.requests} == {"base"}
    text = json.loads((teacher / "train.jsonl").read_text().splitlines()[0])
    decoded = server.tokenizer.decode(store[0].input_ids.tolist()[:-1])
    assert decoded.startswith(text["input"][:20])
