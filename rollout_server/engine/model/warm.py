"""Shapes that a first batch would wait for, run before anybody asks: on a GPU every decode step of another shape is
traced, and every kernel is made when it is first used.

A trainer's batch is full at first and its rows grow, then they end and the batch shrinks by halves. Shapes are run in
the order in which such batches come to them, from the middle outwards, for as long as the time lasts: a forward that
has begun is not cut short, and shapes that are left are compiled when rows come to them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial

import mlx.core as mx
import numpy as np

from adapters.bundle import AdapterBundle
from adapters.placement import BASE_SLOT
from adapters.prepare import HostFactors, PreparedBundle
from adapters.resident.slots import AdapterSlots
from adapters.spec import AdapterSpec, ModuleSpec, place_of
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.sizes import ROW_BUCKETS, few_columns, few_widths, row_bucket
from rollout_server.engine.kv_cache.store import Forward, Piece
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.model.embedding import UNFIT
from rollout_server.engine.model.forward.compiled import TRACES, CompiledDecode, Traces
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.sampling.sampler import prepare, sample, uniforms, warm_sampler
from rollout_server.rollout import SamplingParams

log = logging.getLogger("rollout_server.engine.model")

WARM_S = 30.0
"""After which no forward is begun. The one that runs then is finished, with all that it compiles."""
SAID_EVERY_S = 5.0
USUAL_ROWS, USUAL_COLUMNS = 256, 416
"""The batch whose steps are run first."""
MOST_TOKENS = 1024
"""The longest rows whose steps are run before."""
USUAL_RANK = 16
SHORTEST = 64
"""The shortest chunk that is read."""
MOST_TRACES = TRACES * 3 // 4
"""More would push out those that were made first, and leave no room for what comes."""
BITS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class WarmUp:
    """Engine thread only, and before there are versions and rows: they see nothing of it. `route(slots)` aims layers of
    the base's parameter set at what `slots` holds, `traces` are what its batches will step by. `cells` is what KV
    memory holds, `weights_memory` what versions may take. `clock` is in seconds."""

    def __init__(
        self,
        model: ResidentModel,
        slots: AdapterSlots,
        route: Callable[[Sequence[int]], None],
        traces: Traces,
        cells: int,
        weights_memory: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._slots = slots
        self._route = route
        self._traces = traces
        self._cells = cells
        self._weights_memory = weights_memory
        self._clock = clock
        self._read: set[tuple[int, int, int]] = set()
        """Chunks, the tokens of each, and the slot."""

    def run(self, interrupted: Callable[[], bool] = lambda: False, seconds: float = WARM_S) -> int:
        """Runs shapes until all were; begins no forward once `seconds` are over, `MOST_TRACES` steps are traced, or
        somebody has `interrupted`. Returns how many shapes were run. The log says which are left; what goes wrong is
        logged too, and left to the rows that meet it."""
        info, began = self._model.info, self._clock()
        warm_sampler(info.vocab_size, self._model.dtype, min(8, info.max_batch), self._model.filter_kernel)
        if info.cache != "slots":
            return 0
        planned = shapes(info.max_batch, info.max_model_len, self._cells)
        log.info(
            "Running %d shapes of a first batch; no forward of them begins after %.0f s (--warm off runs none).",
            len(planned),
            seconds,
        )
        done, said, over = 0, began, ""
        try:
            with self._slots_to_run() as aimed, closing(self._units(planned, aimed)) as units:
                for done in units:
                    now = self._clock()
                    over = self._over(now - began, seconds)
                    if over or interrupted():
                        break
                    if now - said >= SAID_EVERY_S:
                        said = now
                        log.info("%d of %d shapes in %.0f s", done, len(planned), now - began)
        except UNFIT as error:
            log.warning("Shapes of a first batch could not be run before it (%s): its rows wait for them.", error)
        finally:
            self._route([BASE_SLOT])
            mx.clear_cache()
        log.info("Ran %d of %d shapes in %.1f s.", done, len(planned), self._clock() - began)
        if over and (left := planned[done:]):
            log.warning(
                "No more were run, since %s. Rows that come to one of the others wait until it is compiled: %s.",
                over,
                in_words(left),
            )
        return done

    def _over(self, now: float, seconds: float) -> str:
        """Why no other forward begins, a half sentence; empty where one may. `now` is seconds since the first."""
        if now >= seconds:
            return f"{seconds:.0f} s are over"
        return f"{MOST_TRACES} steps are traced" if self._traces.made >= MOST_TRACES else ""

    @contextmanager
    def _slots_to_run(self) -> Iterator[tuple[int, ...]]:
        """The base's slot, and before it one of a version that adds nothing, where versions can be served."""
        version = nothing(self._model.info, USUAL_RANK)
        most = self._weights_memory
        if version is None or (most is not None and self._slots.nbytes_with(version.bundle) > most):
            yield (BASE_SLOT,)
            return
        try:
            yield self._slots.stage(version), BASE_SLOT
        finally:
            # Nobody else has a version yet.
            self._slots.unmount()

    def _units(self, planned: Sequence[tuple[int, int]], aimed: Sequence[int]) -> Generator[int, None, None]:
        """Before each forward, how many shapes are done."""
        for done, (rows, columns) in enumerate(planned):
            store, prompt = self._model.make_padded(), Prompt((), BASE_SLOT)
            store.begin(prompt, rows, columns - 1)
            try:
                for forward in self._forwards(store, rows, columns, aimed):
                    yield done
                    forward()
            finally:
                # At once: the next shape needs the memory.
                store.leave(prompt.places, ())
                store.shrink(0)
        yield len(planned)

    def _forwards(self, store: PaddedKV, rows: int, columns: int, aimed: Sequence[int]) -> Iterator[Callable[[], None]]:
        """Chunks of prompts and decode steps of so many rows, in arrays of so many columns."""
        decode: Forward = self._model.forward
        if self._model.compiles:
            decode = CompiledDecode(self._model.forward, store, self._slots, self._traces)
        # Arrays are made by the first chunk, and only steps on arrays are traced.
        yield partial(self._read_chunk, store, 1, 1, BASE_SLOT)
        for slot in aimed:
            for width in widths(columns, every=store.attend is None):
                yield partial(self._step, store, decode, width, slot)
            for count, length in chunks(rows, columns - 1, self._model.info.prefill_tokens):
                if (count, length, slot) not in self._read:
                    self._read.add((count, length, slot))
                    yield partial(self._read_chunk, store, count, length, slot)

    def _step(self, store: PaddedKV, decode: Forward, width: int, slot: int) -> None:
        places = store.capacity
        store.set_positions([width - 1] * places, width)
        self._route([slot] * places)
        logits = decode(mx.zeros((places, 1), dtype=mx.int32), store.layers)[:, -1]
        draws = mx.array(uniforms(range(places), [0] * places))
        usual = [SamplingParams(max_tokens=1)] * places
        arrays = prepare(usual, self._model.info.vocab_size, entropy=False, top_logprobs=0)
        mx.eval(sample(logits, arrays, draws).arrays(), store.arrays())

    def _read_chunk(self, store: PaddedKV, count: int, length: int, slot: int) -> None:
        pieces = [Piece(place, 0, (0,) * length, slot) for place in range(count)]
        store.read(self._model.forward, pieces, self._route)
        store.evaluate()


def shapes(max_rows: int, context: int, cells: int) -> list[tuple[int, int]]:
    """(rows, columns) of decode steps, the most usual first; each fits into so many cells."""
    rows = {row_bucket(bucket, max_rows) for bucket in (*ROW_BUCKETS, max_rows) if bucket <= max_rows}
    columns, most = [few_columns(1)], min(MOST_TOKENS, context) + 1
    while columns[-1] < most:
        columns.append(few_columns(columns[-1] + 1))

    def order(shape: tuple[int, int]) -> tuple[bool, float, tuple[int, int]]:
        # Batches that shrink do so by halves.
        halved = shape[0] & (shape[0] - 1) == 0 or shape[0] == max_rows
        return not halved, abs(math.log2(shape[0] / USUAL_ROWS)) + abs(math.log2(shape[1] / USUAL_COLUMNS)), shape

    return sorted([(r, c) for r in rows for c in columns if r * c <= cells], key=order)


def in_words(left: Sequence[tuple[int, int]]) -> str:
    """(rows, columns) by their rows."""
    found: dict[int, list[str]] = {}
    for rows, columns in sorted(left):
        found.setdefault(rows, []).append(str(columns))
    return "; ".join(f"{rows} row{'s' * (rows > 1)} × {', '.join(columns)} columns" for rows, columns in found.items())


def widths(columns: int, *, every: bool) -> list[int]:
    """What steps on arrays of so many columns read, the spare one apart: all of it, or, where `every` width is a shape
    of its own, what rows read that did not fit into the next smaller arrays."""
    spare = columns - 1
    if not every:
        return [spare]
    smaller = max([size for size in range(1, columns) if few_columns(size) < columns], default=1)
    return sorted({min(spare, few_widths(needed)) for needed in range(smaller, columns)})


def chunks(rows: int, columns: int, prefill_tokens: int) -> list[tuple[int, int]]:
    """(count, tokens of each) of prompts that are read at once, as many as a turn takes or one alone."""
    found = set()
    length = SHORTEST
    while length <= min(columns, prefill_tokens):
        found |= {(min(rows, prefill_tokens // length), length), (1, length)}
        length *= 2
    return sorted(found)


def nothing(info: ModelInfo, rank: int) -> PreparedBundle | None:
    """A version of this rank on every linear layer but the head that adds nothing; None where none can be served."""
    paths = [
        path for path, shape in info.layers.items() if place_of(shape) == "linear" and info.vocab_size not in shape
    ]
    if info.no_versions or "linear" in info.unfit or not paths:
        return None
    spec = AdapterSpec("lora", {path: ModuleSpec(rank, 1.0) for path in paths})
    zeros = {width: np.zeros((rank, width), dtype=BITS[info.dtype]) for path in paths for width in info.layers[path]}
    # In the order of the specification, as every version is: traces know layers by it.
    factors = {path: HostFactors(zeros[info.layers[path][1]], zeros[info.layers[path][0]]) for path in spec.modules}
    return PreparedBundle(AdapterBundle(spec, {}, "nothing", {}), "adapter", info.dtype, factors, {}, {})
