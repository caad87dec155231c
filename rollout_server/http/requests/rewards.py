"""The reward model that a request of rollouts names, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from litestar import Request

from rollout_server.errors import InvalidField
from rollout_server.http.problems import renamed
from rollout_server.http.residents import residents_of
from rollout_server.http.service import Service
from rollout_server.quoting import quoted
from rollout_server.rollout import PolicyAddress
from rollout_server.schemas.rollouts import RewardOptions, RolloutsRequest

MODEL = "reward.model"
"""This route's name of what scores."""


@dataclass(frozen=True, slots=True)
class RewardModel:
    """What scores the rows of a request: a version of their own model, or of another one here."""

    service: Service
    address: PolicyAddress
    same_ids: bool
    """True where it has the tokenizer of what it scores."""


def reward_model(reward: RewardOptions, data: RolloutsRequest, request: Request[Any, Any, Any]) -> RewardModel:
    """What is to score the rows. Raises `UnknownPolicy`, or `InvalidField` for a model that
    gives no reward and for prompts that are not what it is to read."""
    residents = residents_of(request)
    service, own = residents.of(reward.model), residents.of(data.policy)
    address = service.address(reward.model, request, param=MODEL)
    with renamed({"name": MODEL}):
        task = service.task(address)
    if task != "classify":
        why = "it scores tokens, and not whole sequences" if task == "token_classify" else "it has no head that scores"
        raise InvalidField(f"{MODEL} {quoted(reward.model)} gives no reward: {why}.", param=MODEL)
    if reward.reads == "messages":
        for index, prompt in enumerate(data.prompts):
            if prompt.messages is None:
                kind = "text" if prompt.text is not None else "token_ids"
                raise InvalidField(
                    f"reward.as is 'messages', but prompts[{index}] has {kind}: give messages, or let the reward model "
                    "read text or token_ids.",
                    param="reward.as",
                )
    same_ids = service is own or service.vocabulary == own.vocabulary
    if reward.reads == "token_ids" and not same_ids:
        raise InvalidField(
            f"reward.as is 'token_ids', but {service.name} and {own.name} have different tokenizers: let the reward "
            "model read messages or text.",
            param="reward.as",
        )
    refuse_unseen(data, same_model=service is own, reads=reward.reads)
    return RewardModel(service, address, same_ids)


def refuse_unseen(data: RolloutsRequest, *, same_model: bool, reads: str) -> None:
    """A reward model that does not see a prompt's pictures would score their placeholders as if they were text."""
    if same_model and reads != "text":
        return
    for index, prompt in enumerate(data.prompts):
        if prompt.images or any(message.image_urls for message in prompt.messages or ()):
            raise InvalidField(
                f"prompts[{index}] shows pictures, which {MODEL} would not see: name a version of the policy's own "
                "model, and let it read messages or token_ids.",
                param="reward.as",
            )
