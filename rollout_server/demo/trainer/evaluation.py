"""Greedy accuracy of a policy on the held-out problems, through `/v1/completions` as any evaluation tool would."""

from __future__ import annotations

from dataclasses import dataclass

from trainer_client import PublishedVersion, RolloutClient

from .task import Problem, lenient, reward


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One answer per problem, in the problems' order."""

    problems: tuple[Problem, ...]
    texts: tuple[str, ...]
    ended: tuple[bool, ...]
    """True if the end token closed the answer."""

    @property
    def accuracy(self) -> float:
        """Share of right sums in the style that is rewarded."""
        scores = [reward(*answer) for answer in zip(self.problems, self.texts, self.ended, strict=True)]
        return sum(scores) / len(scores)

    @property
    def lenient_accuracy(self) -> float:
        """Share of right sums in any style."""
        right = [lenient(problem, text) for problem, text in zip(self.problems, self.texts, strict=True)]
        return sum(right) / len(right)


def evaluate(
    client: RolloutClient, model: str | PublishedVersion, problems: list[Problem], max_tokens: int
) -> Evaluation:
    """Answers `problems` greedily. `model` is an address such as `base`, or exactly the version a push returned."""
    prompts = [problem.prompt for problem in problems]
    reply = client.completions(prompts, model=model, max_tokens=max_tokens, temperature=0)
    choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
    if len(choices) != len(problems):
        raise RuntimeError(f"{len(problems)} prompts were answered with {len(choices)} choices.")
    return Evaluation(
        problems=tuple(problems),
        texts=tuple(choice["text"] for choice in choices),
        ended=tuple(choice["finish_reason"] == "stop" for choice in choices),
    )
