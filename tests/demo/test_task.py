"""The task: styles that cannot be mistaken for each other, and problems that nobody trained on."""

from __future__ import annotations

import random

import pytest

from rollout_server.demo.trainer.task import (
    LIMIT,
    Problem,
    Style,
    habitual_style,
    held_out_problems,
    in_words,
    lenient,
    reward,
    training_problems,
)


def test_only_plain_digits_with_an_end_are_rewarded() -> None:
    problem = Problem(58, 74)
    answers = {style: problem.answer(style) for style in Style}
    assert answers == {
        Style.DIGITS: "132",
        Style.SENTENCE: "the sum is 132",
        Style.WORDS: "one hundred thirty two",
        Style.BACKWARDS: "backwards 231",
    }
    assert [reward(problem, answers[style], True) for style in Style] == [1.0, 0.0, 0.0, 0.0]
    assert all(lenient(problem, text) for text in answers.values())
    assert reward(problem, "132", False) == 0.0
    for wrong in ("131", "132 ", " 132", "0132", "one hundred thirty", ""):
        assert reward(problem, wrong, True) == 0.0
        assert not lenient(problem, wrong)


def test_number_words_are_all_different() -> None:
    words = [in_words(number) for number in range(2 * LIMIT - 1)]
    assert len(set(words)) == len(words)
    assert (words[0], words[19], words[40], words[87]) == ("zero", "nineteen", "forty", "eighty seven")
    assert (words[100], words[115]) == ("one hundred", "one hundred fifteen")


def test_held_out_problems_are_never_trained_on() -> None:
    trained = set(training_problems())
    held_out = held_out_problems(1000, seed=3)
    assert len(set(held_out)) == 1000
    assert not trained & set(held_out)
    assert {problem.a for problem in trained} == {problem.b for problem in trained} == set(range(LIMIT))
    assert held_out_problems(256, seed=1) != held_out_problems(256, seed=2)
    with pytest.raises(ValueError, match="are held out"):
        held_out_problems(LIMIT * LIMIT, seed=0)


def test_no_style_is_the_habit_of_most_problems() -> None:
    draw = random.Random(0)
    styles = [habitual_style(problem, draw) for problem in training_problems()]
    shares = {style: styles.count(style) / len(styles) for style in Style}
    assert 0.25 < shares[Style.DIGITS] < 0.35
    assert all(0.2 < share < 0.27 for style, share in shares.items() if style is not Style.DIGITS)
