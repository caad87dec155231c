"""What a request gives to be scored, as token ids, and which model is to score it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from litestar import Request

from rollout_server.engine.messages.options import Task
from rollout_server.errors import InvalidField
from rollout_server.http.problems import renamed
from rollout_server.http.replies.streaming import GoOn
from rollout_server.http.requests.sampling import check_rows
from rollout_server.http.requests.tokens.prompts import how_many, prompts_of, some
from rollout_server.http.requests.tokens.rendering import render
from rollout_server.http.requests.tokens.truncation import bound_of, fitted, read_text
from rollout_server.http.residents import Residents
from rollout_server.http.service import SCORING, Service
from rollout_server.quoting import counted, quoted
from rollout_server.rollout import PolicyAddress
from rollout_server.schemas.pooling.inputs import PoolingInput


@dataclass(frozen=True, slots=True)
class Asked:
    """The model that is to score, and what it gives."""

    service: Service
    address: PolicyAddress
    name: str
    """As the request called it."""
    task: Task

    def require_one_label(self, why: str, labels: int | None = None) -> None:
        """Raises `InvalidField`, which ends with `why`, unless the model scores one label. `labels` is how many it did
        score; without it the number is the one that is known before anything is read."""
        count = self.service.label_count(self.address) if labels is None else labels
        if count not in (None, 1):
            raise InvalidField(
                f"model {quoted(self.name)} scores {counted(count or 0, 'label')}, and {why}.", param="model"
            )

    def require(self, *tasks: Task) -> None:
        """Raises `InvalidField` unless the model's task is one of these."""
        if self.task not in tasks:
            other = {
                "classify": "it scores whole sequences: ask /classify",
                "token_classify": "it scores tokens: ask /pooling, or /v1/rewards with steps",
                "embed": "it gives vectors: ask /v1/embeddings",
                "generate": "it generates and has no head: name a reward model or a classifier",
            }
            raise InvalidField(f"model {quoted(self.name)} does not do this; {other[self.task]}.", param="model")


def asked_model(
    name: str | None,
    request: Request[Any, Any, Any],
    residents: Residents,
    tasks: Sequence[Task] = SCORING,
    labels: int | None = None,
) -> Asked:
    """Without a name the one for these tasks, with so many labels if it scores any and that matters."""
    if name is None:
        service, address = residents.scorer(*tasks, labels=labels)
    else:
        service = residents.of(name)
        address = service.address(name, request, param="model")
    with renamed({"name": "model"}):
        return Asked(service, address, name or service.called(address.name), service.task(address))


def scoring_model(
    name: str | None,
    request: Request[Any, Any, Any],
    residents: Residents,
    tasks: Sequence[Task] = SCORING,
    labels: int | None = None,
) -> Asked:
    """A model for these tasks. Raises `InvalidField` for one that is for another."""
    asked = asked_model(name, request, residents, tasks, labels)
    asked.require(*tasks)
    return asked


def read_inputs(data: PoolingInput, service: Service, go_on: GoOn) -> list[tuple[int, ...]]:
    """Token ids of every input, checked; what is wrong is named by its place."""
    bound = bound_of(data, service, go_on)
    if data.input is None:
        ids = some(render(data, service.tokenizer, param="", bound=bound), "messages")
        return [fitted(ids, "messages", data, service)]
    check_rows([how_many(data.input)], service.config.max_rows_per_request, ["input"])
    special = data.add_special_tokens
    found = prompts_of(data.input, service.tokenizer, param="input", bound=bound, add_special_tokens=special)
    return [read_text(prompt, place, data, service, special=special) for prompt, place in found]
