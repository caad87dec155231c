"""The reward model that a request of rollouts names, checked before anything runs."""

from __future__ import annotations

from typing import Any

from litestar import Request

from rollout_server.errors import InvalidField
from rollout_server.http.problems import renamed
from rollout_server.http.service import Service
from rollout_server.quoting import quoted
from rollout_server.rollout import PolicyAddress
from rollout_server.schemas.rollouts import RolloutsRequest

MODEL = "reward.model"
"""This route's name of what scores."""


def reward_model(data: RolloutsRequest, request: Request[Any, Any, Any], service: Service) -> PolicyAddress | None:
    """What is to score the rows; None where nothing is. Raises `UnknownPolicy`, or `InvalidField` for a model that
    gives no reward and for prompts that are not what it is to read."""
    if data.reward is None:
        return None
    address = service.address(data.reward.model, request, param=MODEL)
    with renamed({"name": MODEL}):
        task = service.task(address)
    if task != "classify":
        why = "it scores tokens, and not whole sequences" if task == "token_classify" else "it has no head that scores"
        raise InvalidField(f"{MODEL} {quoted(data.reward.model)} gives no reward: {why}.", param=MODEL)
    if data.reward.reads == "messages":
        for index, prompt in enumerate(data.prompts):
            if prompt.messages is None:
                kind = "text" if prompt.text is not None else "token_ids"
                raise InvalidField(
                    f"reward.as is 'messages', but prompts[{index}] has {kind}: give messages, or let the reward model "
                    "read text or token_ids.",
                    param="reward.as",
                )
    return address
