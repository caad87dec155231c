"""Drives the real engine one turn at a time on the test's own thread, so that a test decides what happens between
two steps."""

from __future__ import annotations

import queue
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.formats.read import read_bundle
from rollout_server.engine.assembly import build_engine
from rollout_server.engine.batch.length_buckets import StepCosts
from rollout_server.engine.loop import Engine
from rollout_server.engine.messages.control import Abort
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import (
    Command,
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
    RecordedRow,
    Replay,
    Replayed,
    ReplayedRow,
    Score,
    Scored,
    ScoredSequence,
)
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import Activate, PolicyCommand, PolicyReply, Publish, Published
from rollout_server.engine.model.device import device_fault
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.rollout import (
    NO_PREFIX,
    OnUpdate,
    PolicyAddress,
    Prefix,
    Rollout,
    RolloutRequest,
    SamplingParams,
    SpanAddress,
    Wants,
    row_seed,
)
from rollout_server.text.pictures.picture import Picture
from tests.support import tiny_models
from tests.support.engine.door import Door
from tests.support.engine.loaded_models import loaded


class Mailbox(queue.SimpleQueue[Command]):
    """Waits for nobody unless it is `patient`: the test that drives the engine has put in what there is."""

    patient = False

    def get(self, block: bool = True, timeout: float | None = None) -> Command:
        return super().get(block, timeout) if self.patient else super().get(block=False)


@dataclass
class Driver(Door):
    model: ResidentModel
    engine: Engine
    mailbox: Mailbox
    events: list[Event] = field(default_factory=list)
    status: EngineStatus = field(default_factory=lambda: EngineStatus("starting"))
    count: int = 0

    @classmethod
    def start(
        cls,
        path: Path,
        model: ResidentModel | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        device: Callable[[], str | None] = device_fault,
        **options: Any,
    ) -> Driver:
        """`clock` is what a turn's budget is measured by; this one never moves, so that timing decides nothing.
        `device` says what is wrong with the device."""
        chosen = EngineOptions(str(path), path.name, **options)
        if model is not None and "max_batch" in options:
            rows = 1 if model.info.cache == "serial" else options["max_batch"]
            model = replace(model, info=replace(model.info, max_batch=rows))
        model = model or loaded(chosen)
        mailbox = Mailbox()
        events: list[Event] = []
        engine = build_engine(
            model,
            PolicyTable(model, chosen),
            mailbox,
            events.extend,
            lambda status: setattr(driver, "status", status),
            chosen,
            turn_clock=clock,
            device_fault=device,
        )
        driver = cls(model, engine, mailbox, events)
        # As if measured: rows get no length buckets unless a test says what they cost.
        driver.set_step_costs(StepCosts(1.0, 0.0))
        return driver

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.turn()

    def send(self, command: Command) -> None:
        self.mailbox.put(command)

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        policy: str = "base",
        seed: int = 0,
        wants: Wants | None = None,
        deadline: float | None = None,
        seeds: Sequence[Sequence[int]] | None = None,
        min_version: int | None = None,
        wait_s: float | None = None,
        on_update: str = "finish",
        max_staleness: int | None = None,
        prefix: Prefix = NO_PREFIX,
        return_when: int | None = None,
        pictures: Sequence[tuple[Picture, ...]] = (),
        begins_on: int | None = None,
        **sampling: Any,
    ) -> str:
        """Sends one request of a group for each prompt; returns its id."""
        self.count += 1
        id = f"r{self.count}"
        sampling.setdefault("max_tokens", 12)
        groups = tuple(
            RolloutRequest(
                id=id,
                prompt_ids=tuple(prompt),
                sampling=SamplingParams(**sampling),
                policy=PolicyAddress.parse(policy),
                n=n,
                prompt_index=index,
                seeds=tuple(seeds[index]) if seeds else tuple(row_seed(seed, index, k) for k in range(n)),
                min_version=min_version,
                wait_s=wait_s,
                on_update=OnUpdate(on_update),
                max_staleness=max_staleness,
                wants=wants or Wants(),
                prefix=prefix,
                return_when=return_when,
                pictures=pictures[index] if pictures else (),
            )
            for index, prompt in enumerate(prompts)
        )
        self.send(Submit(id, groups, deadline, begins_on))
        return id

    def over(self, id: str) -> bool:
        return any(isinstance(e, RequestDone | RequestFailed) and e.id == id for e in self.events)

    def finish(self, *ids: str, turns: int = 3000) -> None:
        """Turns until the requests are over, then until nothing is left in flight."""
        self.until(lambda: all(self.over(id) for id in ids), turns)

    def until(self, reached: Callable[[], bool], turns: int = 3000) -> None:
        for _ in range(turns):
            if reached():
                return
            self.turn()
        raise AssertionError(f"not reached in {turns} turns: {self.status}")

    def rollouts(self, id: str) -> list[Rollout]:
        """Rows reported so far, by prompt and sample."""
        rows = [e.rollout for e in self.events if isinstance(e, RowFinished) and e.id == id]
        return sorted(rows, key=lambda row: (row.prompt_index, row.sample_index))

    def tokens(self, id: str) -> list[TokensSampled]:
        return [e for e in self.events if isinstance(e, TokensSampled) and e.id == id]

    def error(self, id: str) -> Any:
        return next((e.error for e in self.events if isinstance(e, RequestFailed) and e.id == id), None)

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Rollout]:
        id = self.submit(prompts, **options)
        self.finish(id)
        assert self.error(id) is None, self.error(id)
        return self.rollouts(id)

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        policy: str = "base",
        **options: Any,
    ) -> list[ScoredSequence]:
        return self.scored(self.ask_score(sequences, starts, policy, **options))

    def ask_score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        policy: str = "base",
        **options: Any,
    ) -> str:
        """Sends sequences to be scored; returns the id."""
        self.count += 1
        id = f"s{self.count}"
        starts = starts or [0] * len(sequences)
        self.send(Score(id, PolicyAddress.parse(policy), tuple(map(tuple, sequences)), tuple(starts), **options))
        return id

    def is_scored(self, id: str) -> bool:
        return self.error(id) is not None or any(isinstance(e, Scored) and e.id == id for e in self.events)

    def scored(self, id: str) -> list[ScoredSequence]:
        self.until(lambda: self.is_scored(id))
        if self.error(id):
            raise self.error(id)
        return list(next(e for e in self.events if isinstance(e, Scored) and e.id == id).sequences)

    def ask_embed(self, sequences: Sequence[Sequence[int]], policy: str = "base") -> str:
        """Sends sequences to be embedded; returns the id."""
        self.count += 1
        id = f"e{self.count}"
        self.send(Embed(id, PolicyAddress.parse(policy), tuple(map(tuple, sequences))))
        return id

    def embedded(self, id: str) -> np.ndarray:
        """float32 [sequences, width], as pooled."""
        self.until(lambda: self.error(id) or any(isinstance(e, Embedded) and e.id == id for e in self.events))
        if self.error(id):
            raise self.error(id)
        vectors = next(e for e in self.events if isinstance(e, Embedded) and e.id == id).vectors
        return np.stack([np.frombuffer(vector, "<f4") for vector in vectors])

    def ask_classify(
        self,
        sequences: Sequence[Sequence[int]],
        policy: str = "base",
        *,
        positions: Sequence[Sequence[int]] | None = None,
        label_token_ids: Sequence[int] = (),
    ) -> str:
        """Sends sequences to be classified, by the rule of the pad token without `positions`; returns the id."""
        self.count += 1
        id = f"l{self.count}"
        rule = self.model.info.head_position
        where = positions if positions is not None else [(rule(tokens),) for tokens in sequences]
        self.send(
            Classify(
                id,
                PolicyAddress.parse(policy),
                tuple(map(tuple, sequences)),
                tuple(map(tuple, where)),
                tuple(label_token_ids),
            )
        )
        return id

    def classified(self, id: str) -> list[np.ndarray]:
        """Of each sequence, float32 [positions, labels]."""
        self.until(lambda: self.error(id) or any(isinstance(e, Classified) and e.id == id for e in self.events))
        if self.error(id):
            raise self.error(id)
        found = next(e for e in self.events if isinstance(e, Classified) and e.id == id)
        return [np.frombuffer(scores, "<f4").reshape(-1, len(found.labels)) for scores in found.scores]

    def classify(self, sequences: Sequence[Sequence[int]], policy: str = "base", **options: Any) -> list[np.ndarray]:
        return self.classified(self.ask_classify(sequences, policy, **options))

    def embed(self, sequences: Sequence[Sequence[int]], policy: str = "base") -> np.ndarray:
        return self.embedded(self.ask_embed(sequences, policy))

    def replay(self, rows: Sequence[Rollout | RecordedRow]) -> list[ReplayedRow]:
        self.count += 1
        id = f"y{self.count}"
        self.send(Replay(id, tuple(row if isinstance(row, RecordedRow) else recorded(row) for row in rows)))
        self.until(
            lambda: self.error(id) is not None or any(isinstance(e, Replayed) and e.id == id for e in self.events)
        )
        if self.error(id):
            raise self.error(id)
        return list(next(e for e in self.events if isinstance(e, Replayed) and e.id == id).rows)

    def bundle(self, seed: int, rank: int = 4, kind: str = "peft", **options: Any) -> AdapterBundle:
        tensors, config = tiny_models.random_adapter(self.model.info.layers, rank, seed, kind=kind, **options)
        return read_bundle(save(tensors), config, layers=self.model.info.layers)

    def publish(self, name: str, bundle: AdapterBundle, **options: Any) -> str:
        """Sends a publish; returns its id."""
        self.count += 1
        id = f"p{self.count}"
        self.send(Publish(id, name, bundle, **options))
        return id

    def published(self, id: str) -> Any:
        self.until(
            lambda: self.error(id) is not None or any(isinstance(e, PolicyReply) and e.id == id for e in self.events)
        )
        if self.error(id):
            raise self.error(id)
        return next(e for e in self.events if isinstance(e, PolicyReply) and e.id == id)

    def push(self, name: str, bundle: AdapterBundle, **options: Any) -> Published:
        return self.published(self.publish(name, bundle, **options))

    def activate(self, name: str, number: int) -> Published:
        self.count += 1
        id = f"a{self.count}"
        self.send(Activate(id, name, number))
        return self.published(id)

    def change(self, command: PolicyCommand) -> Any:
        """Sends a command of the versions with an id of its own; returns the reply or raises."""
        self.count += 1
        id = f"c{self.count}"
        self.send(replace(command, id=id))
        return self.published(id)

    def abort(self, id: str, reason: str = "abort") -> None:
        self.send(Abort((id,), reason))


def recorded(row: Rollout, **changes: Any) -> RecordedRow:
    """A rollout as it is sent back, with other values where `changes` has some."""
    given = RecordedRow(
        row.prompt_ids,
        row.token_ids,
        tuple(
            SpanAddress(PolicyAddress(s.version.name, s.version.number), s.start, s.end, s.version.digest, s.kv)
            for s in row.spans
        ),
        (True,) * len(row.token_ids),
        row.logprobs,
        row.sampling,
        row.seed,
    )
    return replace(given, **changes)


def prompts_of(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, size=length).tolist() for length in lengths]


def random_seed() -> int:
    return secrets.randbits(53)
