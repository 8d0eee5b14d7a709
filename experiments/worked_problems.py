"""Arithmetic and list problems whose answers are worked out step by step and can be checked.

A problem is drawn from a `random.Random`; its answer has one step per line and ends with a line
`Answer: …`, by which `correct` judges a generated answer. Steps have one wording or several, of
which one is drawn for each line: then the label shows one of the right continuations, the teacher
knows them all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


def words_of(text: str) -> list[str]:
    return text.split()


FINAL = re.compile(r"^Answer: *(.+?) *$", re.MULTILINE)

NAMES = words_of(
    "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kim Leo Mia Nora Omar Pia Quinn Rosa Sam "
    "Tara Uma Vera Will Xena Yara Zoe"
)
GOODS = words_of("pens books cups maps lamps hats kites bags balls rugs keys pots")
WORDS = words_of(
    "apple stone river cloud paper table green music horse light bread chair glass house train "
    "plant sugar tiger water world yellow winter button candle dragon engine finger garden "
    "hammer island jacket kitten ladder magnet needle orange pencil rabbit silver ticket"
)


ADD = (
    "{a} + {b} = {c}",
    "{a} plus {b} is {c}.",
    "To {a} add {b}: {c}.",
    "Now {a} and {b} make {c}.",
    "The sum of {a} and {b} is {c}.",
    "From {a}, {b} more gives {c}.",
)
SUBTRACT = (
    "{a} - {b} = {c}",
    "{a} minus {b} is {c}.",
    "From {a} take {b}: {c}.",
    "Of {a}, without {b}, {c} is left.",
    "The difference of {a} and {b} is {c}.",
    "With {a} for {b}, {c} comes back.",
)
MULTIPLY = (
    "{a} * {b} = {c}",
    "{a} times {b} is {c}.",
    "For {a} at {b} each: {c}.",
    "{a} pieces at ${b} cost ${c}.",
    "The product of {a} and {b} is {c}.",
    "We need {a} of {b}: {c}.",
)
TAKE = (
    "Of {left} take {smallest}.",
    "From {left} the smallest is {smallest}.",
    "In {left} I find {smallest}.",
    "Next, of {left}: {smallest}.",
    "Left are {left}; {smallest} is the least.",
    "Looking at {left}, we pick {smallest}.",
)
PLACE = (
    "{place}. {word}",
    "Word {place}: {word}",
    "Then comes {word}",
    "({place}) {word}",
    "Now write {word}",
    "At place {place}, {word}",
)

Choose = Callable[[Sequence[str]], str]
"""Choose one of several wordings."""


def first(wordings: Sequence[str]) -> str:
    return wordings[0]


def running_sum(draw: random.Random, choose: Choose = first) -> tuple[str, str]:
    """Add three to five numbers, one at a time."""
    numbers = [draw.randint(3, 99) for _ in range(draw.randint(3, 5))]
    total, lines = numbers[0], []
    for number in numbers[1:]:
        lines.append(choose(ADD).format(a=total, b=number, c=total + number))
        total += number
    question = f"Add {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}."
    return question, answered(lines, total)


def sorting(draw: random.Random, choose: Choose = first) -> tuple[str, str]:
    """Sort three or four numbers by taking the smallest of those that are left."""
    left = draw.sample(range(1, 100), draw.randint(3, 4))
    question = f"Sort from smallest to largest: {', '.join(map(str, left))}."
    taken, lines = [], []
    while len(left) > 1:
        smallest = min(left)
        lines.append(choose(TAKE).format(left=", ".join(map(str, left)), smallest=smallest))
        left.remove(smallest)
        taken.append(smallest)
    return question, answered(lines, ", ".join(map(str, [*taken, *left])))


def reversal(draw: random.Random, choose: Choose = first) -> tuple[str, str]:
    """Reverse four to six words by taking the last one that is left."""
    words = draw.sample(WORDS, draw.randint(4, 6))
    question = f"Write these words in reverse order: {' '.join(words)}."
    lines = [
        choose(PLACE).format(place=place, word=word)
        for place, word in enumerate(reversed(words), 1)
    ]
    return question, answered(lines, " ".join(reversed(words)))


def shopping(draw: random.Random, choose: Choose = first) -> tuple[str, str]:
    """The change after buying two kinds of goods."""
    name, (first, second) = draw.choice(NAMES), draw.sample(GOODS, 2)
    counts, prices = draw.sample(range(2, 10), 2), draw.sample(range(2, 13), 2)
    costs = [count * price for count, price in zip(counts, prices, strict=True)]
    paid = draw.choice([note for note in (50, 100, 150, 200, 250) if note > sum(costs)])
    question = (
        f"{name} buys {counts[0]} {first} at ${prices[0]} each and {counts[1]} {second} at "
        f"${prices[1]} each, and pays with ${paid}. What is the change?"
    )
    lines = [
        choose(MULTIPLY).format(a=counts[0], b=prices[0], c=costs[0]),
        choose(MULTIPLY).format(a=counts[1], b=prices[1], c=costs[1]),
        choose(ADD).format(a=costs[0], b=costs[1], c=sum(costs)),
        choose(SUBTRACT).format(a=paid, b=sum(costs), c=paid - sum(costs)),
    ]
    return question, answered(lines, paid - sum(costs))


TASKS: dict[str, Callable[[random.Random, Choose], tuple[str, str]]] = {
    "running_sum": running_sum,
    "sorting": sorting,
    "reversal": reversal,
    "shopping": shopping,
}


def answered(lines: list[str], answer: object) -> str:
    return "\n".join([*lines, f"Answer: {answer}"])


def problems(seed: int, *, several_wordings: bool = False) -> Iterator[tuple[str, str, str]]:
    """Yield task, question and answer without end, the tasks in turn; no question twice.

    The questions and final answers of a seed are the same with one wording and with several.
    """
    draw, seen = random.Random(seed), set[str]()
    choose: Choose = random.Random(seed).choice if several_wordings else first
    while True:
        for task, make in TASKS.items():
            question, answer = make(draw, choose)
            while question in seen:
                question, answer = make(draw, choose)
            seen.add(question)
            yield task, question, answer


def final(text: str) -> str | None:
    """The final answer of a worked answer, its first if it has several; None if it has none."""
    found = FINAL.search(text)
    return found[1] if found else None


def judge(samples: Sequence[dict[str, Any]], model: str = "student") -> dict[str, Any]:
    """The numbers of `samples`, and of final answers that are right (`exact`).

    `right` has a character for each sample, `1` or `0`, by which answers of two models to the same
    questions are compared.
    """
    right = [correct(each["completions"][model], each["reference"]) for each in samples]
    return {
        "samples": len(samples),
        "exact": sum(right),
        "right": "".join(str(int(each)) for each in right),
    }


def keeps(answer: str, row: Mapping[str, Any]) -> bool:
    """Whether an answer to a row of the training split is right; the filter of a generation."""
    return correct(answer, row["output"])


def correct(text: str, reference: str) -> bool:
    """Whether a generated answer ends in the reference's final answer, whatever its steps."""
    return final(text) == final(reference)
