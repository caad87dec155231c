"""Random sequences of everything that can happen to versions and rows, on the real engine, turn by turn.

    python -m tests.random_runs.play --sequences 200 --seed 7

A sequence is a list of operations with numbers in them; what a number means is decided when it is played (a version is
one of those there are), so that any part of a sequence is a sequence too, and one that fails is made shorter by leaving
operations out. To add a kind of version add a `Recipe` to `worlds`.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from adapters.placement import BASE_SET
from adapters.resident import residency as resident_module
from adapters.resident import staging as staging_module
from rollout_server.engine.messages.rollouts import Submit
from rollout_server.engine.messages.scoring import Score
from rollout_server.engine.messages.versions import Activate, Delete, Export, Pin, Publish
from rollout_server.rollout import PolicyAddress, Wants
from tests.random_runs.bases import KEEP, OPTIONS, World
from tests.random_runs.failing_disk import Durable
from tests.random_runs.invariants import Asked, Promises, holders
from tests.support.engine.door import FIRE, broken_steps
from tests.support.engine.driver import Driver, prompts_of

NAMES = ("p", "q")
LENGTH = 32
NUMBERS = 6
"""Of each operation."""
OPERATIONS = {
    "publish": 14, "submit": 24, "turn": 24, "activate": 8, "pin": 7, "delete": 6, "delete_name": 1, "export": 3,
    "abort": 6, "expire": 4, "score": 6, "fault": 3, "disk": 6, "restart": 2,
}  # fmt: skip
Operation = tuple[str, tuple[int, ...]]
FAILURES = (AssertionError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)


def invent(seed: int, length: int = LENGTH) -> list[Operation]:
    dice = random.Random(seed)
    kinds = dice.choices(list(OPERATIONS), list(OPERATIONS.values()), k=length)
    return [(kind, tuple(dice.randrange(1 << 16) for _ in range(NUMBERS))) for kind in ("publish", *kinds)]


class Player:
    """Plays operations on a fresh engine over the world's model; with a `directory`, through the publisher that keeps
    versions in it, on a disk that fails at times."""

    def __init__(self, world: World, directory: Path | None = None) -> None:
        self.world = world
        self.directory = directory
        self.checked: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        self.driver = Driver.start(self.world.path, self.world.model, **OPTIONS)
        self.promises = Promises(self.driver, lambda digest: self.world.models[digest], KEEP)
        self.faults: list[Exception] = []
        self.driver.on_failed_step(self.faults.append)
        self.durable: Durable | None = None
        if self.directory is not None:
            self.durable = Durable(self.directory, self.promises, self.send, KEEP)
            self.durable.restore(lambda: self.turn(0))

    def stop(self) -> None:
        """The process ends, whatever it was doing: the model is as it was before there was a server."""
        if self.durable is not None:
            self.durable.end()
            self.checked += self.durable.checked
        self.checked += self.promises.checked
        resident = self.driver.resident
        resident.sets.mount(BASE_SET)
        resident.slots.unmount()

    def play(self, operations: Sequence[Operation]) -> Counter[str]:
        """Plays them, lets the engine finish, and returns what was checked how often. Raises `AssertionError`."""
        # A push takes many turns: one parameter or layer in each.
        with (
            mock.patch.multiple(resident_module, BUILD_S=0.0, WRITE_S=0.0),
            mock.patch.object(staging_module, "WRITE_BYTES", 1),
        ):
            try:
                for kind, numbers in operations:
                    getattr(self, kind)(*numbers)
                    # Half of them share a turn with the next.
                    if numbers[-1] % 2:
                        self.turn(0)
                self.drain()
            finally:
                self.stop()
        self.world.check_base()
        return self.checked

    def turn(self, count: int, *_: int) -> None:
        for _ in range(1 + count % 4):
            # An idle engine would wait for a command.
            if self.driver.busy or not self.driver.mailbox.empty():
                self.driver.turn()
                self.promises.check()
                strangers = [error for error in self.faults if str(error) != FIRE]
                assert not strangers, f"a step failed by itself: {strangers[0]!r}"
            if self.durable is not None:
                self.durable.after_turn()

    @property
    def idle(self) -> bool:
        working = self.driver.busy or not self.driver.mailbox.empty() or self.driver.batches.size
        return not working and not (self.durable and self.durable.busy)

    def settle(self) -> None:
        for _ in range(2000):
            if self.idle:
                break
            self.turn(0)
        self.turn(0)
        assert self.idle, "it never came to rest"

    def drain(self) -> None:
        """Everything ends, each request once, and then nothing is held; without names nothing is resident."""
        self.settle()
        assert all(asked.over for asked in self.promises.asked.values()), "a request never ended"
        assert not self.promises.commands, "a command was never answered"
        if self.durable is not None:
            self.durable.disk.heal()
        for name in NAMES:
            self.change(Delete(f"end-{name}", name))
        self.settle()
        driver, resident = self.driver, self.driver.resident
        assert not holders(self.driver) and not driver.residents and not driver.bundles_held
        assert not resident.sets.numbers and resident.sets.mounted == BASE_SET
        assert (driver.batches.size, driver.requests.waiting_requests, len(driver.requests.open_requests)) == (0, 0, 0)
        assert driver.policies.slot_bytes == driver.policies.set_bytes == 0

    def send(self, command: Any) -> None:
        self.promises.commands[command.id] = command
        self.driver.send(command)

    def change(self, command: Any) -> None:
        """Of versions: first on disk, where there is one."""
        (self.send if self.durable is None else self.durable.send)(command)

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
        kept = line.kept.get(number) if line else None
        return f"{name}@{kept.digest[:20]}" if kept and which % 8 == 4 else f"{name}@{number}"

    def condition(self, name: str, pick: int) -> str | None:
        """Mostly none; else where the alias is, or some other place."""
        line = self.promises.lines.get(name)
        kept = line.kept.get(line.live or 0) if line else None
        if pick % 4 or kept is None:
            return None if pick % 12 else "1"
        other = str(self.number(name, pick)), "sha256:" + 8 * "0"
        return (str(line.live), kept.digest, kept.digest[:17], *other)[pick // 4 % 5]

    # ---- operations -----------------------------------------------------------------------------------------------

    def publish(self, name: int, recipe: int, live: int, label: int, match: int, *_: int) -> None:
        push, chosen = self.world.pushes[recipe % len(self.world.pushes)], NAMES[name % 3 // 2]
        self.change(
            Publish(
                self.new_id(),
                chosen,
                push.bundle,
                activate=live % 4 != 0,
                label=(None, "a", f"step-{label}")[label % 3],
                if_match=self.condition(chosen, match),
                mode=push.mode,
            )
        )

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

    def activate(self, name: int, pick: int, match: int, *_: int) -> None:
        chosen = NAMES[name % 3 // 2]
        self.change(Activate(self.new_id(), chosen, self.number(chosen, pick), self.condition(chosen, match)))

    def pin(self, name: int, pick: int, pinned: int, *_: int) -> None:
        chosen = NAMES[name % 3 // 2]
        self.change(Pin(self.new_id(), chosen, self.number(chosen, pick), pinned % 3 != 0))

    def delete(self, name: int, pick: int, *_: int) -> None:
        chosen = NAMES[name % 3 // 2]
        self.change(Delete(self.new_id(), chosen, self.number(chosen, pick)))

    def delete_name(self, name: int, *_: int) -> None:
        self.change(Delete(self.new_id(), NAMES[name % 2]))

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
        open_requests = self.driver.requests.open_requests
        if ids := [id for id in self.open() if id in open_requests]:
            id = ids[pick % len(ids)]
            self.promises.asked[id].ended.add("timeout")
            open_requests[id].deadline = 0.0

    def fault(self, which: int, pick: int, *_: int) -> None:
        """In the next turn a forward of some batch fails if there is one, or the staging of a push in its middle."""
        batches = self.driver.every_batch
        resident = self.driver.resident
        for id in self.open():
            self.promises.asked[id].ended.add("fault")
        if which % 3:
            with broken_steps(batches[pick % len(batches)]):
                self.turn(0)
            return
        self.promises.struck |= {id for id, command in self.promises.commands.items() if isinstance(command, Publish)}
        part, name = ((resident.sets, "advance"), (resident.slots, "write"), (resident.slots, "measure"))[pick % 3]
        whole = getattr(part, name)

        def broken(*arguments: Any, **options: Any) -> None:
            whole(*arguments, **options)
            raise ValueError(FIRE)

        with mock.patch.object(part, name, broken):
            self.turn(0)

    def disk(self, good: int, bad: int, *_: int) -> None:
        """Some operations on files from now on, some fail; or all that fail are over."""
        if self.durable is not None:
            self.durable.disk.good, self.durable.disk.bad = good % 9, bad % 6

    def restart(self, *_: int) -> None:
        """Killed, whatever is under way, and started again."""
        if self.durable is not None:
            self.durable.check_directory()
            self.stop()
            self.world.check_base()
            self.start()


def last_of(driver: Driver, kind: type) -> Any:
    """The command that was sent last; the mailbox is as before."""
    commands = [driver.mailbox.get_nowait() for _ in range(driver.mailbox.qsize())]
    for command in commands:
        driver.mailbox.put(command)
    assert isinstance(commands[-1], kind)
    return commands[-1]


def play(world: World, operations: Sequence[Operation], durable: bool) -> Counter[str]:
    if not durable:
        return Player(world).play(operations)
    with tempfile.TemporaryDirectory() as directory:
        return Player(world, Path(directory)).play(operations)


def failure(world: World, operations: Sequence[Operation], durable: bool = False) -> str | None:
    try:
        play(world, operations, durable)
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"
    return None


def shortest(world: World, operations: Sequence[Operation], durable: bool = False) -> list[Operation]:
    """A part of them that fails as well and of which no operation can be left out."""
    kept = list(operations)
    size = len(kept)
    while size:
        at = 0
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            if fewer and failure(world, fewer, durable):
                kept = fewer
            else:
                at += size
        size //= 2
    return kept


def explore(world: World, seeds: Sequence[int]) -> Counter[str]:
    """Plays a sequence for each seed, every other one on a state directory. Raises `AssertionError` with the shortest
    one that fails as the first did."""
    checked: Counter[str] = Counter()
    for seed in seeds:
        operations, durable = invent(seed), bool(seed % 2)
        try:
            checked += play(world, operations, durable)
        except FAILURES as error:
            short = shortest(world, operations, durable)
            lines = "\n".join(f"    {operation}," for operation in short)
            raise AssertionError(f"seed {seed}: {failure(world, short, durable)}\nafter\n{lines}") from error
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
