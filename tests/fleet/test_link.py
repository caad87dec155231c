"""A version of any size goes over a link in pieces, between which the loop has turns for everybody else."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from adapters.bundle import AdapterBundle, make_bundle
from adapters.spec import AdapterSpec, ModuleSpec
from adapters.tensors import AdapterTensor, frozen
from rollout_server.engine.messages.control import Ping, Pong
from rollout_server.fleet.codec.frames import PIECE, Codec
from rollout_server.fleet.link import BUFFER, Link
from rollout_server.fleet.wire import StageVersion, link_codec
from rollout_server.grammar import Constraint, Grammar
from tests.support.fleet.kill_replicas import until

WIDTH = 9 * PIECE
"""Numbers of each of two matrices of a version: 18 MiB in all, many times what is written at once."""


def no_grammar(grammar: Grammar) -> Constraint:
    raise AssertionError("There is none in these messages.")


CODEC = link_codec(no_grammar)


def large() -> AdapterBundle:
    drawn = np.random.default_rng(0)
    tensors = {
        name: AdapterTensor("F32", frozen(drawn.standard_normal(shape, np.float32)))
        for name, shape in (("layer.lora_A", (1, WIDTH)), ("layer.lora_B", (WIDTH, 1)))
    }
    return make_bundle(AdapterSpec("lora", {"layer": ModuleSpec(1, 1.0)}), tensors)


BUNDLE = large()
STAGE = StageVersion("/stage/1/p", "p", 1, BUNDLE, None, "adapter", dequantize=False)


class Turns:
    """Counts the turns of the loop that somebody else had."""

    def __init__(self) -> None:
        self.count = 0

    async def go_on(self) -> None:
        while True:
            self.count += 1
            await asyncio.sleep(0)


class Greedy(asyncio.WriteTransport):
    """A way out that takes all that it is given at once, as loopback to a reader that keeps up: nobody ever waits."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns
        self.sent, self.handled = bytearray(), Counter[int]()
        self.sources: list[Any] = []

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data
        self.sources.append(data)
        self.handled[self._turns.count] += len(data)


def link_of(way: Greedy, reader: asyncio.StreamReader | None = None) -> Link:
    reader = reader or asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    return Link(reader, asyncio.StreamWriter(way, protocol, reader, asyncio.get_running_loop()), CODEC)


def with_turns(scene: Callable[[Turns], Awaitable[None]]) -> None:
    async def played() -> None:
        turns = Turns()
        others = asyncio.create_task(turns.go_on())
        await scene(turns)
        others.cancel()

    asyncio.run(asyncio.wait_for(played(), 60))


async def all_sent(*writers: Greedy) -> None:
    length = sum(map(len, CODEC.parts(STAGE)))
    await until(lambda: all(len(writer.sent) >= length for writer in writers))


def test_a_turn_of_the_loop_writes_one_piece_of_a_version_to_each_replica() -> None:
    async def scene(turns: Turns) -> None:
        ways = [Greedy(turns) for _ in range(3)]
        for way in ways:
            link = link_of(way)
            link.send(STAGE)
            link.send(Ping("behind"))
        assert all(not way.sent for way in ways), "nothing is written, or joined, by who sends"
        await all_sent(*ways)
        for way in ways:
            # The last piece of one array, a gap and the first of the next are pieces by themselves.
            assert max(way.handled.values()) <= PIECE and len(way.handled) >= BUNDLE.nbytes // PIECE

    with_turns(scene)


def test_what_is_written_of_a_version_is_its_own_memory() -> None:
    async def scene(turns: Turns) -> None:
        way = Greedy(turns)
        link_of(way).send(STAGE)
        await all_sent(way)
        arrays = [tensor.array for tensor in BUNDLE.tensors.values()]
        shared = [
            len(data)
            for data in way.sources
            if any(np.shares_memory(np.frombuffer(data, np.uint8), array) for array in arrays)
        ]
        assert sum(shared) == BUNDLE.nbytes

    with_turns(scene)


def test_other_links_say_what_they_have_to_say_while_a_version_is_under_way() -> None:
    async def scene(turns: Turns) -> None:
        busy, quick = Greedy(turns), Greedy(turns)
        link_of(busy).send(STAGE)
        link = link_of(quick)
        link.send(Ping("alive"))
        assert bytes(quick.sent) == CODEC.encode(Ping("alive")) and not busy.sent, "at once"
        for _ in range(8):
            await asyncio.sleep(0)
        link.send(Ping("again"))
        assert len(busy.sent) < BUNDLE.nbytes and bytes(quick.sent).endswith(CODEC.encode(Ping("again")))

    with_turns(scene)


def test_messages_arrive_in_their_order_and_whole() -> None:
    async def scene(turns: Turns) -> None:
        way, reader = Greedy(turns), asyncio.StreamReader(limit=BUFFER)
        link = link_of(way, reader)
        said = [Ping("first"), STAGE, Pong("between"), STAGE, Ping("last")]
        for message in said:
            link.send(message)
        await until(lambda: bytes(way.sent[-64:]).endswith(CODEC.encode(Ping("last"))))
        reader.feed_data(bytes(way.sent))
        reader.feed_eof()
        for message in said:
            found = await link.receive()
            if isinstance(message, StageVersion):
                assert make_bundle(found.bundle.spec, found.bundle.tensors).digest == BUNDLE.digest
            else:
                assert found == message
        assert await link.receive() is None

    with_turns(scene)


@pytest.mark.parametrize("behind", [True, False], ids=["all is there", "it comes bit by bit"])
def test_a_version_is_read_a_piece_in_each_turn(behind: bool) -> None:
    async def scene(turns: Turns) -> None:
        reader = asyncio.StreamReader(limit=BUFFER)
        frame = CODEC.encode(STAGE)

        async def feed() -> None:
            for at in range(0, len(frame), PIECE // 2):
                reader.feed_data(frame[at : at + PIECE // 2])
                await asyncio.sleep(0)

        if behind:
            reader.feed_data(frame)
        else:
            feeding = asyncio.create_task(feed())
        before = turns.count
        found = await link_of(Greedy(turns), reader).receive()
        assert turns.count - before >= BUNDLE.nbytes // PIECE
        assert make_bundle(found.bundle.spec, found.bundle.tensors).digest == BUNDLE.digest
        if not behind:
            await feeding

    with_turns(scene)


def test_a_link_that_is_cut_within_a_version_has_ended() -> None:
    async def scene(turns: Turns) -> None:
        frame = CODEC.encode(STAGE)
        for length in (4, 100, len(frame) // 2, len(frame) - 1):
            reader = asyncio.StreamReader(limit=BUFFER)
            reader.feed_data(frame[:length])
            reader.feed_eof()
            assert await link_of(Greedy(turns), reader).receive() is None

    with_turns(scene)


def test_a_frame_in_one_piece_is_made_a_piece_at_a_time() -> None:
    """What Ray's store is given is one value: it is what the parts are, and no copy is longer than a piece."""
    codec = Codec((StageVersion,), no_grammar)
    assert codec.encode(STAGE) == b"".join(codec.parts(STAGE))
