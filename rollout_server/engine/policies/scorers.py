"""What scores labels under a policy, and what samples: a version does one of the two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from adapters.bundle import AdapterBundle, Content
from adapters.versions.registry import Entry
from rollout_server.engine.messages.options import Activation, ModelInfo
from rollout_server.engine.model.tasks.heads import Head, head_of
from rollout_server.engine.model.tasks.kinds import default_activation
from rollout_server.errors import Conflict, InvalidField
from rollout_server.rollout import PolicyVersion

ROUTES = "/classify, /pooling and /v1/rewards"


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """A head, and what is known of its labels."""

    head: Head
    labels: tuple[str | None, ...]
    activation: Activation


class Scorers:
    """Heads of versions, and of the base. One that a version brings takes the place of the base's. They are made when
    they are first asked for."""

    def __init__(self, info: ModelInfo, head: Head | None) -> None:
        self._info = info
        self.base = None if head is None else Scorer(head, info.labels, info.activation)
        self._made: dict[Content, Scorer] = {}

    def of(self, content: Content, bundle: AdapterBundle) -> Scorer | None:
        """What scores labels under a version; None where nothing does."""
        if not bundle.spec.head:
            return self.base
        if content not in self._made:
            head = head_of({name: mx.array(bundle.tensors[name].float32()) for name in bundle.spec.head})
            if head is None:
                raise RuntimeError("A version was staged with a head that is none.")
            count, alike = head.labels, self._info.scores_like(bundle.spec.task, head.labels)
            labels = self._info.labels if alike else (None,) * count
            self._made[content] = Scorer(head, labels, self._info.activation if alike else default_activation(count))
        return self._made[content]

    def forget(self, contents: Sequence[Content]) -> None:
        """Gives back what was made for versions that were freed; another one of the same content has it made again."""
        for content in contents:
            self._made.pop(content, None)


def samples_nothing(version: PolicyVersion) -> InvalidField:
    """The error for who wants tokens, or log-probabilities of tokens, of what only scores."""
    return InvalidField(
        f"{version} scores labels with a head and has no output over the vocabulary, so that it "
        f"samples nothing and gives no log-probabilities: ask it on {ROUTES}.",
        param="policy",
    )


def scores_nothing(version: PolicyVersion) -> InvalidField:
    """The error for who wants label scores of what only generates."""
    return InvalidField(
        f"{version} generates and has no head that scores labels: name a reward model or a "
        "classifier, or push one; /v1/score reads label_token_ids of any decoder.",
        param="policy",
    )


def require_purpose(name: str, bundle: AdapterBundle, kept: Iterable[Entry]) -> None:
    """Raises `Conflict` where a name would come to mean something else than its versions: rows that follow it would
    be switched to what they cannot sample from, and a trainer would be given rewards of a policy."""
    for entry in kept:
        before, now = (task or "generate" for task in (entry.facts.task, bundle.spec.task))
        if before != now:
            raise Conflict(
                f"{name}@{entry.number} is for the task {before}, and this version is for {now}: push it under a name "
                "of its own, or delete the name first.",
                param="name",
            )
