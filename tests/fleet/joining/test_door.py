"""Who is let in: whoever has the key, over a link that nobody stands in, and nobody else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

from adapters.formats.read import read_bundle
from rollout_server.engine.messages.control import Ping, Pong
from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.messages.rollouts import Event, Submit
from rollout_server.errors import Conflict, EngineUnavailable, Forbidden, InvalidField, RolloutError
from rollout_server.fleet.codec.frames import LENGTHS, BadFrame
from rollout_server.fleet.codec.values import Uncompiled, described
from rollout_server.fleet.joining.challenge import PATH, Challenge, is_nonce, nonce
from rollout_server.fleet.joining.dial import Controller, dial
from rollout_server.fleet.joining.door import Door, Lock
from rollout_server.fleet.link import Link
from rollout_server.fleet.roster import Roster
from rollout_server.fleet.wire import Dismissed, Ready, Refused, StageVersion, link_codec
from rollout_server.grammar import Grammar, GrammarKind
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams
from tests.support import tiny_models
from tests.support.fleet.certificates import certificate
from tests.support.fleet.joined_here import Asked
from tests.support.fleet.kill_replicas import until

KEY, OTHER = "sixteen-letters-and-more", "another-key-of-this-length"
INFO = ModelInfo("tiny", "sha256:1", "qwen3", 320, 2048, "float32", None, (1,), 1000, {}, 96, 2**24, "slots", 8, "cpu")
READY = Ready(described(INFO), 1, {})


def no_grammar(grammar: object) -> Any:
    raise AssertionError(grammar)


CODEC = link_codec(no_grammar)


@dataclass
class Told:
    """Who a roster tells of its replicas."""

    here: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    heard_of: list[Event] = field(default_factory=list)
    refuse: RolloutError | None = None

    async def joined(self, id: str, ready: Ready) -> ModelInfo:
        if self.refuse is not None:
            raise self.refuse
        self.here.append(id)
        return ready.model.info

    def left(self, id: str) -> bool:
        self.gone.append(id)
        return True

    def heard(self, id: str, message: Event) -> None:
        self.heard_of.append(message)

    def fail(self, error: RolloutError) -> None:
        raise error

    def give_up(self, error: RolloutError) -> None: ...


class Opened:
    """A door behind a server that knows one request."""

    def __init__(self, lock: Lock, *, local: bool = True) -> None:
        self.door, self.told = Door(lock, lambda address: local), Told()
        self.roster = Roster(self.told)
        self.door.belongs_to("here")

    async def __aenter__(self) -> Opened:
        self.door.source(EngineOptions("nowhere", "tiny"), CODEC).start(self.roster)
        self._server = await asyncio.get_running_loop().create_server(lambda: Asked(self.door), "127.0.0.1", 0)
        self.at = Controller("127.0.0.1", self._server.sockets[0].getsockname()[1], key=KEY)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.roster.kill()
        self._server.close()
        await self.door.stop()


def running(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


def test_whoever_has_the_key_is_served() -> None:
    async def scenes() -> None:
        async with Opened(Lock(KEY)) as opened:
            link, welcome = await dial(opened.at, "studio", CODEC)
            assert welcome.instance == "here"
            link.send(READY)
            await until(lambda: opened.told.here == ["studio"])
            opened.roster.send("studio", Ping("p"))
            assert await link.receive() == Ping("p")
            link.send(Pong("p"))
            await until(lambda: opened.told.heard_of == [Pong("p")])
            # The same replica comes again, by another link, before the first is known to be cut.
            again, _ = await dial(opened.at, "studio", CODEC)
            again.send(READY)
            await until(lambda: len(opened.told.here) == 2)
            assert opened.told.gone == ["studio"] and await link.receive() is None
            again.kill()
            await until(lambda: len(opened.told.gone) == 2)

    running(scenes())


@pytest.mark.parametrize(
    ("lock", "replica", "local", "said"),
    [
        (KEY, OTHER, True, "not the fleet's"),
        (KEY, None, True, "not the fleet's"),
        (None, KEY, True, "not the fleet's"),
        (None, None, False, "takes no replica from 127.0.0.1"),
    ],
)
def test_whoever_has_it_not_is_told_so(lock: str | None, replica: str | None, local: bool, said: str) -> None:
    async def scenes() -> None:
        async with Opened(Lock(lock), local=local) as opened:
            with pytest.raises(Forbidden, match=said):
                await dial(replace(opened.at, key=replica), "studio", CODEC)
            assert opened.told.here == []

    running(scenes())


def test_on_one_machine_no_key_is_needed() -> None:
    async def scenes() -> None:
        async with Opened(Lock()) as opened:
            _, welcome = await dial(replace(opened.at, key=None), "studio", CODEC)
            assert welcome.proof == ""
            with pytest.raises(Forbidden, match="cannot be called"):
                await dial(replace(opened.at, key=None), "two words", CODEC)

    running(scenes())


def test_a_long_frame_and_what_is_sent_behind_it_arrive_in_their_order() -> None:
    layers = {"model.layers.0.self_attn.q_proj": (1024, 1024)}
    tensors, config = tiny_models.random_adapter(layers, 256, 0)
    bundle = read_bundle(save(tensors), config, layers=layers)

    async def scenes() -> None:
        async with Opened(Lock(KEY)) as opened:
            link, _ = await dial(opened.at, "studio", CODEC)
            link.send(READY)
            await until(lambda: opened.told.here == ["studio"])
            sent: list[Any] = [Ping("before")]
            for number in (1, 2):
                sent.append(StageVersion("s", "p", number, bundle, None, "adapter", dequantize=False))
                sent.append(Ping(f"behind {number}"))
            for message in sent:
                opened.roster.send("studio", message)
            assert bundle.nbytes >= 2**21
            for message in sent:
                got = await link.receive()
                assert got == message if isinstance(message, Ping) else got.bundle.digest == bundle.digest

    running(scenes())


def test_a_refusal_reaches_the_replica_as_a_sentence() -> None:
    async def scenes() -> None:
        async with Opened(Lock(KEY)) as opened:
            opened.told.refuse = Conflict("Its base is another one.")
            link, _ = await dial(opened.at, "studio", CODEC)
            link.send(READY)
            last = await link.receive()
            assert isinstance(last, Refused) and isinstance(last.error, Conflict)
            assert last.error.message == "Its base is another one." and not last.error.retryable
            assert await link.receive() is None

    running(scenes())


def test_links_are_encrypted_under_the_controllers_certificate(tmp_path: Path) -> None:
    own, other = Lock(KEY, *certificate(tmp_path, "own")), Lock(KEY, *certificate(tmp_path, "other"))

    async def scenes() -> None:
        async with Opened(own) as opened:
            trusting = replace(opened.at, trusted=own.certificate)
            for at in (trusting, replace(trusting, encrypted=True)):
                link, _ = await dial(at, "studio", CODEC)
                link.send(READY)
                await until(lambda: "studio" in opened.told.here)
                opened.roster.send("studio", Ping("p"))
                assert await link.receive() == Ping("p")
            for at in (opened.at, replace(opened.at, trusted=other.certificate)):
                with pytest.raises(Forbidden, match="is not trusted"):
                    await dial(at, "studio", CODEC)
        async with Opened(Lock(KEY)) as opened:
            with pytest.raises(Conflict, match="has no certificate"):
                await dial(replace(opened.at, encrypted=True), "studio", CODEC)

    running(scenes())


async def between(opened: Opened, theirs: Lock) -> tuple[asyncio.Server, Controller]:
    """Somebody who passes a replica's words on, and encrypts his half under a certificate of his own."""
    stranger = Door(theirs, lambda address: True)
    context = stranger._context

    async def passing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(opened.at.host, opened.at.port)
        far_writer.write(await reader.readuntil(b"\r\n\r\n"))
        answer = await far_reader.readuntil(b"\r\n\r\n")
        writer.write(answer.replace(b"x-fleet-tls: off", b"x-fleet-tls: on"))
        assert context is not None
        await writer.start_tls(context)
        for source, target in ((reader, far_writer), (far_reader, writer)):
            asyncio.get_running_loop().create_task(copied(source, target))

    server = await asyncio.start_server(passing, "127.0.0.1", 0)
    return server, replace(opened.at, port=server.sockets[0].getsockname()[1], trusted=theirs.certificate)


async def copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while said := await reader.read(65_536):
        writer.write(said)
    writer.close()


def test_a_proof_is_of_no_use_to_who_stands_between(tmp_path: Path) -> None:
    theirs = Lock(KEY, *certificate(tmp_path, "theirs"))

    async def scenes() -> None:
        async with Opened(Lock(KEY)) as opened:
            server, at = await between(opened, theirs)
            with pytest.raises(Forbidden, match="not the fleet's"):
                await dial(at, "studio", CODEC)
            server.close()
            assert opened.told.here == []

    running(scenes())


def test_what_is_no_first_word_is_cut_off() -> None:
    async def scenes() -> None:
        async with Opened(Lock(KEY)) as opened:
            for frame in (8 * b"\xff", LENGTHS.pack(4, 0) + b"oops", LENGTHS.pack(0, 2**31), CODEC.encode(Ping("p"))):
                reader, writer = await asyncio.open_connection(opened.at.host, opened.at.port)
                writer.write(f"GET {PATH} HTTP/1.1\r\nx-fleet-nonce: {nonce()}\r\n\r\n".encode())
                await reader.readuntil(b"\r\n\r\n")
                writer.write(frame)
                last = await Link(reader, writer, CODEC).receive()
                assert last is None or isinstance(last, Refused)
                assert not await reader.read()
                writer.close()
            assert opened.told.here == []

    running(scenes())


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_a_first_word_is_read_by_nothing_but_what_reads_first_words() -> None:
    """Neither a deep nest of arrays nor a grammar is anything that somebody without a key may have read."""
    nest = b"\x92\xa9Introduce" + b"\x91" * 60_000 + b"\x90"
    sampling = SamplingParams(max_tokens=1, constraint=Uncompiled(Grammar(GrammarKind.REGEX, "a+")))
    submit = Submit("r", (RolloutRequest("r", (1,), sampling, PolicyAddress("base"), seeds=(1,)),))

    async def scenes() -> None:
        async with Opened(Lock(KEY)) as opened:
            before = descriptors()
            for frame in [LENGTHS.pack(len(nest), 0) + nest, CODEC.encode(submit)] * 4:
                reader, writer = await asyncio.open_connection(opened.at.host, opened.at.port)
                writer.write(f"GET {PATH} HTTP/1.1\r\nx-fleet-nonce: {nonce()}\r\n\r\n".encode())
                await reader.readuntil(b"\r\n\r\n")
                writer.write(frame)
                assert not await reader.read()
                writer.close()
                await writer.wait_closed()
            await until(lambda: descriptors() <= before)
            assert opened.told.here == []

    running(scenes())


def test_what_is_nested_too_deep_is_no_frame() -> None:
    with pytest.raises(BadFrame, match="could not be read"):
        CODEC.decode(b"\x92\xa4Ping" + b"\x91" * 60_000 + b"\x90")


def test_of_two_that_wait_for_one_link_to_end_each_is_served_alone() -> None:
    async def scenes() -> None:
        async with Opened(Lock(KEY)) as opened:
            first, _ = await dial(opened.at, "studio", CODEC)
            first.send(READY)
            await until(lambda: opened.told.here == ["studio"])

            heard: list[Any] = []

            async def come() -> None:
                link, _ = await dial(opened.at, "studio", CODEC)
                link.send(READY)
                while (said := await link.receive()) is not None:
                    heard.append(said)

            waiting = [asyncio.create_task(come()) for _ in range(3)]
            # One is left in the end, and hears what it is told.
            await until(lambda: sum(task.done() for task in waiting) == 2)
            await until(lambda: opened.roster.send("studio", Ping("p")) or Ping("p") in heard)
            [left] = [task for task in waiting if not task.done()]
            left.cancel()
            await asyncio.wait([left])

    running(scenes())


def test_two_processes_of_one_name_do_not_throw_each_other_out() -> None:
    async def scenes() -> None:
        async with Opened(Lock(KEY)) as opened:
            first, _ = await dial(opened.at, "studio", CODEC, "one")
            first.send(READY)
            await until(lambda: opened.told.here == ["studio"])
            with pytest.raises(EngineUnavailable, match="Another process is called studio, too"):
                await dial(opened.at, "studio", CODEC, "two")
            opened.roster.send("studio", Ping("p"))
            assert await first.receive() == Ping("p")
            # One that was started in its place finds the link closed.
            first.kill()
            await until(lambda: opened.told.gone == ["studio"])
            again, _ = await dial(opened.at, "studio", CODEC, "two")
            again.send(READY)
            await until(lambda: opened.told.here == ["studio", "studio"])

    running(scenes())


@pytest.mark.parametrize("again", [False, True])
def test_one_that_was_let_go_over_a_link_that_was_cut_is_told_so_when_it_comes_back(again: bool) -> None:
    async def scenes() -> None:
        async with Opened(Lock(KEY)) as opened:
            link, _ = await dial(opened.at, "studio", CODEC, "one")
            link.send(READY)
            await until(lambda: opened.told.here == ["studio"])
            assert opened.roster.leave("studio", again=again)
            link.kill()
            await until(lambda: opened.told.gone == ["studio"])
            for _ in range(2):
                link, _ = await dial(opened.at, "studio", CODEC, "one")
                link.send(READY)
                last = await link.receive()
                assert isinstance(last, Dismissed) and last.again is again
                link.kill()
            assert not opened.roster.leave("studio", again=True), "it is not there"
            # Another process in its place is as any other.
            link, _ = await dial(opened.at, "studio", CODEC, "two")
            link.send(READY)
            await until(lambda: opened.told.here == ["studio", "studio"])

    running(scenes())


def test_a_file_of_certificates_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="holds no certificates that could be trusted: No such file"):
        Controller("studio", 8000, trusted=tmp_path / "none.pem").context()
    (tmp_path / "empty.pem").write_text("")
    with pytest.raises(InvalidField, match=r"empty\.pem holds no certificates that could be trusted"):
        Controller("studio", 8000, trusted=tmp_path / "empty.pem").context()


def test_proofs_are_of_one_link_and_one_side() -> None:
    one = Challenge(nonce(), nonce(), b"")
    proof = one.proof(KEY, "replica", "studio")
    assert one.holds(proof, KEY, "replica", "studio") and is_nonce(one.replica) and not is_nonce("short")
    for other in (replace(one, replica=nonce()), replace(one, controller=nonce()), replace(one, certificate=b"x")):
        assert not other.holds(proof, KEY, "replica", "studio")
    assert not one.holds(proof, KEY, "controller", "studio") and not one.holds(proof, KEY, "replica", "mini")
    assert not one.holds("", KEY, "replica", "studio") and not one.holds("ä", KEY, "replica", "studio")
