"""Writes the data of the three tasks here: `python -m examples.lm_eval.make_tasks`, for the embedded model.

With the server running, from the root of the repository:

    lm_eval --model local-completions --include_path examples/lm_eval \\
        --model_args model=base,base_url=http://127.0.0.1:8000/v1/completions,tokenizer_backend=remote \\
        --tasks additions,addition_text,addition_answers

`model` is any policy: `base`, `NAME`, `NAME@7`. `HF_HUB_OFFLINE=1` keeps lm-eval from looking for anything elsewhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from rollout_server.demo.trainer.task import Problem, Style, held_out_problems

HERE = Path(__file__).parent
COUNT = 48


def choices(problem: Problem, draw: random.Random) -> list[str]:
    """The sum in digits, twice in another style, and a wrong one in digits; shuffled."""
    wrong = str(problem.total + draw.choice((1, 10)))
    found = [problem.answer(style) for style in (Style.DIGITS, Style.SENTENCE, Style.WORDS)] + [wrong]
    draw.shuffle(found)
    return found


def write(file: Path, rows: Iterable[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(directory: Path = HERE) -> None:
    draw = random.Random(0)
    problems = held_out_problems(COUNT, seed=0)
    sums, texts = [], []
    for problem in problems:
        answers = choices(problem, draw)
        digits = problem.answer(Style.DIGITS)
        sums.append({"question": problem.prompt, "choices": answers, "answer": answers.index(digits)})
        texts.append({"text": problem.prompt + problem.answer(draw.choice(list(Style)))})
    write(directory / "sums.jsonl", sums)
    write(directory / "texts.jsonl", texts)


if __name__ == "__main__":
    main()
