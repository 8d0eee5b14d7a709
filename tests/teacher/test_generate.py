"""Generation: the model's own greedy answers, draws that do not depend on the batch, and the top-K
that a dump of the answers has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from nemo_kd.errors import NemoKDError
from nemo_kd.hf.writer import HFWriter
from nemo_kd.store import Store, StoreSpec, verify
from nemo_kd.teacher.generation import step
from nemo_kd.teacher.generation.filter import AnswerFilter
from nemo_kd.teacher.generation.step import Answers, Decoding, GenerationError, Prompt, choose
from nemo_kd.teacher.sampling import uniforms
from nemo_kd.teacher.select import Selection
from tests.conftest import Script
from tests.teacher.conftest import SETTINGS
from tests.teacher.test_hf import same_files, tiny_model

VOCABULARY, LENGTH = 60, 12  # the models have one more logit than the tokenizer tokens


def prompts(count: int = 5) -> list[Prompt]:
    draw = np.random.default_rng(0)
    sizes = [9, 4, 1, 7, 9][:count]
    return [
        Prompt(row, tuple(map(int, draw.integers(2, VOCABULARY, n))), LENGTH)
        for row, n in enumerate(sizes)
    ]


def written(
    model: PreTrainedModel, asked: list[Prompt], profile: str = "plain", **settings: object
) -> Answers:
    decoding = Decoding(**{"max_new_tokens": LENGTH, "stop_ids": (1,), **settings})  # type: ignore[arg-type]
    spec = StoreSpec(top_k=7, vocab_size=VOCABULARY, temperatures=(1.0, 2.0), profile=profile)
    return HFWriter(model, spec, decoding)(asked)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2", "OPT", "Bloom"])
@torch.no_grad()
def test_greedy_answers_and_their_topk_are_the_models_own(name: str) -> None:
    model = tiny_model(name, tie_word_embeddings=False)  # tied ones say the same word again
    endless = [set(ids) for ids in written(model, prompts(), stop_ids=(999,)).ids]
    # Tokens that occur in some answers but not in all.
    stops = sorted(set[int]().union(*endless) - endless[0].intersection(*endless))[:1]
    model.generation_config.repetition_penalty = 1.7  # not the teacher's distribution: ignored
    answers = written(model, prompts(), stop_ids=stops)
    model.generation_config.repetition_penalty = 1.0
    for b, (prompt, (_, topk)) in enumerate(zip(answers.prompts, answers.rows(), strict=True)):
        ids = torch.tensor([prompt.ids])
        settings = {"max_new_tokens": LENGTH, "eos_token_id": stops, "pad_token_id": 0}
        own = model.generate(ids, do_sample=False, attention_mask=torch.ones_like(ids), **settings)
        answer = own[0, ids.shape[1] :].tolist()
        assert answer == answers.ids[b]
        assert answers.finished(b) == (answer[-1] in stops)
        assert answers.finished(b) or len(answer) == LENGTH
        logits = model(own).logits[0, ids.shape[1] - 1 : -1, :VOCABULARY]
        top = logits.topk(7)
        assert torch.equal(topk.ids, top.indices)
        assert torch.allclose(topk.logits, top.values, rtol=1e-4, atol=1e-5)
        for j, temperature in enumerate((1.0, 2.0)):
            logsumexp = (logits / temperature).logsumexp(-1)
            assert torch.allclose(topk.logsumexp[:, j], logsumexp, rtol=1e-4, atol=1e-5)
    assert {answers.finished(b) for b in range(len(answers.ids))} == {True, False}


def test_draws_do_not_depend_on_the_batch() -> None:
    model = tiny_model("Llama")
    together = written(model, prompts(), temperature=1.5, top_p=0.9)
    for b, (prompt, (_, topk)) in enumerate(zip(prompts(), together.rows(), strict=True)):
        alone = written(model, [prompt], temperature=1.5, top_p=0.9)
        assert alone.ids == [together.ids[b]]
        ((_, expected),) = alone.rows()
        assert torch.allclose(expected.logits, topk.logits, rtol=1e-4, atol=1e-5)
    other = written(model, prompts(), temperature=1.5, top_p=0.9, seed=1)
    assert other.ids != together.ids


def test_a_model_that_looks_at_the_padding_is_refused() -> None:
    model = tiny_model("Llama")
    inputs = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *ids, **kwargs: {
        **inputs(*ids, **kwargs),
        "attention_mask": None,
    }
    with pytest.raises(GenerationError, match="with which LlamaForCausalLM generates differ"):
        written(model, prompts())
    assert len(written(model, prompts(1)).ids) == 1  # nothing is padded


def test_the_sampled_profile_draws_what_a_dump_of_the_answer_would() -> None:
    from nemo_kd.sft.rows import Row

    model = tiny_model("Llama")
    spec = StoreSpec(top_k=7, vocab_size=VOCABULARY, profile="sampled", profile_options={"seed": 3})
    decoding = Decoding(max_new_tokens=LENGTH, stop_ids=(999,))
    answers = HFWriter(model, spec, decoding)(prompts(2))
    for prompt, (row, topk) in zip(answers.prompts, answers.rows(), strict=True):
        ids = row.input_ids.astype(np.int64)
        mask = (np.arange(len(ids)) >= len(prompt.ids)).astype(np.uint8)
        assert np.array_equal(mask, row.loss_mask)
        selection = Selection(spec)
        uniform = selection.uniform([Row(prompt.row, row.input_ids, mask)])
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None]).logits[0, len(prompt.ids) - 1 : -1]
        expected = selection(logits, uniform)
        assert torch.equal(topk.ids, expected.ids)
        assert torch.equal(topk.logits, expected.logits)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (2.0, 0.3)])
def test_choices_follow_the_distribution_cut_at_top_p(temperature: float, top_p: float) -> None:
    draws = 20_000
    logits = torch.randn(17, generator=torch.Generator().manual_seed(2)) * 2
    decoding = Decoding(1, (0,), temperature=temperature, top_p=top_p)
    chosen = choose(logits.expand(draws, -1), uniforms(9, 9, draws), decoding)
    probability, order = torch.softmax(logits.double() / temperature, -1).sort(descending=True)
    inside = probability.cumsum(-1) - probability < top_p  # the mass before is not enough yet
    expected = torch.zeros(17, dtype=torch.float64)
    expected[order[inside]] = probability[inside] / probability[inside].sum()
    found = torch.bincount(chosen, minlength=17) / draws
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a frequency.
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


def test_of_equal_logits_the_first_is_chosen() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0]])
    assert choose(logits, torch.zeros(1), Decoding(1, (0,))).tolist() == [1]
    edge = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose(logits, edge, Decoding(1, (0,), temperature=1.0)).tolist() == [3]
    assert choose(logits, edge, Decoding(1, (0,), temperature=1.0, top_p=0.5)).tolist() == [2]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 10.0])
def test_choices_of_a_large_vocabulary_are_those_of_its_whole_order(
    monkeypatch: pytest.MonkeyPatch, spread: float, top_p: float
) -> None:
    """With many equal logits, and draws among the first tokens and beyond them."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(64, 4 * step.HEAD, generator=generator) * spread * 4).round() / 4
    logits[:, ::7] = -torch.inf
    draws, decoding = uniforms(9, 9, 64), Decoding(1, (0,), temperature=1.0, top_p=top_p)
    chosen = choose(logits, draws, decoding)
    monkeypatch.setattr(step, "HEAD", logits.shape[-1])
    assert torch.equal(chosen, choose(logits, draws, decoding))
    assert not torch.isin(chosen, torch.arange(0, logits.shape[-1], 7)).any()


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-40])
def test_the_smallest_temperatures_choose_as_greedy_does(temperature: float) -> None:
    """Their inverses, and logits divided by them, are beyond float64."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 17, generator=generator) * 30
    logits[:, 5] = -torch.inf
    chosen = choose(logits, uniforms(9, 9, 50), Decoding(1, (0,), temperature=temperature))
    assert torch.equal(chosen, logits.argmax(-1)) and len(set(chosen.tolist())) > 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_token_is_chosen_where_logits_are_no_distribution(
    temperature: float, value: float
) -> None:
    logits = torch.zeros(3, 7)
    logits[1, 4] = value
    decoding = Decoding(1, (0,), temperature=temperature)
    for bad in (logits, torch.full((1, 7), -torch.inf)):
        with pytest.raises(GenerationError, match="are not a distribution"):
            choose(bad, torch.zeros(len(bad)), decoding)


def test_an_answer_ends_where_its_logits_are_no_distribution() -> None:
    """The others go on, and the row is left to `on_bad_row`."""
    asked = prompts(3)
    spec = StoreSpec(top_k=7, vocab_size=VOCABULARY)
    answers = Answers(asked, Decoding(LENGTH, (1,)), Selection(spec))
    logits = torch.zeros(3, VOCABULARY)
    logits[:, 8] = 1
    assert answers.step(logits).tolist() == [8, 8, 8]
    logits[1, 30] = torch.nan
    assert answers.step(logits).tolist() == [8, 1, 8]
    assert answers.open.tolist() == [True, False, True]
    assert answers.rows()[1][1].logits.isnan().any() and len(answers.rows()[0][1].ids) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 is below 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ({"samples_per_prompt": 2}, "the same answer each time"),
        ({"top_p": 0.9}, "top_p=0.9 with temperature 0 has no effect"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(NemoKDError, match=message):
        Decoding(**{"max_new_tokens": 5, "stop_ids": (1,), **settings})  # type: ignore[arg-type]


def test_a_filter_is_a_pattern_a_function_or_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_checks.py").write_text(
        "def is_right(answer, row):\n    return answer.endswith(row['output'])\n"
    )
    monkeypatch.chdir(tmp_path)
    row = {"output": "42"}
    both = AnswerFilter("is", "my_checks:is_right")
    assert both.keeps("it is 42", row)
    assert not both.keeps("it is 43", row) and not both.keeps("it was 42", row)
    assert AnswerFilter("^it").keeps("it was", row) and AnswerFilter().keeps("", row)
    for name, message in (
        ("my_checks", "expected module:function"),
        ("my_checks:is_wrong", "no attribute 'is_wrong'"),
        ("no_checks:is_right", "No module named 'no_checks'"),
        ("my_checks:__name__", "is not a function"),
    ):
        with pytest.raises(GenerationError, match=message):
            AnswerFilter(function=name)
    with pytest.raises(GenerationError, match="is not a regular expression"):
        AnswerFilter("(")


def lines(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]


def test_a_dump_of_the_written_file_gives_the_same_store(world: Path) -> None:
    answers, dumped = Store(world / "answers"), Store(world / "dumped")
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    assert 5 < len(answers) == len(dumped) < 3 * len(rows)  # those that did not end are dropped
    for ours, again, line in zip(answers, dumped, lines(world / "answers"), strict=True):
        assert line["input"] == rows[ours.row // 3]["input"]
        assert np.array_equal(ours.input_ids, again.input_ids)
        assert np.array_equal(ours.loss_mask, again.loss_mask)
        assert ours.input_ids[-1] == 0  # the end of the sequence is learnt too
        assert np.array_equal(ours.topk.ids, again.topk.ids)
        assert np.abs(ours.topk.logits - again.topk.logits).max() < 2**-6  # float16
        assert np.abs(ours.topk.logsumexp - again.topk.logsumexp).max() < 1e-4
    assert not list(verify(answers))


def test_an_interrupted_run_resumes_to_the_same_bytes(world: Path) -> None:
    same_files(world / "answers", world / "resumed")


def test_only_answers_that_pass_the_filter_are_kept(world: Path) -> None:
    texts = {
        s.row: line["output"]
        for s, line in zip(Store(world / "answers"), lines(world / "answers"), strict=True)
    }
    kept = {
        s.row: line["output"]
        for s, line in zip(Store(world / "filtered"), lines(world / "filtered"), strict=True)
    }
    pattern = re.compile("[0-9].*[0-9]")
    assert 0 < len(kept) < 3 * len((world / "train.jsonl").read_text().splitlines())
    assert all(pattern.search(text) for text in kept.values())
    passed = {row: text for row, text in texts.items() if pattern.search(text)}
    assert passed and passed.items() <= kept.items()
    unfinished = [s for s in Store(world / "filtered") if s.input_ids[-1] != 0]
    assert unfinished and all(s.loss_mask.sum() == 40 for s in unfinished)


def assert_same_answers(directory: Path, other: Path) -> None:
    assert lines(directory) == lines(other)
    for a, b in zip(Store(directory), Store(other), strict=True):
        assert a.row == b.row
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.topk.ids, b.topk.ids)
        assert np.abs(a.topk.logits - b.topk.logits).max() < 2**-6  # float16
        assert np.abs(a.topk.logsumexp - b.topk.logsumexp).max() < 1e-4


def test_the_converted_teacher_writes_the_same_in_nemo(world: Path) -> None:
    assert_same_answers(world / "answers", world / "nemo")


def generation(world: Path, teacher: str, store: Path) -> list[str]:
    return [
        *SETTINGS,
        "data.prompt_template='{input}{output}'",
        "generation.max_new_tokens=40",
        "generation.temperature=1.0",
        "generation.samples_per_prompt=3",
        f"model.restore_from_path={world}/{teacher}",
        f"data.file_path={world}/train.jsonl",
        f"output_dir={store}",
    ]


@pytest.mark.slow
def test_the_script_at_two_ranks_writes_the_same_bytes(
    world: Path, script: Script, tmp_path: Path
) -> None:
    settings = generation(world, "typist", tmp_path / "store")
    done = script("generate_with_teacher.py", *settings, processes=2, fork=False)
    assert "dropped, not ended within generation.max_new_tokens" in done.stdout
    total = len(Store(world / "answers"))
    assert f"{total} answers as text; SFT tokenizes {total} of them" in done.stdout
    same_files(world / "answers", tmp_path / "store")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_nemo_writes_the_same_over_two_ranks(
    world: Path, script: Script, tmp_path: Path, layout: str
) -> None:
    settings = generation(world, "typist.nemo", tmp_path / "store")
    parallel = ["teacher.kind=nemo", f"model.{layout}_model_parallel_size=2"]
    script("generate_with_teacher.py", *settings, *parallel, processes=2)
    assert_same_answers(world / "answers", tmp_path / "store")
