"""`POST /v1/rewards` and `POST /get_reward`: what a trainer asks of a reward model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.errors import InvalidField
from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import failures
from rollout_server.http.replies.json_entries import json_response, policy_headers
from rollout_server.http.replies.safetensors_file import binary_response, rewards_file
from rollout_server.http.replies.streaming import GoOn, beside_client
from rollout_server.http.requests.json_body import StrictJson, beside, read_json, wants_binary
from rollout_server.http.requests.sampling import check_rows
from rollout_server.http.requests.tokens.pictures import RequestPictures, Shown, picture_weight
from rollout_server.http.requests.tokens.prompts import encode, some
from rollout_server.http.requests.tokens.rendering import render, rendered
from rollout_server.http.residents import residents_of
from rollout_server.http.routes.pooling.answers import Labelled, Scores, labelled, usage_of
from rollout_server.http.routes.pooling.inputs import asked_model, scoring_model
from rollout_server.http.routes.pooling.steps import SentText, step_positions
from rollout_server.http.service import Service, header_id
from rollout_server.quoting import quoted
from rollout_server.rollout import BASE
from rollout_server.schemas.pooling.rewards import (
    GetRewardReply,
    GetRewardRequest,
    RewardsReply,
    RewardsRequest,
    SequenceToReward,
)
from rollout_server.text.long_texts import Bound

NO_REWARD = "a reward is one number"
Ids = tuple[int, ...]


class RewardsController(Controller):
    """Raw scores: a probability saturates, and a reward must not."""

    path = "/"
    guards = (may_infer,)
    tags = ("pooling",)

    @post(
        "/v1/rewards",
        before_request=read_json,
        dto=StrictJson[RewardsRequest],
        return_dto=None,
        status_code=200,
        summary="Rewards of sequences, and of their steps",
        description="What the head gives at the rightmost token that is not the pad token, and at `steps`; with "
        "`label_token_ids` the log-probabilities of these tokens under any decoder. "
        "`Accept: application/vnd.safetensors` gives one file of arrays.",
        responses={200: ResponseSpec(RewardsReply, description="In the order of the request."), **failures()},
    )
    async def rewards(self, data: JSONBody[RewardsRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        binary, residents = wants_binary(request), residents_of(request)
        header_id(request)
        if data.label_token_ids is not None:
            asked = asked_model(data.model or BASE, request, residents)
            asked.service.check_ids(data.label_token_ids, "label_token_ids")
        else:
            asked = scoring_model(data.model, request, residents)
        service = asked.service
        whole = asked.task != "token_classify"
        if not whole and data.steps is None:
            raise InvalidField(f"model {quoted(asked.name)} scores tokens: say by steps which of them.", param="steps")
        weight = len(await request.body()) + sum(picture_weight(each.messages, each.images) for each in data.sequences)
        sequences, shown = await beside_client(
            request, weight, lambda go_on: read_sequences(data.sequences, service, go_on)
        )
        steps = await beside_client(request, weight, lambda _: steps_of(data, sequences, shown, service))
        ends = [end_of(ids, service, data.label_token_ids is not None) for ids in sequences]
        places = [
            tuple(sorted({*(steps[index] if steps else ()), *((ends[index],) if whole else ())}))
            for index in range(len(sequences))
        ]
        pictures = [each.pictures for each in shown]
        found = await labelled(
            request, service, asked.address, sequences, places, data.label_token_ids or (), pictures=pictures
        )
        content = {
            "rewards": entries_of(found, data, places, steps, ends if whole else None, sequences),
            "labels": found.labels,
            "policy": found.version.called,
            "version": found.version.number,
            "digest": found.version.digest,
            "instance": service.instance,
            "usage": usage_of(sequences),
        }
        written = (lambda: binary_response(rewards_file(content))) if binary else lambda: json_response(content)
        response = await beside(sum(map(len, places)), written)
        response.headers.update(policy_headers([found.version]))
        return response

    @post(
        "/get_reward",
        before_request=read_json,
        dto=StrictJson[GetRewardRequest],
        return_dto=None,
        status_code=200,
        summary="Rewards of texts, for OpenRLHF",
        description="Raw. Pad and end tokens around a text are taken off, and one end token is put behind it.",
        responses={200: ResponseSpec(GetRewardReply, description="In the order of the request."), **failures()},
    )
    async def get_reward(self, data: JSONBody[GetRewardRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        asked = scoring_model(data.model, request, residents_of(request), ("classify",), 1)
        asked.require_one_label(NO_REWARD)
        service = asked.service
        header_id(request)
        sequences = await beside_client(
            request, len(await request.body()), lambda go_on: read_texts(data.query, service, go_on)
        )
        found = await labelled(request, service, asked.address, sequences)
        asked.require_one_label(NO_REWARD, len(found.labels))
        content = {"rewards": [float(scores[0, 0]) for scores in found.scores]}
        return json_response(content, headers=policy_headers([found.version]))


def steps_of(
    data: RewardsRequest, sequences: Sequence[Ids], shown: Sequence[Shown], service: Service
) -> list[Ids] | None:
    """Where the steps of each sequence are; None where none are asked for."""
    if data.steps is None:
        return None
    sent: list[SentText | None] = [None] * len(sequences)
    for index, each in enumerate(data.sequences if data.steps.text is not None else ()):
        if each.text is not None:
            sent[index] = SentText(each.text, each.add_special_tokens)
        elif each.messages is not None:
            place, expand = f"sequences[{index}]", shown[index].expand
            sent[index] = SentText(rendered(each, service.tokenizer, param=place, expand=expand), special=False)
    return step_positions(data.steps, sequences, sent, service)


def end_of(ids: Sequence[int], service: Service, decodes: bool) -> int:
    """Where a whole sequence is scored: the next token is asked for behind the last one."""
    return len(ids) - 1 if decodes else service.info.head_position(ids)


def entries_of(
    found: Labelled,
    data: RewardsRequest,
    places: Sequence[Ids],
    steps: Sequence[Ids] | None,
    ends: Sequence[int] | None,
    sequences: Sequence[Ids],
) -> list[dict[str, Any]]:
    """A `Reward` for each sequence."""
    entries = []
    for index, scores in enumerate(found.probabilities(data.activation == "model")):
        at = {position: row for row, position in enumerate(places[index])}
        own = None if ends is None else scores[at[ends[index]]].tolist()
        entries.append(
            {
                "value": own[0] if own is not None and len(own) == 1 else None,
                "scores": own,
                "steps": None if steps is None else _rows(scores, [at[position] for position in steps[index]]),
                "tokens": len(sequences[index]),
            }
        )
    return entries


def _rows(scores: Scores, rows: list[int]) -> list[list[float]]:
    return [scores[row].tolist() for row in rows]


def read_sequences(
    sequences: Sequence[SequenceToReward], service: Service, go_on: GoOn
) -> tuple[list[Ids], list[Shown]]:
    """Token ids and pictures of every sequence, checked; what is wrong is named by its place."""
    check_rows([len(sequences)], service.config.max_rows_per_request, ["sequences"])
    bound = service.bound(go_on)
    found, every, shown_here = [], [], RequestPictures(service)
    for index, sequence in enumerate(sequences):
        place = f"sequences[{index}]"
        beside_them = shown_here.beside_ids(sequence.images, f"{place}.images")
        shown = beside_them if sequence.images else shown_here.in_messages(sequence.messages, f"{place}.messages")
        found.append(tuple(_ids(sequence, place, service, bound, shown)))
        every.append(shown)
        bound.check_ids(found[-1], place)
    return found, every


def _ids(sequence: SequenceToReward, place: str, service: Service, bound: Bound, shown: Shown) -> list[int]:
    if sequence.token_ids is not None:
        inside = f"{place}.token_ids"
        service.check_ids(sequence.token_ids, inside)
        return some(sequence.token_ids, inside)
    if sequence.text is not None:
        special, inside = sequence.add_special_tokens, f"{place}.text"
        return encode(
            service.tokenizer, sequence.text, add_special_tokens=special, param=inside, bound=bound, place=place
        )
    return render(sequence, service.tokenizer, param=place, bound=bound, expand=shown.expand)


def read_texts(texts: Sequence[str], service: Service, go_on: GoOn) -> list[Ids]:
    """As OpenRLHF's own server reads them; an encoder's tokenizer puts its special tokens around them."""
    check_rows([len(texts)], service.config.max_rows_per_request, ["query"])
    tokenizer, bound = service.tokenizer, service.bound(go_on)
    whole = service.info.encoder
    end = "" if whole else tokenizer.eos_token or ""
    around = [re.escape(token) for token in dict.fromkeys((tokenizer.pad_token, tokenizer.eos_token)) if token]
    edges = re.compile(rf"\A(?:{'|'.join(around)})+|(?:{'|'.join(around)})+\Z") if around else None
    found = []
    for index, text in enumerate(texts):
        bare = edges.sub("", text) if edges else text
        place = f"query[{index}]"
        found.append(tuple(encode(tokenizer, bare + end, add_special_tokens=whole, param=place, bound=bound)))
    return found
