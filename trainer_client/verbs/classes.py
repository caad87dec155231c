"""What a model with a head says of texts: rewards, classes, and the order in which texts answer to a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer_client.data.batch import RolloutBatch
from trainer_client.data.versions import PolicyRef
from trainer_client.errors import BadReply
from trainer_client.verbs.json_call import BINARY, Addressed, address, post, without_none
from trainer_client.wire.binary_rows import MEDIA_TYPE, ReplyFile
from trainer_client.wire.call import Call
from trainer_client.wire.replies import Reply, need, need_objects, parse_json


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rewards:
    """Label scores of R sequences, raw unless another activation was asked for. Sequence i owns the steps
    `step_offsets[i]:step_offsets[i + 1]`."""

    scores: NDArray[np.float32]
    """[R, L]; NaN where only steps were read."""
    step_scores: NDArray[np.float32] | None
    """[S, L]; None unless steps were asked for."""
    step_offsets: NDArray[np.int64] | None
    """[R + 1]"""
    labels: tuple[str | None, ...]
    tokens: NDArray[np.int64]
    """[R]: how many were read."""
    version: PolicyRef
    """What scored them."""

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def values(self) -> NDArray[np.float32]:
        """[R]: the scores of the only label. Raises `ValueError` where there are several."""
        if self.scores.shape[1] != 1:
            raise ValueError(f"{self.version.name} scores {self.scores.shape[1]} labels: choose one from `scores`.")
        return self.scores[:, 0]

    def steps(self, sequence: int) -> NDArray[np.float32]:
        """[steps, L] of one sequence, as a view."""
        if self.step_scores is None or self.step_offsets is None:
            raise ValueError("No steps were asked for.")
        index = range(len(self))[sequence]
        return self.step_scores[self.step_offsets[index] : self.step_offsets[index + 1]]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Classes:
    """`labels` are those with the largest score, None where the model only numbers them."""

    probs: NDArray[np.float64]
    """[N, L]"""
    labels: tuple[str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A document by its place in the request."""

    index: int
    score: float


def rewards(
    sequences: RolloutBatch | Sequence[Any],
    *,
    model: Addressed | None = None,
    steps: Mapping[str, Any] | None = None,
    label_token_ids: Sequence[int] | None = None,
    activation: Literal["none", "model"] = "none",
) -> Call[Rewards]:
    """Rewards of sequences, and of their steps.

    sequences        a batch, whose prompts, pictures and completions are read; or for each sequence its text, token
                     ids (a list or any array), messages, or an object as the server takes it
    model            the one that scores, if not given
    steps            `{"token_id": …}`, `{"text": …}` or `{"positions": [[…]…]}`: where a process reward is read
    label_token_ids  labels are these tokens, which any decoder scores by their log-probabilities
    activation       `none` for what the head gives, `model` for probabilities"""
    if isinstance(sequences, RolloutBatch):
        sequences = [{name: value for name, value in entry.items() if name != "start"} for entry in sequences.sequences]
    given = [_sequence(entry) for entry in sequences]
    body = {"sequences": given, "activation": activation, **_model(model)}
    body |= without_none(steps=steps, label_token_ids=label_token_ids)
    return post("/v1/rewards", body, _parse_rewards, headers=BINARY, idempotent=True)


def classify(
    inputs: str | Sequence[Any],
    *,
    model: Addressed | None = None,
    activation: bool | None = None,
    truncate_prompt_tokens: int | None = None,
    add_special_tokens: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Call[Classes]:
    """Classes of texts or token ids, or of one conversation.

    inputs                  a text, texts, token ids, lists of token ids, or the messages of one conversation
    model                   the one that scores, if not given
    activation              False leaves the scores as the head gives them
    truncate_prompt_tokens  only so many of the last tokens are read, with -1 what the context holds
    add_special_tokens      False for texts that have theirs already, as a chat template writes them
    chat_template_kwargs    variables of the chat template that renders messages"""
    what = "messages" if not isinstance(inputs, str) and len(inputs) and isinstance(inputs[0], Mapping) else "input"
    body = {what: inputs, **_model(model)}
    body |= without_none(
        use_activation=activation,
        truncate_prompt_tokens=truncate_prompt_tokens,
        add_special_tokens=add_special_tokens,
        chat_template_kwargs=chat_template_kwargs,
    )
    return post("/classify", body, _parse_classes, idempotent=True)


def rerank(
    query: str,
    documents: Sequence[str],
    *,
    model: Addressed | None = None,
    top_n: int | None = None,
    activation: bool | None = None,
    truncate_prompt_tokens: int | None = None,
) -> Call[tuple[Ranked, ...]]:
    """Documents in the order in which they answer a query, the best first; with `top_n` only so many. `activation`
    False gives scores as the head does, and `truncate_prompt_tokens` reads so many of a pair's tokens, -1 what the
    context holds."""
    body = {"query": query, "documents": list(documents), "return_documents": False, **_model(model)}
    body |= without_none(top_n=top_n, use_activation=activation, truncate_prompt_tokens=truncate_prompt_tokens)
    return post("/rerank", body, _parse_ranked, idempotent=True)


def _model(model: Addressed | None) -> dict[str, Any]:
    return {} if model is None else {"model": address(model)}


def _sequence(entry: Any) -> Mapping[str, Any]:
    match entry:
        case Mapping():
            return entry
        case str():
            return {"text": entry}
        case [Mapping(), *_]:
            return {"messages": entry}
    return {"token_ids": entry}


def _parse_rewards(reply: Reply) -> Rewards:
    if reply.media_type == MEDIA_TYPE:
        return _binary_rewards(ReplyFile(reply.body))
    body = parse_json(reply.body)
    labels = tuple(need(body, "labels", list))
    entries = need_objects(body, "rewards")
    none = [np.nan] * len(labels)
    steps = [entry.get("steps") for entry in entries]
    counts = [len(own) for own in steps if own is not None]
    told = len(counts) == len(entries)
    every = [step for own in steps if own is not None for step in own]
    return Rewards(
        scores=_matrix([entry.get("scores") or none for entry in entries], len(labels)),
        step_scores=_matrix(every, len(labels)) if told else None,
        step_offsets=np.cumsum([0, *counts], dtype=np.int64) if told else None,
        tokens=np.array([need(entry, "tokens", int) for entry in entries], np.int64),
        **_about(body),
    )


def _matrix(rows: list[Any], labels: int) -> NDArray[np.float32]:
    try:
        return np.array(rows, np.float32).reshape(-1, labels)
    except (TypeError, ValueError) as error:
        raise BadReply(f"The server's reply is not as the contract says: scores are no table ({error}).") from error


def _binary_rewards(file: ReplyFile) -> Rewards:
    body = need({"reply": file.json("reply")}, "reply", dict)
    labels = len(need(body, "labels", list))
    scores = file.array("scores", np.float32, (None, labels))
    steps = file.array("step_scores", np.float32, (None, labels), required=False)
    return Rewards(
        scores=scores,
        step_scores=steps,
        step_offsets=None if steps is None else file.offsets("step_offsets", len(scores), len(steps)),
        tokens=np.array(need(need(body, "rewards", dict), "tokens", list), np.int64),
        **_about(body),
    )


def _about(body: Mapping[str, Any]) -> dict[str, Any]:
    version = PolicyRef(need(body, "policy", str), need(body, "version", int), need(body, "digest", str))
    return {"labels": tuple(need(body, "labels", list)), "version": version}


def _parse_classes(reply: Reply) -> Classes:
    entries = need_objects(parse_json(reply.body), "data")
    try:
        probs = np.array([need(entry, "probs", list) for entry in entries], np.float64)
    except ValueError as error:
        raise BadReply(f"The server's reply is not as the contract says: probs are no table ({error}).") from error
    return Classes(probs=probs, labels=tuple(entry.get("label") for entry in entries))


def _parse_ranked(reply: Reply) -> tuple[Ranked, ...]:
    return tuple(
        Ranked(index=need(entry, "index", int), score=float(entry["relevance_score"]))
        for entry in need_objects(parse_json(reply.body), "results")
    )
