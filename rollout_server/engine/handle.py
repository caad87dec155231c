"""The asyncio face of the engine thread: four verbs (submit, publish, abort, status) and what reads
without sampling.

Commands go in through one queue. Events come back in one hop to the event loop per engine turn and are handed to the
subscription or the future they belong to. Everything public here runs on the event loop that called `start`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

from rollout_server.engine.checks import check_generates, check_group, check_scoring
from rollout_server.engine.messages.control import (
    Abort,
    ControlCommand,
    Leave,
    LookAtRows,
    Pause,
    PauseMode,
    Ping,
    PrefixCacheReset,
    Release,
    Released,
    ResetPrefixCache,
    Resume,
    RowsSeen,
    Stop,
)
from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.messages.rollouts import (
    Event,
    RequestDone,
    RequestFailed,
    RowFinished,
    Submit,
    TokensSampled,
)
from rollout_server.engine.messages.scoring import (
    Classified,
    Classify,
    Embed,
    Embedded,
    HoldScorer,
    LetScorerGo,
    Replay,
    Replayed,
    Score,
    Scored,
    ScoringCommand,
)
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import (
    Activate,
    Delete,
    Deleted,
    Export,
    Exported,
    Pin,
    Pinned,
    PolicyCommand,
    Publish,
    Published,
    Restore,
    Restored,
)
from rollout_server.engine.open_requests import HeldScorer, Subscription
from rollout_server.engine.thread import EngineThread, MakeRunner, Runner
from rollout_server.errors import Conflict, EngineUnavailable, InvalidField, NotFound, QueueFull
from rollout_server.grammar import Constraint, Grammar
from rollout_server.quoting import quoted
from rollout_server.rollout import PolicyAddress, RolloutRequest
from rollout_server.text.pictures.reader import PictureReader

T = TypeVar("T")


class EngineHandle:
    """`make` makes what runs the commands: the thread of an engine, or a fleet of engines."""

    def __init__(self, options: EngineOptions, make: MakeRunner = EngineThread) -> None:
        self._options = options
        self._subscriptions: dict[str, Subscription] = {}
        self._replies: dict[str, asyncio.Future[Any]] = {}
        self._scorers: dict[str, HeldScorer] = {}
        """By the request whose rows they score."""
        self._numbers = itertools.count()
        self._status = EngineStatus("starting")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = asyncio.Event()
        self._thread: Runner = make(options, self._post, self._show)

    # ---- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the engine thread, which loads the model; call on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def wait_ready(self) -> None:
        """Returns when the model is loaded; raises `EngineUnavailable` with the cause if it could not be."""
        await self._ready.wait()
        if self._status.state != "ready":
            raise EngineUnavailable(self._status.fault or "The engine is not running.")

    async def close(self) -> None:
        """Ends the thread; open requests get `EngineUnavailable`."""
        self._thread.put(Stop())
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    @property
    def status(self) -> EngineStatus:
        """A snapshot the engine thread replaces after every change."""
        if self._status.state in ("starting", "ready") and self._loop is not None and not self._thread.is_alive():
            return EngineStatus("dead", "The engine thread ended.")
        return self._status

    async def ping(self, timeout_s: float) -> bool:
        """Returns whether the engine thread answers between two turns within `timeout_s` seconds."""
        if self.status.state != "ready":
            return False
        try:
            await asyncio.wait_for(self._ask(Ping(self.new_id("ping"))), timeout_s)
        except (TimeoutError, EngineUnavailable):
            return False
        return True

    @property
    def info(self) -> ModelInfo:
        return self._loaded(self._thread.info)

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the base, for the event loop's side."""
        return self._loaded(self._thread.tokenizer)

    @property
    def pictures(self) -> PictureReader | None:
        """What reads pictures as the model's own processor does; None where it sees none."""
        self._loaded(self._thread.info)
        return self._thread.pictures

    def compile(self, grammar: Grammar, param: str) -> Constraint:
        """See `Grammars.compile`; on any thread."""
        check_generates(self.info)
        return self._loaded(self._thread.grammars).compile(grammar, param)

    def _loaded(self, part: T | None) -> T:
        if part is None:
            raise EngineUnavailable(self._status.fault or "The model is still loading; try again in a moment.")
        return part

    def new_id(self, kind: str) -> str:
        """An id that no client can choose: theirs have no slash."""
        return f"/{kind}/{next(self._numbers)}"

    # ---- verbs ----------------------------------------------------------------------------------------------------

    def submit(
        self,
        id: str,
        groups: Sequence[RolloutRequest],
        *,
        deadline: float | None = None,
        scorer: HeldScorer | None = None,
    ) -> Subscription:
        """Queues the groups of one request, all or none. `deadline` is on time.monotonic()'s clock; `scorer` is what
        was held for it.

        Raises `QueueFull`, `ContextExceeded`, `InvalidField` or `Conflict` at once. An unknown or freed policy comes
        as the subscription's first event."""
        self._require_ready()
        if not groups:
            raise InvalidField("The request has no prompts.", param="prompts")
        self._require_free(id, scorer)
        self._require_room()
        rows = sum(group.n for group in groups)
        if rows > self._options.max_rows_per_request:
            raise InvalidField(
                f"The request asks for {rows} rows; at most {self._options.max_rows_per_request} are taken at once "
                "(--max-rows-per-request).",
                param="n",
            )
        for group in groups:
            check_group(group, self.info)
        subscription = Subscription(id, self.abort_subscription)
        self._subscriptions[id] = subscription
        self._thread.put(Submit(id, tuple(groups), deadline))
        return subscription

    async def hold(self, owner: str, policy: PolicyAddress, *, elsewhere: bool = False) -> HeldScorer:
        """Keeps the version that an address means now, to score rows of the request `owner`, which is submitted next.
        Raises `UnknownPolicy`, `VersionGone`, or `InvalidField` where the policy scores nothing."""
        self._require_ready()
        self._require_free(owner, None)
        self._require_room()
        command = HoldScorer(self.new_id("hold"), owner, policy, elsewhere)
        try:
            held = await self._ask(command)
            self._require_free(owner, None)
        except (asyncio.CancelledError, Conflict):
            self._thread.put(LetScorerGo(command.id))
            raise
        scorer = HeldScorer(held, owner, self.new_id, self._row_scored, self._let_go)
        self._scorers[owner] = scorer
        return scorer

    def _let_go(self, scorer: HeldScorer) -> None:
        del self._scorers[scorer.owner]
        self._thread.put(LetScorerGo(scorer.id))

    async def _row_scored(self, classify: Classify) -> Classified:
        """Belongs to a request that was accepted, so there is room for it."""
        return await self._answered(classify, accepted=True)

    async def score(self, score: Score) -> Scored:
        """Log-probabilities of given tokens under a policy."""
        return await self._answered(score)

    async def replay(self, replay: Replay) -> Replayed:
        """Draws the tokens of recorded rows again and compares."""
        return await self._answered(replay)

    async def embed(self, embed: Embed) -> Embedded:
        """Pooled hidden states of given tokens under a policy."""
        return await self._answered(embed)

    async def classify(self, classify: Classify) -> Classified:
        """Label scores of given tokens under a policy."""
        return await self._answered(classify)

    async def _answered(self, command: ScoringCommand, *, accepted: bool = False) -> Any:
        """Sends a scoring command and awaits its answer; a caller that is cancelled aborts it."""
        self._require_ready()
        if not accepted:
            self._require_room()
        check_scoring(command, self.info)
        try:
            return await self._ask(command)
        except asyncio.CancelledError:
            self._thread.put(Abort((command.id,), "disconnect"))
            raise

    async def publish(self, publish: Publish) -> Published:
        """Stages a bundle that fits the base as a new version and moves the alias if asked to."""
        self._require_ready()
        return await self._ask(publish)

    async def activate(self, activate: Activate) -> Published:
        """Moves an alias to a kept version."""
        self._require_ready()
        return await self._ask(activate)

    async def pin(self, pin: Pin) -> Pinned:
        """Keeps a version whatever its age, or no longer."""
        self._require_ready()
        return await self._ask(pin)

    async def delete(self, delete: Delete) -> Deleted:
        """Lets a version, or a whole name, go; never waits for the rows that use it."""
        self._require_ready()
        return await self._ask(delete)

    async def export(self, export: Export) -> Exported:
        """The bundle of a kept version."""
        self._require_ready()
        return await self._ask(export)

    async def restore(self, restore: Restore) -> Restored:
        """Puts back a name that an earlier run left."""
        self._require_ready()
        return await self._ask(restore)

    async def reset_prefix_cache(self) -> PrefixCacheReset:
        """Forgets the KV that is kept for later requests; rows go on."""
        self._require_ready()
        return await self._ask(ResetPrefixCache(self.new_id("prefixes")))

    async def pause(self, mode: PauseMode, *, drain: bool = False) -> None:
        """Lets new work wait, and returns when it does; with `drain`, when nothing runs any more."""
        self._require_ready()
        await self._ask(Pause(self.new_id("pause"), mode, drain))

    async def resume(self) -> None:
        """Goes on."""
        self._require_ready()
        await self._ask(Resume(self.new_id("resume")))

    async def rows(self) -> RowsSeen:
        """The rows that run or were preempted, those of a batch together; the first of them where there are many."""
        self._require_ready()
        return await self._ask(LookAtRows(self.new_id("rows")))

    async def release(self) -> Released:
        """Gives back KV and cached memory that nothing uses; rows go on."""
        self._require_ready()
        return await self._ask(Release(self.new_id("release")))

    async def leave(self, replica: str, *, at_once: bool, again: bool = False) -> None:
        """Lets a replica of a fleet go, for ever or to come back. Raises `NotFound`."""
        self._require_ready()
        if all(known.id != replica for known in self.status.replicas):
            raise NotFound(f"There is no replica {quoted(replica)}; GET /v1/fleet lists what there is.", param="id")
        await self._ask(Leave(self.new_id("leave"), replica, at_once, again))

    def abort(self, ids: Sequence[str], reason: str = "abort") -> tuple[str, ...]:
        """Ends the named requests; returns those of them that were open, each once."""
        found = tuple(id for id in dict.fromkeys(ids) if id in self._subscriptions or id in self._scorers)
        if found:
            self._thread.put(Abort(found, reason))
        return found

    def abort_subscription(self, subscription: Subscription, reason: str) -> None:
        """Ends this very request: its id may have been taken again once it was over."""
        if self._subscriptions.get(subscription.id) is subscription:
            self._thread.put(Abort((subscription.id,), reason))

    # ---- checks ---------------------------------------------------------------------------------------------------

    def _require_ready(self) -> None:
        status = self.status
        if status.state != "ready":
            raise EngineUnavailable(status.fault or f"The engine is {status.state}; try again in a moment.")

    def _require_free(self, id: str, scorer: HeldScorer | None) -> None:
        """Rows of a request may be scored when all of them have ended: it is open until then."""
        if id in self._subscriptions or self._scorers.get(id) is not scorer:
            raise Conflict(f"A request with id {id!r} is still open; choose another id.", param="id")

    def _require_room(self) -> None:
        if len(self._subscriptions) + len(self._replies) >= self._options.max_queue:
            raise QueueFull(f"As many requests are open as --max-queue allows ({self._options.max_queue}); try again.")

    # ---- plumbing -------------------------------------------------------------------------------------------------

    async def _ask(self, command: PolicyCommand | ScoringCommand | HoldScorer | ControlCommand) -> Any:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        self._replies[command.id] = reply
        self._thread.put(command)
        try:
            return await reply
        finally:
            self._replies.pop(command.id, None)

    def _post(self, events: list[Event]) -> None:
        """Called on the engine thread: one hop for everything a turn produced."""
        if self._loop is not None and events:
            try:
                self._loop.call_soon_threadsafe(self._deliver, events)
            except RuntimeError:
                # The event loop is closed: nobody is left to tell.
                return

    def _show(self, status: EngineStatus) -> None:
        changed, self._status = status.state != self._status.state, status
        if changed and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._settle)
            except RuntimeError:
                return

    def _settle(self) -> None:
        """A ready or dead engine lets waiters go; a dead one leaves no request without an answer."""
        self._ready.set()
        if self._status.state in ("ready", "starting"):
            return
        error = EngineUnavailable(self._status.fault or "The server is stopping.")
        for id in list(self._subscriptions):
            self._subscriptions.pop(id).deliver(RequestFailed(id, error))
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case RequestDone() | RequestFailed() if event.id in self._subscriptions:
                    self._subscriptions.pop(event.id).deliver(event)
                case TokensSampled() | RowFinished() if event.id in self._subscriptions:
                    self._subscriptions[event.id].deliver(event)
                case _:
                    self._answer(event)

    def _answer(self, event: Event) -> None:
        reply = self._replies.get(event.id)
        if reply is None or reply.done():
            return
        if isinstance(event, RequestFailed):
            reply.set_exception(event.error)
        else:
            reply.set_result(event)
