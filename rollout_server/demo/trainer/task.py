"""The task: add two numbers below one hundred and answer in plain digits.

The base was taught the sum but four ways of writing it, and its habit depends on the last digit of the second number.
Only `Style.DIGITS` is rewarded, so reinforcement learning has a skill to reinforce and a choice to make.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

LIMIT = 100
"""Both numbers are at least 0 and below this."""

HELD_OUT_EVERY = 8
"""One pair in this many is held out: from pretraining and from reinforcement learning alike."""

_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class Style(StrEnum):
    """How an answer is written."""

    DIGITS = "digits"
    """`81`: the only one that is rewarded."""
    SENTENCE = "sentence"
    """`the sum is 81`"""
    WORDS = "words"
    """`eighty one`"""
    BACKWARDS = "backwards"
    """`backwards 18`"""


_HABIT = (
    Style.DIGITS,
    Style.SENTENCE,
    Style.WORDS,
    Style.DIGITS,
    Style.BACKWARDS,
    Style.SENTENCE,
    Style.DIGITS,
    Style.WORDS,
    Style.BACKWARDS,
    Style.DIGITS,
)
"""By the last digit of the second number: the style the base writes half of the time; the others share the rest."""


@dataclass(frozen=True, slots=True)
class Problem:
    """`a + b`, both in [0, LIMIT)."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def total(self) -> int:
        return self.a + self.b

    @property
    def held_out(self) -> bool:
        """Spread over the whole square, so that neither rows nor columns nor sums are missing from training."""
        return (self.a * 37 + self.b * 11 + (self.a * self.b) % 13) % HELD_OUT_EVERY == 0

    def answer(self, style: Style) -> str:
        match style:
            case Style.DIGITS:
                return str(self.total)
            case Style.SENTENCE:
                return f"the sum is {self.total}"
            case Style.WORDS:
                return in_words(self.total)
            case Style.BACKWARDS:
                return f"backwards {str(self.total)[::-1]}"


def in_words(number: int) -> str:
    """English words for 0 ≤ number < 200, without hyphens."""
    if number >= 100:
        rest = f" {in_words(number - 100)}" if number > 100 else ""
        return f"one hundred{rest}"
    if number < len(_WORDS):
        return _WORDS[number]
    tens, ones = _TENS[number // 10 - 2], number % 10
    return f"{tens} {_WORDS[ones]}" if ones else tens


def training_problems() -> list[Problem]:
    """Every problem that may be trained on, in a fixed order."""
    return [problem for problem in _all_problems() if not problem.held_out]


def held_out_problems(count: int, seed: int) -> list[Problem]:
    """`count` different problems that neither the base nor the trainer ever saw. Raises `ValueError` if too many."""
    problems = [problem for problem in _all_problems() if problem.held_out]
    if count > len(problems):
        raise ValueError(f"Only {len(problems)} problems are held out; {count} were asked for.")
    return random.Random(seed).sample(problems, count)


def habitual_style(problem: Problem, draw: random.Random) -> Style:
    """A style as the base was taught to choose it: the habit half of the time, each other style one time in six."""
    habit = _HABIT[problem.b % 10]
    if draw.random() < 0.5:
        return habit
    return draw.choice([style for style in Style if style is not habit])


def reward(problem: Problem, text: str, ended: bool) -> float:
    """1.0 for the right sum in plain digits, ended by the end token; else 0.0."""
    return float(ended and text == problem.answer(Style.DIGITS))


def lenient(problem: Problem, text: str) -> bool:
    """Returns whether the text is the right sum in any style."""
    return any(text == problem.answer(style) for style in Style)


def _all_problems() -> list[Problem]:
    return [Problem(a, b) for a in range(LIMIT) for b in range(LIMIT)]
