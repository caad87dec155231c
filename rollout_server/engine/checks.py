"""Checks whether the model can take what a request asks for: what is wrong is said before it is queued."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import repeat

from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.messages.scoring import Classify, Embed, Replay, Score, ScoringCommand
from rollout_server.engine.messages.spans import tiling_fault
from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.quoting import counted
from rollout_server.rollout import RolloutRequest
from rollout_server.text.pictures.picture import Picture


def check_scoring(request: ScoringCommand, info: ModelInfo) -> None:
    """Raises `InvalidField` or `ContextExceeded`."""
    match request:
        case Score():
            check_generates(info)
            _check_score(request, info)
        case Replay():
            check_generates(info)
            _check_replay(request, info)
        case Embed():
            _check_embed(request, info)
        case Classify():
            _check_classify(request, info)


def check_generates(info: ModelInfo) -> None:
    """Raises `InvalidField` where the model has no output over the vocabulary."""
    if info.task != "generate":
        vectors, labels = "/v1/embeddings, /pooling, /score and /rerank", "/classify, /pooling and /v1/rewards"
        raise InvalidField(
            f"{info.id} is served for the task {info.task} and has no output over the vocabulary, so that it samples "
            f"nothing and gives no log-probabilities: ask it on {vectors if info.task == 'embed' else labels}.",
            param="policy",
        )


def _check_score(score: Score, info: ModelInfo) -> None:
    if not 1e-3 <= score.temperature <= 100:
        raise InvalidField("temperature must be between 0.001 and 100.", param="temperature")
    for spans, tokens, start in zip(score.spans, score.sequences, score.starts, strict=bool(score.spans)):
        if spans is not None and (fault := tiling_fault(spans, len(tokens) - start)):
            raise InvalidField(f"The versions of a sequence do not fit it: {fault}.", param="sequences")
    for tokens, start in zip(score.sequences, score.starts, strict=True):
        if not 0 <= start < len(tokens):
            raise InvalidField(
                f"start is {start}, but the sequence has {len(tokens)} tokens: it lies within them.",
                param="sequences",
            )
        check_sequence(tokens, "sequences", info)
    for tokens, start, shown in zip(score.sequences, score.starts, score.pictures or repeat(()), strict=False):
        # What a row sampled is text, whatever it looks like.
        check_pictures(tokens[:start] if start > 1 else tokens, tokens, shown, "sequences", info)


def _check_replay(replay: Replay, info: ModelInfo) -> None:
    for row in replay.rows:
        if row.spans and (fault := tiling_fault(row.spans, len(row.token_ids))):
            raise InvalidField(f"The versions of a rollout do not fit it: {fault}.", param="rollouts")
        if not len(row.token_ids) == len(row.judged) == len(row.logprobs):
            raise InvalidField("The arrays of a rollout differ in length.", param="rollouts")
        if not row.prompt_ids:
            raise InvalidField("A rollout has no prompt.", param="rollouts")
        check_sequence(row.prompt_ids + row.token_ids, "rollouts", info)
        check_pictures(row.prompt_ids, row.prompt_ids + row.token_ids, row.pictures, "rollouts", info)


def _check_embed(embed: Embed, info: ModelInfo) -> None:
    if info.embedding.refusal:
        raise InvalidField(info.embedding.refusal, param="policy")
    for tokens in embed.sequences:
        if not tokens:
            raise InvalidField("A sequence to embed has no tokens.", param="input")
        check_sequence(tokens, "input", info)
    for tokens, shown in zip(embed.sequences, embed.pictures or repeat(()), strict=False):
        check_pictures(tokens, tokens, shown, "input", info)


def _check_classify(classify: Classify, info: ModelInfo) -> None:
    if classify.label_token_ids:
        check_generates(info)
        check_ids(classify.label_token_ids, "label_token_ids", info)
    if classify.types:
        _check_types(classify, info)
    for tokens, shown in zip(classify.sequences, classify.pictures or repeat(()), strict=False):
        # Rows of a call end in what was sampled, which is text whatever it looks like.
        check_pictures(tokens[:0] if classify.held else tokens, tokens, shown, "sequences", info)
    for tokens, positions in zip(classify.sequences, classify.positions, strict=True):
        check_sequence(tokens, "sequences", info)
        ascending = all(before < after for before, after in itertools.pairwise(positions))
        if not positions or not ascending or positions[0] < 0 or positions[-1] >= len(tokens):
            raise InvalidField(
                f"A sequence has {len(tokens)} tokens and is to be read at {list(positions[:4])}: positions lie within "
                "it, each behind the one before.",
                param="sequences",
            )
        if info.encoder and info.task == "classify" and positions != (info.head_position(tokens),):
            raise InvalidField(
                f"{info.id} scores a sequence whole, and no token of it: leave positions and steps out.", param="steps"
            )


def _check_types(classify: Classify, info: ModelInfo) -> None:
    """Types index a table."""
    for tokens, types in zip(classify.sequences, classify.types, strict=True):
        if types and (len(types) != len(tokens) or not 0 <= min(types) <= max(types) < max(info.token_types, 1)):
            raise InvalidField(
                f"A sequence has {len(tokens)} tokens and {len(types)} token types: as many have to be there, each "
                f"below the {info.token_types} that this model knows.",
                param="sequences",
            )


def check_group(group: RolloutRequest, info: ModelInfo) -> None:
    """What can be said of a group before the engine has it."""
    check_generates(info)
    check_ids(group.prompt_ids, "prompt", info)
    check_ids(group.prefix.token_ids, "prefix", info)
    check_pictures(group.prompt_ids, group.given_ids, group.pictures, "prompt", info)
    given, needed = group.given_ids, sum(picture.tokens for picture in group.pictures)
    # A placeholder behind the last picture is text, since a model may sample one.
    if group.pictures and given[-1] == info.placeholder and given.count(info.placeholder) <= needed:
        where = "prefix" if group.prefix.token_ids else "prompt"
        raise InvalidField(
            f"The {where} ends in a picture: put a token behind it, from which the next one is sampled.", param=where
        )
    for token in group.sampling.stop_token_ids:
        if not 0 <= token < info.vocab_size:
            raise InvalidField(
                f"Stop token id {token} is outside the vocabulary of {info.vocab_size}.", param="stop_token_ids"
            )
    total = len(group.prompt_ids) + group.sampling.max_tokens
    if total > info.max_model_len:
        raise ContextExceeded(
            f"A prompt of {len(group.prompt_ids)} tokens and max_tokens {group.sampling.max_tokens} exceed the "
            f"context of {info.max_model_len} tokens.",
            param="max_tokens",
        )
    if group.sampling.min_tokens and len({*group.sampling.stop_token_ids, *info.eos_token_ids}) >= info.vocab_size:
        raise InvalidField("min_tokens leaves no token to sample: every one of them would stop.", param="min_tokens")
    if info.row_bytes(total) > info.kv_memory:
        raise ContextExceeded(
            f"One row of {total} tokens needs more KV memory than the {info.kv_memory} bytes of --kv-memory.",
            param="max_tokens",
        )


def check_pictures(
    given: Sequence[int], tokens: Sequence[int], pictures: Sequence[Picture], param: str, info: ModelInfo
) -> None:
    """Raises `InvalidField` unless pictures and placeholders fit: all of those in `given`, and no more than those in
    `tokens`, which may go on behind it with what was sampled."""
    if info.placeholder is None:
        if pictures:
            raise InvalidField(f"{info.id} reads text alone and sees no pictures: leave them out.", param="images")
        return
    needed = sum(picture.tokens for picture in pictures)
    found = given.count(info.placeholder)
    if found > needed or (found < needed and tokens.count(info.placeholder) < needed):
        raise InvalidField(
            f"There are {counted(found, 'placeholder')} (token {info.placeholder}), and "
            f"{counted(len(pictures), 'picture')} with {needed}: give the "
            "ids that a reply's prompt_token_ids have, and every picture of them in images.",
            param=param,
        )


def check_ids(tokens: Sequence[int], param: str, info: ModelInfo) -> None:
    vocabulary = info.vocab_size
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
        wrong = next(token for token in tokens if not 0 <= token < vocabulary)
        raise InvalidField(f"Token id {wrong} is outside the vocabulary of {vocabulary}.", param=param)


def check_sequence(tokens: Sequence[int], param: str, info: ModelInfo) -> None:
    check_ids(tokens, param, info)
    if len(tokens) > info.max_model_len:
        raise ContextExceeded(
            f"A sequence has {len(tokens)} tokens; the context holds {info.max_model_len}.", param=param
        )
