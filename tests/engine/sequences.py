"""Random sequences of everything that can happen to versions and rows, on the real engine, turn by turn.

    python -m tests.engine.sequences --sequences 200 --seed 7

A sequence is a list of operations with numbers in them; what a number means is decided when it is played (a version is
one of those there are), so that any part of a sequence is a sequence too, and one that fails is made shorter by leaving
operations out. To add a kind of version add a `Recipe`.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_model

from adapters.bundle import AdapterBundle
from rollout_server.engine.messages import EngineOptions, Score, Submit
from rollout_server.engine.model import ResidentModel, load
from rollout_server.engine.policy_messages import Activate, Delete, Export, Pin, Publish
from rollout_server.rollout import PolicyAddress, Wants
from tests import tiny_models
from tests.adapters.making import merge
from tests.engine.driver import Driver, prompts_of
from tests.engine.promises import Asked, Promises, holders

NAMES = ("p", "q")
KEEP = 2
OPTIONS: dict[str, Any] = {"max_batch": 4, "prefill_tokens": 16, "keep_versions": KEEP}
LENGTH = 32
NUMBERS = 6
"""Of each operation."""


@dataclass(frozen=True)
class Recipe:
    """A kind of version: how its bundle is made, and how it is published."""

    bundle: dict[str, Any]
    publish: dict[str, Any] = field(default_factory=dict)


RECIPES = (
    Recipe({"rank": 2}),
    Recipe({"rank": 4, "kind": "mlx", "targets": ["q_proj", "v_proj"]}),
    Recipe({"rank": 5, "rslora": True, "targets": ["down_proj"]}),
    Recipe({"rank": 9, "targets": ["o_proj", "up_proj", "gate_proj"]}),
    Recipe({"rank": 3, "dora": True}),
    Recipe({"rank": 6, "dora": True, "targets": ["k_proj", "down_proj"]}),
    Recipe({"rank": 2, "targets": ["embed_tokens", "q_proj"]}),
)
OPERATIONS = {
    "publish": 14, "submit": 24, "turn": 24, "activate": 8, "pin": 7, "delete": 6, "delete_name": 1, "export": 3,
    "abort": 6, "expire": 4, "score": 6, "fault": 2,
}  # fmt: skip
Operation = tuple[str, tuple[int, ...]]


@dataclass
class World:
    """A tiny base, the bundles that are pushed, and a model for each with the adapter merged into its weights."""

    path: Path
    model: ResidentModel
    bundles: list[tuple[AdapterBundle, dict[str, Any]]]
    models: dict[str, nn.Module]

    @classmethod
    def make(cls, path: Path) -> World:
        tiny_models.build("qwen3", path, num_hidden_layers=2)
        model = load(EngineOptions(str(path), "tiny", **OPTIONS))
        driver = Driver.start(path, model)
        bundles = [(driver.bundle(seed, **recipe.bundle), recipe.publish) for seed, recipe in enumerate(RECIPES, 1)]
        models = {bundle.digest: merge(load_model(path)[0], bundle) for bundle, _ in bundles}
        models[model.info.digest] = load_model(path)[0]
        return cls(path, model, bundles, models)


def invent(seed: int, length: int = LENGTH) -> list[Operation]:
    dice = random.Random(seed)
    kinds = dice.choices(list(OPERATIONS), list(OPERATIONS.values()), k=length)
    return [(kind, tuple(dice.randrange(1 << 16) for _ in range(NUMBERS))) for kind in ("publish", *kinds)]


class Player:
    """Plays operations on a fresh engine over the world's model."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.driver = Driver.start(world.path, world.model, **OPTIONS)
        self.promises = Promises(self.driver, lambda digest: world.models[digest], KEEP)

    def play(self, operations: Sequence[Operation]) -> Counter[str]:
        """Plays them, lets the engine finish, and returns what was checked how often. Raises `AssertionError`."""
        try:
            for kind, numbers in operations:
                getattr(self, kind)(*numbers)
                # Half of them share a turn with the next.
                if numbers[-1] % 2:
                    self.turn(0)
            self.drain()
        finally:
            self.driver.engine._policies._resident.slots.unmount()
        return self.promises.checked

    def turn(self, count: int, *_: int) -> None:
        for _ in range(1 + count % 4):
            # An idle engine would wait for a command.
            if self.driver.engine._busy or not self.driver.mailbox.empty():
                self.driver.turn()
                self.promises.check()

    def drain(self) -> None:
        """Everything ends, each request once, and then nothing is held; without names no slot is taken."""
        for _ in range(500):
            self.turn(3)
        assert all(asked.over for asked in self.promises.asked.values()), "a request never ended"
        assert not self.promises.commands, "a command was never answered"
        for name in NAMES:
            self.send(Delete(f"end-{name}", name))
        self.turn(0)
        self.turn(0)
        engine = self.driver.engine
        assert not holders(self.driver) and not engine._policies._resident._residents and not engine._policies._bundles
        assert (engine._batch.size, engine._scheduler.waiting_requests, len(engine._scheduler.tickets)) == (0, 0, 0)

    def send(self, command: Any) -> None:
        self.promises.commands[command.id] = command
        self.driver.send(command)

    def new_id(self) -> str:
        self.driver.count += 1
        return f"c{self.driver.count}"

    def number(self, name: str, pick: int) -> int:
        """Mostly a version that is kept, else any number that ever was or one that never was."""
        line = self.promises.lines.get(name)
        kept = sorted(line.kept) if line else []
        return kept[pick % len(kept)] if kept and pick % 5 else 1 + pick % ((line.last if line else 0) + 2)

    def address(self, pick: int, which: int) -> str:
        name = ("base", "p", "p", "q", "p")[pick % 5]
        if name == "base" or which % 4:
            return name
        number = self.number(name, pick)
        line = self.promises.lines.get(name)
        digest = line.kept.get(number) if line else None
        return f"{name}@{digest[:20]}" if digest and which % 8 == 4 else f"{name}@{number}"

    # ---- operations -----------------------------------------------------------------------------------------------

    def publish(self, name: int, recipe: int, live: int, *_: int) -> None:
        bundle, options = self.world.bundles[recipe % len(self.world.bundles)]
        self.send(Publish(self.new_id(), NAMES[name % 3 // 2], bundle, activate=live % 4 != 0, **options))

    def submit(self, policy: int, which: int, size: int, length: int, update: int, seed: int) -> None:
        lengths = [1 + length % 37, 1 + seed % 30][: 1 + size % 2]
        follow = ("finish", "switch", "switch", "abort")[update % 4]
        id = self.driver.submit(
            prompts_of(lengths, 286, seed=seed % 7),
            n=1 + size % 5,
            policy=self.address(policy, which),
            seed=seed,
            max_tokens=1 + update % 23,
            ignore_eos=bool(seed % 3),
            temperature=(1.0, 1.3)[length % 2],
            on_update=follow,
            max_staleness=(None, None, 0, 1)[which % 4],
            min_version=2 if which % 11 == 1 else None,
            wants=Wants(prompt_logprobs=seed % 4 == 0),
        )
        submit = last_of(self.driver, Submit)
        self.promises.asked[id] = Asked(submit.groups)

    def activate(self, name: int, pick: int, *_: int) -> None:
        chosen = NAMES[name % 3 // 2]
        self.send(Activate(self.new_id(), chosen, self.number(chosen, pick)))

    def pin(self, name: int, pick: int, pinned: int, *_: int) -> None:
        chosen = NAMES[name % 3 // 2]
        self.send(Pin(self.new_id(), chosen, self.number(chosen, pick), pinned % 3 != 0))

    def delete(self, name: int, pick: int, *_: int) -> None:
        chosen = NAMES[name % 3 // 2]
        self.send(Delete(self.new_id(), chosen, self.number(chosen, pick)))

    def delete_name(self, name: int, *_: int) -> None:
        self.send(Delete(self.new_id(), NAMES[name % 2]))

    def export(self, name: int, pick: int, *_: int) -> None:
        chosen = NAMES[name % 3 // 2]
        self.send(Export(self.new_id(), chosen, self.number(chosen, pick)))

    def score(self, policy: int, which: int, length: int, seed: int, *_: int) -> None:
        tokens = tuple(prompts_of([2 + length % 40], 286, seed=seed % 5)[0])
        address = PolicyAddress.parse(self.address(policy, which))
        self.send(Score(self.new_id(), address, (tokens, tokens[:2]), (0, 0)))

    def open(self) -> list[str]:
        return [id for id, asked in self.promises.asked.items() if not asked.over]

    def abort(self, pick: int, *_: int) -> None:
        """Of an open request, or of one that is over."""
        ids = self.open() if pick % 4 else list(self.promises.asked)
        if ids:
            self.promises.asked[ids[pick % len(ids)]].ended.add("abort")
            self.driver.abort(ids[pick % len(ids)])

    def expire(self, pick: int, *_: int) -> None:
        """Its time is over."""
        tickets = self.driver.engine._scheduler.tickets
        if ids := [id for id in self.open() if id in tickets]:
            id = ids[pick % len(ids)]
            self.promises.asked[id].ended.add("timeout")
            tickets[id].deadline = 0.0

    def fault(self, *_: int) -> None:
        """The next forward of the batch fails, if there is one in this turn."""
        batch = self.driver.engine._batch[0]
        forward = batch._forward

        def broken(*_: object) -> None:
            raise ValueError("the device is on fire")

        for id in self.open():
            self.promises.asked[id].ended.add("fault")
        batch._forward = broken  # type: ignore[assignment]
        self.turn(0)
        batch._forward = forward


def last_of(driver: Driver, kind: type) -> Any:
    """The command that was sent last; the mailbox is as before."""
    commands = [driver.mailbox.get_nowait() for _ in range(driver.mailbox.qsize())]
    for command in commands:
        driver.mailbox.put(command)
    assert isinstance(commands[-1], kind)
    return commands[-1]


def failure(world: World, operations: Sequence[Operation]) -> str | None:
    try:
        Player(world).play(operations)
    except (AssertionError, ValueError, KeyError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def shortest(world: World, operations: Sequence[Operation]) -> list[Operation]:
    """A part of them that fails as well and of which no operation can be left out."""
    kept = list(operations)
    size = len(kept)
    while size:
        at = 0
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            if fewer and failure(world, fewer):
                kept = fewer
            else:
                at += size
        size //= 2
    return kept


def explore(world: World, seeds: Sequence[int]) -> Counter[str]:
    """Plays a sequence for each seed. Raises `AssertionError` with the shortest one that fails as the first did."""
    checked: Counter[str] = Counter()
    for seed in seeds:
        operations = invent(seed)
        try:
            checked += Player(world).play(operations)
        except (AssertionError, ValueError, KeyError, RuntimeError) as error:
            short = shortest(world, operations)
            lines = "\n".join(f"    {operation}," for operation in short)
            raise AssertionError(f"seed {seed}: {failure(world, short)}\nafter\n{lines}") from error
        checked["operations"] += len(operations)
    return checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checked = explore(World.make(Path(directory) / "tiny"), range(options.seed, options.seed + options.sequences))
    sys.stdout.write(f"{options.sequences} sequences held: {dict(checked)}\n")


if __name__ == "__main__":
    main()
