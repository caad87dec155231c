"""What is read of inputs that are too long: nothing, or their last tokens where the request says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.http.requests.tokens.prompts import PromptTokens, some
from rollout_server.http.service import Service
from rollout_server.quoting import counted
from rollout_server.text.long_texts import Bound, CharacterBound

CHARACTERS_OF_A_TOKEN = 16
"""More than a token has in any language: so much of a text is tokenized before its end is cut out."""
Ids = tuple[int, ...]


class Cut(Protocol):
    """A request that may say how much is kept."""

    @property
    def truncate_prompt_tokens(self) -> int | None: ...


def bound_of(data: Cut, service: Service, go_on: Callable[[], None]) -> Bound:
    """What is cut may be longer than what fits."""
    if data.truncate_prompt_tokens is None:
        return service.bound(go_on)
    return CharacterBound(CHARACTERS_OF_A_TOKEN * max(service.info.max_model_len, 2**17))


def fitted(ids: Sequence[int], place: str, data: Cut, service: Service) -> Ids:
    """The ids, cut where the request says so; checked against vocabulary and context."""
    service.check_ids(list(ids), place)
    most = _most(data, service)
    return _checked(tuple(ids) if most is None else tuple(ids[-most:]), place, service)


def read_text(prompt: PromptTokens, place: str, data: Cut, service: Service, *, special: bool = True) -> Ids:
    """A prompt that was tokenized, cut where the request says so: within an encoder's template if it came as text."""
    if prompt.text is None or not service.info.encoder or data.truncate_prompt_tokens is None:
        return fitted(prompt.ids, place, data, service)
    return fitted_text(prompt.text, None, place, data, service, special=special)[0]


def fitted_text(
    text: str, pair: str | None, place: str, data: Cut, service: Service, *, special: bool = True
) -> tuple[Ids, Ids]:
    """(Ids, token types) of a text, or of a pair as the tokenizer joins it; types are empty where all of them are 0. An
    encoder reads both ends of its template: where something is cut, that is the beginning of a text, of the longer one
    of a pair, and the special tokens stay."""
    found = service.tokenizer(text, pair, add_special_tokens=special)
    ids, types = some(found["input_ids"], place), ()
    if service.info.token_types > 1 and any(found.get("token_type_ids", ())):
        types = tuple(found["token_type_ids"])
    most = _most(data, service)
    if most is not None and len(ids) > most and service.info.encoder:
        kept = _kept(found, most, place)
        ids, types = [ids[at] for at in kept], tuple(types[at] for at in kept) if types else ()
    fit = fitted(ids, place, data, service)
    return fit, types[-len(fit) :] if types else ()


def _most(data: Cut, service: Service) -> int | None:
    """Tokens that are kept, None where nothing may be cut."""
    keep = data.truncate_prompt_tokens
    return service.info.max_model_len if keep == -1 else keep


def _checked(ids: Ids, place: str, service: Service) -> Ids:
    context = service.info.max_model_len
    if len(ids) > context:
        raise ContextExceeded(
            f"{place} has {counted(len(ids), 'token')}; the context holds {context}: send less, or say by "
            "truncate_prompt_tokens how many of the last ones are enough.",
            param=place,
        )
    return ids


def _kept(found: Any, most: int, place: str) -> list[int]:
    """Which tokens of what a tokenizer gave stay: those that its template put there, and the last ones of the texts."""
    if not found.encodings:
        raise InvalidField(
            f"{place} is too long, and this model's tokenizer does not tell which tokens are special: cut it.",
            param=place,
        )
    of_text: list[int | None] = found.sequence_ids(0)
    counts = [of_text.count(0), of_text.count(1)]
    room = most - of_text.count(None)
    if room < 1:
        raise InvalidField(
            f"truncate_prompt_tokens leaves {counted(most, 'token')}, and {counted(most - room, 'token')} of {place} "
            "are special ones, which stay: keep more.",
            param="truncate_prompt_tokens",
        )
    shorter = min(min(counts), room // 2)
    left = [shorter, shorter]
    longer = counts.index(max(counts))
    left[longer] = min(counts[longer], room - shorter)
    drop, kept = [counts[side] - left[side] for side in (0, 1)], list[int]()
    for at, side in enumerate(of_text):
        if side is not None and drop[side] > 0:
            drop[side] -= 1
            continue
        kept.append(at)
    return kept
