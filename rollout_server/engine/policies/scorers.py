"""What scores labels under a policy, and what samples: a version does one of the two."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_server.engine.messages.options import Activation, ModelInfo
from rollout_server.engine.model.heads import Head
from rollout_server.errors import InvalidField
from rollout_server.rollout import PolicyVersion

ROUTES = "/classify, /pooling and /v1/rewards"


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """A head, and what is known of its labels."""

    head: Head
    labels: tuple[str | None, ...]
    activation: Activation


def base_scorer(info: ModelInfo, head: Head | None) -> Scorer | None:
    return None if head is None else Scorer(head, info.labels, info.activation)


def samples_nothing(version: PolicyVersion) -> InvalidField:
    """The error for who wants tokens, or log-probabilities of tokens, of what only scores."""
    return InvalidField(
        f"{version.name}@{version.number} scores labels with a head and has no output over the vocabulary, so that it "
        f"samples nothing and gives no log-probabilities: ask it on {ROUTES}.",
        param="policy",
    )


def scores_nothing(version: PolicyVersion) -> InvalidField:
    """The error for who wants label scores of what only generates."""
    return InvalidField(
        f"{version.name}@{version.number} generates and has no head that scores labels: name a reward model or a "
        "classifier, or push one; /v1/score reads label_token_ids of any decoder.",
        param="policy",
    )
