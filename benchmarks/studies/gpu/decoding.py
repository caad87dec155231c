"""Parts about decode steps, in an engine of this process: against the bare loop, by length, by adapters, by filters."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Mapping

import mlx.core as mx
from mlx_lm.utils import load_model

from benchmarks.contenders.bare import BareLoop, UnmaskedLoop
from benchmarks.contenders.engine import TOP_P, Engine
from benchmarks.contenders.steady import SLACK, SteadyRows
from benchmarks.measure import Contender, Load
from benchmarks.studies.gpu.figures import Figure, in_turns, over
from benchmarks.studies.gpu.held import Held
from rollout_server.engine.kv_cache.sizes import row_bucket
from rollout_server.engine.messages.options import KV_BUCKET
from rollout_server.machine.device_defaults import HEADROOM, in_words
from rollout_server.machine.this_device import device_memory
from rollout_server.rollout import PolicyAddress

EIGHT = 8


def rate(contender: Contender) -> Callable[[], float]:
    """Tokens a second of one run."""

    def call() -> float:
        tokens, seconds = contender.run()
        mx.synchronize()
        return tokens / seconds

    return call


def decode(held: Held) -> Iterator[Figure]:
    """Rates at few and at many rows, of the engine and of the bare loops on a model of their own."""
    size = held.size
    engine = held.engine(size.many)
    model, _ = load_model(held.path())
    for rows in (size.few, size.rows):
        load = Load(rows, size.short, size.steps)
        prompts = held.prompts(rows, size.short)
        contenders: list[Contender] = [
            SteadyRows(engine, prompts, rows, size.steps),
            BareLoop(model, prompts, load, compiled=True),
            UnmaskedLoop(model, prompts, load),
        ]
        rates = in_turns({contender.name: rate(contender) for contender in contenders}, held.rounds)
        for name, found in rates.items():
            yield Figure(f"{rows} rows, {name}", "tok/s", found)
        ours, bare, _ = rates.values()
        yield Figure(f"{rows} rows, engine / bare compiled loop", "", over(ours, bare), 0.95)
    del model
    gc.collect()


def widths(held: Held) -> Iterator[Figure]:
    """Milliseconds a step by rows and columns, and the share of bandwidth that what has to be read takes of it."""
    size = held.size
    for rows in (size.rows, size.many):
        for columns in size.columns:
            yield from step_at(held, size.shape, rows, columns)


def bandwidth(held: Held) -> Iterator[Figure]:
    """The same at one length, on the larger shape: its weights count for more."""
    yield from step_at(held, held.size.larger, held.size.rows, held.size.asked_columns[1])


def step_at(held: Held, shape: str, rows: int, columns: int) -> Iterator[Figure]:
    size, most = held.size, held.size.many if shape == held.size.shape else rows
    name, prompt = f"{shape}, {rows} rows × {columns} columns", columns - held.size.steps // 2
    info = held.engine(most, shape).handle.info
    needed = cells(rows, prompt, size.steps) * info.kv_bytes_per_token
    there = room_beside(info.weight_bytes, device_memory())
    if needed > there:
        why = f"its KV takes {in_words(needed)} and the device has {in_words(max(there, 0))} for it"
        yield Figure(f"{name}: not run, {why}", "needed / there", (needed / max(there, 1),))
        return
    engine = held.engine(most, shape, needed)
    prompts = held.prompts(-(-rows // EIGHT), prompt)
    steady = SteadyRows(engine, prompts, rows, size.steps)
    rates = in_turns({name: rate(steady)}, held.rounds)[name]
    asked = 18.0 if (rows, columns) == (size.rows, size.asked_columns[0]) else None
    yield Figure(f"{name}: a step", "ms", tuple(1e3 * rows / each for each in rates), asked, at_most=True)
    read = info.weight_bytes + rows * columns * info.kv_bytes_per_token
    asked = 0.45 if (rows, columns) == (size.rows, size.asked_columns[1]) else None
    shares = tuple(read * each / rows / held.bandwidth() for each in rates)
    yield Figure(f"{name}: share of {held.bandwidth() / 1e12:.2f} TB/s", "", shares, asked)


def cells(rows: int, prompt: int, steps: int) -> int:
    """Columns over all rows that `SteadyRows` come to fill, and the spare one of each, as arrays have them."""
    columns = prompt + SLACK * (steps + 1) + 1
    return row_bucket(rows, rows) * -(-columns // KV_BUCKET) * KV_BUCKET


def room_beside(weights: int, memory: int) -> int:
    """Bytes for KV beside the weights and what the server leaves to the activations and to the logits of a step; while
    arrays grow the copy of one layer stands there."""
    return memory - weights - 2 * (memory // HEADROOM)


def adapters(held: Held) -> Iterator[Figure]:
    """What adapters cost a step."""
    engine = held.engine(held.size.many)
    base, loras = PolicyAddress("base"), [held.policy(engine, seed) for seed in range(1, EIGHT + 1)]
    routes = {
        "base": [base],
        "one LoRA": loras[:1],
        "eight LoRA": loras,
        "one DoRA": [held.policy(engine, 1, dora=True)],
    }
    rates = yield from rates_of(held, {name: _steady(held, engine, policies=route) for name, route in routes.items()})
    yield Figure("one LoRA / base", "", over(rates["one LoRA"], rates["base"]), 0.85)
    yield Figure("eight LoRA / one", "", over(rates["eight LoRA"], rates["one LoRA"]), 0.80)
    yield Figure("one DoRA / one LoRA", "", over(rates["one DoRA"], rates["one LoRA"]))


def top_p(held: Held) -> Iterator[Figure]:
    """What a filter of its own in every group costs a step."""
    engine = held.engine(held.size.many)
    rates = yield from rates_of(held, {"no filter": _steady(held, engine), TOP_P: _steady(held, engine, kind=TOP_P)})
    yield Figure(f"{TOP_P} / none", "", over(rates[TOP_P], rates["no filter"]), 0.90)


def _steady(held: Held, engine: Engine, *, policies: list[PolicyAddress] | None = None, kind: str = "") -> SteadyRows:
    size = held.size
    prompts = held.prompts(-(-size.rows // EIGHT), size.short)
    return SteadyRows(engine, prompts, size.rows, size.steps, policies=policies or [PolicyAddress("base")], kind=kind)


def rates_of(held: Held, contenders: Mapping[str, Contender]) -> Generator[Figure, None, dict[str, tuple[float, ...]]]:
    """Yields each rate; returns all."""
    rates = in_turns({name: rate(contender) for name, contender in contenders.items()}, held.rounds)
    for name, found in rates.items():
        yield Figure(f"{held.size.rows} rows, {name}", "tok/s", found)
    return rates
