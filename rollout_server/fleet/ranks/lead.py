"""Rank 0's engine: the thread that loads, with the others, and tells them what it decides by."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from typing import Any

from rollout_server.engine.messages.options import EngineOptions, RankOptions
from rollout_server.engine.messages.rollouts import Event
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.thread import EngineThread
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.ranks.decisions import LeadMailbox, Teller, travelling
from rollout_server.fleet.ranks.environment import file_of, hosts_of
from rollout_server.fleet.ranks.team import Team, ending, start_here
from rollout_server.fleet.ranks.words import Begin, rank_codec, uncompiled

FOUND_OUT_S = 2.0
"""Who watches may take so long to find out why a step failed."""


class LeadEngine(EngineThread):
    """What it posts and shows is that of an engine on one rank. With any rank gone or out of step it is dead at once,
    whatever its thread waits for."""

    def __init__(
        self, options: EngineOptions, post: Callable[[list[Event]], None], show: Callable[[EngineStatus], None]
    ) -> None:
        super().__init__(options, self._tell_events, self._tell_status)
        self._mailbox = self._commands = LeadMailbox(self._forward)
        self._ranks_asked = options.ranks or RankOptions(1)
        self._outer_post, self._outer_show = post, show
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """Commands on their way to the others; those of before they are there wait."""
        self._team: Team | None = None
        self._teller: Teller | None = None
        self._clock = self._now
        self._device_fault = self._why

    def is_alive(self) -> bool:
        """False too where its thread waits for a rank that will not come."""
        return super().is_alive() and (self._team is None or self._team.fault is None)

    def _forward(self, command: Any) -> None:
        self._messages.put(travelling(command))

    def _gather(self) -> Any:
        """Meets the other ranks. Raises `EngineUnavailable` where one does not come."""
        # Imported here, since MLX reads the addresses of ranks as it meets them, and not before.
        from rollout_server.fleet.ranks.group import join
        from rollout_server.fleet.ranks.meeting import await_ranks

        ranks, codec = self._ranks_asked, rank_codec(uncompiled)
        begin = codec.encode(Begin(self._options))
        if ranks.launched:
            joined = join(ranks)
            members = await_ranks(joined.group, ranks.address, begin)
        else:
            hosts = hosts_of(ranks.size)
            members = start_here(ranks, hosts, begin)
            with file_of(hosts) as addresses:
                os.dup2(addresses.fileno(), 0)
            with ending(members):
                joined = join(ranks)
        self._team = team = Team(members, codec, self._messages, ranks, self._fall)
        self._digest, self._teller = joined.digest, Teller(team.decisions, joined.digest)
        team.start()
        return joined

    def _begin(self) -> None:
        """The model is loaded: from here on ranks decide together."""
        if self._team is None or self._teller is None:
            raise RuntimeError("An engine of several ranks began before they met.")
        self._commands.begin(self._teller)
        self._team.lead(self._teller)

    def _now(self) -> float:
        return time.monotonic() if self._teller is None else self._teller.clock()

    def _why(self) -> str:
        """Any step that fails ends the engine: nobody knows how far the others came with it."""
        until = time.monotonic() + FOUND_OUT_S
        while self._team is not None and self._team.fault is None and time.monotonic() < until:
            time.sleep(0.05)
        fault = None if self._team is None else self._team.fault
        return fault or "a step failed on rank 0 of several"

    def _fall(self, reason: str) -> None:
        self._outer_show(EngineStatus("dead", reason))

    def _tell_events(self, events: list[Event]) -> None:
        if self._team is not None and self._team.fault is None:
            self._digest.saw_events(events)
            self._outer_post(events)

    def _tell_status(self, status: EngineStatus) -> None:
        if self._team is not None and self._team.fault is not None:
            return  # It was said already why.
        if self._team is not None and status.state == "ready":
            self._digest.saw_status(status)
        self._outer_show(status)
        if status.state in ("dead", "stopping") and self._team is not None:
            self._team.end(status.fault or "") if status.state == "dead" else self._team.close()

    def _encoder(self, timeline: Any) -> Any:
        raise EngineUnavailable(
            "--tensor-parallel serves models that write, and this one is an encoder, which is served whole: leave the "
            "option out."
        )
