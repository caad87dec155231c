"""What every route works with: configuration, the engine of one model, what can be said of its policies, and what a
request is called."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from litestar import Request
from litestar.connection import ASGIConnection

from rollout_server.config import ServerConfig
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import ModelInfo, Task
from rollout_server.engine.messages.versions import PolicyStatus, VersionStatus
from rollout_server.errors import EngineUnavailable, InvalidField, UnknownPolicy
from rollout_server.http.metrics import Metrics
from rollout_server.http.observing.observer import Observer
from rollout_server.http.problems import RESOLVED
from rollout_server.logs import POLICY, REQUEST_ID, VERSION
from rollout_server.quoting import quoted
from rollout_server.rollout import BASE, NAME_PATTERN, PolicyAddress, PolicyVersion, called
from rollout_server.schemas.fields import ID, ID_RULE
from rollout_server.text.chat_format import ReplyFormat
from rollout_server.text.long_texts import ContextBound
from rollout_server.text.pictures.kept import KeptPictures
from rollout_server.text.pictures.reader import PictureReader
from rollout_server.text.token_strings import TokenStrings
from rollout_server.versions.publisher import Publisher
from rollout_server.versions.startup import Startup

STATE_KEY = "service"
ARRIVED = "arrived"
"""Key of the request's state: when it came, on time.monotonic()'s clock."""
ASKED = "method"
"""Key of the request's state: its method, since routes see a GET where HEAD was asked for."""
NAMES_SHOWN = 20
SCORING: tuple[Task, ...] = ("classify", "token_classify")
"""Tasks of what has a head."""


def some_of(names: Sequence[str]) -> str:
    """Names as a sentence lists them; of many not all."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def resident_in(text: str, base_id: str, residents: Mapping[str, str]) -> str:
    """Which of the models beside the base an address is of: NAME, NAME@0, NAME/POLICY, or what `residents` say that it
    was loaded from, as trainers name a model whose files they have. Empty for the base, whose id may have a slash, and
    for what two models were loaded from."""
    path = text.partition("@")[0]
    name = path.partition("/")[0]
    if path == base_id:
        return ""
    if name in residents:
        return name
    from_there = [name for name, source in residents.items() if source == text]
    return from_there[0] if len(from_there) == 1 else ""


@dataclass(frozen=True)
class Service:
    """One for each model. Everything about the model raises `EngineUnavailable` until it is loaded."""

    config: ServerConfig
    engine: EngineHandle
    publisher: Publisher = field(repr=False)
    metrics: Metrics = field(repr=False)
    observer: Observer = field(repr=False)
    instance: str
    """Version numbers are comparable only within one instance. It is new at each start, unless a state directory has
    one."""
    startup: Startup = field(repr=False)
    created: int
    """Unix time of the start."""
    resident: str = ""
    """What requests call the model; empty for that of --model."""
    residents: Mapping[str, str] = field(default_factory=dict)
    """What they call the models beside that one, and the directory or Hub id of each, as `--also` has it."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Set when the server was told to end: bodies that are still on their way are not waited for."""

    @property
    def info(self) -> ModelInfo:
        info = self.engine.info
        self.require_restored()
        return info

    def require_restored(self) -> None:
        """Raises until the kept versions are there: before that nothing is known of any name."""
        if not self.publisher.restored:
            raise EngineUnavailable("The state directory is still being restored; try again in a moment.")

    @property
    def loaded(self) -> bool:
        """True once the model and its kept versions are there; it stays true when the engine dies."""
        try:
            return self.info is not None
        except EngineUnavailable:
            return False

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    @property
    def pictures(self) -> PictureReader | None:
        """What reads pictures as the model's own processor does; None where it sees none."""
        return self.engine.pictures

    @cached_property
    def kept_pictures(self) -> KeptPictures:
        """Pictures that were made ready for earlier requests."""
        return KeptPictures(self.config.picture_memory)

    @cached_property
    def vocabulary(self) -> str:
        """A digest of what ids mean, equal for models of one tokenizer."""
        entries = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr(entries).encode()).hexdigest()

    @cached_property
    def token_strings(self) -> TokenStrings:
        return TokenStrings(self.tokenizer)

    @cached_property
    def reply_format(self) -> ReplyFormat:
        return ReplyFormat.of(self.tokenizer, self.info.eos_token_ids)

    def bound(self, go_on: Callable[[], None] | None = None) -> ContextBound:
        """The limits of every prompt that the model is to read; `go_on` is asked before each."""
        return ContextBound(self.info.max_model_len, go_on)

    @property
    def base(self) -> dict[str, str]:
        return {"id": self.info.id, "digest": self.info.digest}

    @property
    def base_version(self) -> PolicyVersion:
        return PolicyVersion(BASE, 0, self.info.digest, resident=self.resident)

    @property
    def name(self) -> str:
        """The address of the model itself."""
        return self.resident or BASE

    def called(self, name: str) -> str:
        """What requests call a policy of this model."""
        return called(name, self.resident)

    def policies(self) -> tuple[PolicyStatus, ...]:
        """Named policies; the base is none of them."""
        self.require_restored()
        return tuple(policy for policy in self.engine.status.policies if policy.name != BASE)

    def policy(self, name: str) -> PolicyStatus:
        for policy in self.policies():
            if policy.name == name:
                return policy
        known = some_of([*self.residents, *self._names()]) or "none was pushed yet"
        raise UnknownPolicy(f"There is no policy {quoted(self.called(name))} (known: {known}).", param="name")

    def _names(self) -> list[str]:
        return sorted(self.called(policy.name) for policy in self.policies())

    def address(self, text: str, request: Request[Any, Any, Any], *, param: str) -> PolicyAddress:
        """What a request's `policy` or `model` means. A bare name's version is remembered for the body of an error; a
        pinned one is whatever the address says."""
        info = self.info
        text = self.own_part(text, param)
        if text == info.id or text.startswith(f"{info.id}@"):
            # The base's id need not look like a name: a Hub id has a slash.
            address = PolicyAddress.parse(BASE + text[len(info.id) :], param=param)
        elif not NAME_PATTERN.fullmatch(text.partition("@")[0]):
            served = some_of(list(dict.fromkeys([BASE, *self.residents, info.id, *self._names()])))
            raise UnknownPolicy(f"{param} {quoted(text)} is not served here; served are {served}.", param=param)
        else:
            address = PolicyAddress.parse(text, param=param)
        if address.name == BASE:
            if not self._is_base(address):
                raise UnknownPolicy(
                    f"{quoted(text)} does not exist: the base has one version, 0, {info.digest}.", param=param
                )
            address = PolicyAddress(BASE)
        bare = address.number is None and address.digest is None
        alias = self.alias(address)
        state = request.scope["state"]
        state[POLICY] = address.name
        if bare and alias is not None:
            state |= {RESOLVED: alias, VERSION: alias.number}
        elif address.number is not None:
            state[VERSION] = address.number
        return address

    def own_part(self, text: str, param: str) -> str:
        """An address as this model's own engine knows it. Raises `InvalidField` for one of another model."""
        if (own := resident_in(text, "" if self.resident else self.info.id, self.residents)) != self.resident:
            raise InvalidField(
                f"{param} {quoted(text)} is of the model {own or BASE}, and the rest of the request is about "
                f"{self.name}: ask each model by itself.",
                param=param,
            )
        if not self.resident:
            return text
        return self.resident if text == self.residents[self.resident] else text.removeprefix(f"{self.resident}/")

    def _is_base(self, address: PolicyAddress) -> bool:
        if address.number is not None:
            return address.number == 0
        return address.digest is None or self.info.digest.startswith(address.digest)

    def alias(self, address: PolicyAddress) -> PolicyVersion | None:
        """Where the name points now; None if it does not exist or was never activated."""
        if address.name == BASE:
            return self.base_version
        return next((policy.live for policy in self.policies() if policy.name == address.name), None)

    def task(self, address: PolicyAddress) -> Task:
        """What the model gives under this address. Raises `UnknownPolicy` for a name that is not there."""
        if address.name == BASE:
            return self.info.task
        policy = self.policy(address.name)
        meant = [kept for kept in policy.versions if kept.version.number == address.number]
        # All versions of a name have one task.
        return next((kept.task for kept in meant or policy.versions if kept.task), None) or self.info.task

    def label_count(self, address: PolicyAddress) -> int | None:
        """How many labels the model scores under this address, as far as is known before it is asked: a bare name may
        move meanwhile. None for a version that is not there."""
        whole = len(self.info.labels)
        if address.name == BASE:
            return whole
        alias = self.alias(address) if address.follows else None
        number, digest = (alias.number if alias else address.number), address.digest
        for kept in self.policy(address.name).versions:
            if kept.version.digest.startswith(digest) if digest else kept.version.number == number:
                return whole if kept.task is None else kept.labels
        return None

    def scorers(self, tasks: Collection[Task], labels: int | None = None) -> list[PolicyAddress]:
        """What is of these tasks now: the model itself, and live versions. With `labels`, what has a head has to give
        scores of so many."""
        base = [(BASE, self.info.task, len(self.info.labels))]
        live = [(name, kept.task, kept.labels) for name, kept in self._live() if kept.task is not None]
        fit = [
            each for each in base + live if each[1] in tasks and (each[1] not in SCORING or labels in (None, each[2]))
        ]
        return [PolicyAddress(name) for name, _, _ in fit]

    def _live(self) -> Iterator[tuple[str, VersionStatus]]:
        for policy in self.policies():
            yield from ((policy.name, kept) for kept in policy.versions if kept.live)

    def policy_state(self, address: PolicyAddress) -> dict[str, Any]:
        """`{"name", "version", "digest"}` of the alias, as every native reply carries it."""
        alias = self.alias(address)
        if alias is None:
            return {"name": self.called(address.name), "version": None, "digest": None}
        return {"name": alias.called, "version": alias.number, "digest": alias.digest}

    def check_top_logprobs(self, count: int, param: str) -> None:
        if count > self.info.vocab_size:
            raise InvalidField(
                f"{param} asks for {quoted(count)} tokens; the vocabulary has {self.info.vocab_size}.", param=param
            )

    def check_bias(self, bias: Mapping[str, float], param: str) -> None:
        """The tokens that a `logit_bias` names."""
        vocabulary = self.info.vocab_size
        for token in bias:
            if int(token) >= vocabulary:
                raise InvalidField(
                    f"{param} names token {token}, which is outside the vocabulary of {vocabulary} tokens.",
                    param=f"{param}.{token}",
                )

    def check_ids(self, ids: list[int], param: str) -> None:
        """Token ids of a request, so that the first wrong one can be named by its place."""
        vocabulary = self.info.vocab_size
        if ids and max(ids) >= vocabulary:
            at = next(index for index, token in enumerate(ids) if token >= vocabulary)
            raise InvalidField(
                f"{param}[{at}] is {quoted(ids[at])}, which is outside the vocabulary of {vocabulary} tokens.",
                param=f"{param}[{at}]",
            )


def service_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Service:
    """The service of the application that this connection belongs to."""
    service = connection.app.state[STATE_KEY]
    if not isinstance(service, Service):
        raise TypeError("The application was not made by create_app.")
    return service


def line_about(request: Request[Any, Any, Any], name: str, number: int | None = None) -> None:
    """Lines about the request say this policy from now on, and this version of it where one is known; what can be no
    name is not said."""
    if NAME_PATTERN.fullmatch(name):
        request.scope["state"] |= {POLICY: name} if number is None else {POLICY: name, VERSION: number}


def header_id(request: Request[Any, Any, Any]) -> str | None:
    """`X-Request-Id`, if it is there and can be one; proxies pass on an empty one where there is none."""
    header = request.headers.get("x-request-id", "").strip()
    if header and ID.fullmatch(header) is None:
        raise InvalidField(f"X-Request-Id must be {ID_RULE}.", param="X-Request-Id")
    return header or None


def request_id(given: str | None, request: Request[Any, Any, Any], *, kind: str) -> str:
    """The body's `id`, else `X-Request-Id`, else a fresh one."""
    header = header_id(request)
    if header is not None and given not in (None, header):
        raise InvalidField(f"The body calls the request {quoted(given)} and X-Request-Id {quoted(header)}.", param="id")
    id = given or header or f"{kind}-{secrets.token_hex(12)}"
    request.scope["state"][REQUEST_ID] = id
    return id
