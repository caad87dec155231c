"""The thread the model lives on: loads, builds, steps and frees there, because MLX streams are thread-local."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.messages.rollouts import Command, Event
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.timeline import Timeline
from rollout_server.errors import RolloutError
from rollout_server.open_files import import_mlx_lm
from rollout_server.text.pictures.reader import PictureReader

if TYPE_CHECKING:
    from rollout_server.engine.encoding.loop import EncoderEngine
    from rollout_server.engine.loop import Engine
    from rollout_server.engine.ranks.ranks import Ranks
    from rollout_server.engine.sampling.grammars import Grammars


class Runner(Protocol):
    """What runs an `EngineHandle`'s commands: it posts their events, and shows its status whenever that changes."""

    info: ModelInfo | None
    tokenizer: Any
    grammars: Grammars | None
    pictures: PictureReader | None

    def put(self, command: Command) -> None:
        """Hands a command over."""

    def start(self) -> None:
        """Begins; the status says when it is ready."""

    def is_alive(self) -> bool:
        """Returns whether it still runs commands."""

    def join(self) -> None:
        """Waits for its end, which a `Stop` brings."""


MakeRunner = Callable[[EngineOptions, Callable[[list[Event]], None], Callable[[EngineStatus], None]], Runner]
"""Makes one that starts with these options, posts events and shows its status."""


class EngineThread(threading.Thread):
    """`info`, `tokenizer`, `grammars` and `pictures` are set before the status says ready; an encoder has no grammars,
    and only a model that sees reads pictures."""

    def __init__(
        self,
        options: EngineOptions,
        post: Callable[[list[Event]], None],
        show: Callable[[EngineStatus], None],
    ) -> None:
        super().__init__(name=f"engine {options.resident}".rstrip(), daemon=True)
        self.info: ModelInfo | None = None
        self.tokenizer: Any = None
        self.grammars: Grammars | None = None
        self.pictures: PictureReader | None = None
        self._options = options
        self._mailbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._post = post
        self._show = show
        self._clock: Callable[[], float] = time.monotonic
        self._device_fault: Callable[[], str | None] | None = None

    def put(self, command: Command) -> None:
        """Hands a command over; from any thread."""
        self._mailbox.put(command)

    def run(self) -> None:
        engine: Engine | EncoderEngine | None = None
        cause: BaseException | None = None
        try:
            import_mlx_lm()
            # Imported here so that the event loop's side needs no MLX before the model's thread does.
            from rollout_server.engine.model.encoders.resident import holds_encoder

            with Timeline(self._options.trace) as timeline:
                encodes = holds_encoder(Path(self._options.model_path))
                engine = self._encoder(timeline) if encodes else self._decoder(timeline)
                engine.run()
        except RolloutError as error:
            cause = error  # a sentence for the user; it needs no traceback
        finally:
            self._end(engine, cause or sys.exception())
            clear_streams()

    def _decoder(self, timeline: Timeline) -> Engine:
        """The engine of a model that reads token after token."""
        from rollout_server.engine.assembly import build_engine
        from rollout_server.engine.model.device import device_fault
        from rollout_server.engine.model.load import load
        from rollout_server.engine.policies.table import PolicyTable
        from rollout_server.engine.sampling.grammars import Grammars

        with timeline.part("load") as part:
            part.note(model=self._options.model_id)
            model = load(self._options, self._gather())
        policies, options = PolicyTable(model, self._options, self._clock), self._options
        engine = build_engine(
            model,
            policies,
            self._mailbox,
            self._post,
            self._show,
            options,
            clock=self._clock,
            device_fault=self._device_fault or device_fault,
            timeline=timeline,
        )
        self.grammars = Grammars(model.host_tokenizer, model.info.vocab_size, model.info.eos_token_ids)
        self.pictures = model.eyes.reader if model.eyes is not None else None
        self.info, self.tokenizer = model.info, model.host_tokenizer
        self._begin()
        return engine

    def _gather(self) -> Ranks | None:
        """The ranks that each have a part of the model; None where this process has all of it."""
        return None

    def _begin(self) -> None:
        """What is left to be done between the model's load and the first turn."""

    def _encoder(self, timeline: Timeline) -> EncoderEngine:
        """The engine of one that reads sequences whole, behind the same messages."""
        from rollout_server.engine.encoding.loop import EncoderEngine
        from rollout_server.engine.model.device import device_fault
        from rollout_server.engine.model.encoders.resident import load_encoder
        from rollout_server.engine.policies.table import PolicyTable

        with timeline.part("load") as part:
            part.note(model=self._options.model_id)
            model = load_encoder(self._options)
        policies, fault = PolicyTable(model, self._options), device_fault
        engine = EncoderEngine(
            model, policies, self._mailbox, self._post, self._show, device_fault=fault, timeline=timeline
        )
        self.info, self.tokenizer = model.info, model.host_tokenizer
        return engine

    def _end(self, engine: Engine | EncoderEngine | None, cause: BaseException | None) -> None:
        """Whatever ends the thread, nobody waits for ever: all that is open fails by name."""
        if cause is None and engine is not None:
            engine.stop()
        elif engine is not None and cause is not None:
            engine.die(cause)
        elif cause is not None:
            self._show(EngineStatus("dead", str(cause) or type(cause).__name__))


def clear_streams() -> None:
    """Ends MLX's worker of this thread; left running, it can abort the process at its exit."""
    import mlx.core as mx

    mx.clear_streams()
