"""What a reward model cannot read is refused before anything runs."""

from __future__ import annotations

import pytest

from rollout_server.errors import InvalidField
from rollout_server.http.requests.rewards import refuse_unseen
from rollout_server.schemas.rollouts import RolloutsRequest

PIXEL = "data:image/png;base64,iVBORw0KGgo="
SHOWN = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]}
TEXT = {"messages": [{"role": "user", "content": "2+2="}]}


def asked(*prompts: object) -> RolloutsRequest:
    return RolloutsRequest.model_validate({"policy": "base", "prompts": list(prompts)})


def test_a_reward_model_that_sees_no_pictures_is_refused_for_prompts_that_show_some() -> None:
    data = asked(TEXT, SHOWN)
    for same_model, reads in ((False, "messages"), (False, "token_ids"), (True, "text")):
        with pytest.raises(InvalidField, match=r"prompts\[1\] shows pictures"):
            refuse_unseen(data, same_model=same_model, reads=reads)
    refuse_unseen(data, same_model=True, reads="messages")
    refuse_unseen(asked(TEXT), same_model=False, reads="text")
