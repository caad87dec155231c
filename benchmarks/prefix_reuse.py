"""Section `turns`: five turns of a conversation with and without prefix reuse, measured by `benchmarks.turns`."""

from __future__ import annotations

from typing import Any

from benchmarks.record import Curve, Measured, Ratio, Scale, Section
from benchmarks.turns import ADDED, FIRST, REPLY, TURNS, measure

WHAT = (
    f"A conversation of {TURNS} turns: a first prompt of {FIRST:,} tokens, then the reply ({REPLY} tokens) and "
    f"{ADDED} new ones are added each time; prefill milliseconds as the engine reports them, with and without prefix "
    "reuse. A load of which nothing is ever hit shows what keeping prefixes costs; the time between two tokens of "
    "running rows, what prompts that arrive beside them cost."
)


def section(scale: Scale) -> Section:
    report = measure(scale.rounds)
    prefill, second, gaps = report["prefill_ms"], report["second_turn_of_first"], report["between_tokens_ms"]
    return Section(
        "turns",
        "Prefix reuse over five turns",
        WHAT,
        tuple(measured(report)),
        (
            Ratio("prefill of the second turn / the first", (second["on"],), 0.15, at_most=True),
            Ratio("the same without reuse", (second["off"],)),
            Ratio("throughput where nothing is hit, with / without", (report["share_kept_without_hits"],)),
            Ratio("time between tokens, beside prompts / undisturbed", (gaps["ratio"],), 2.0, at_most=True),
        ),
        tuple(
            Curve(f"reuse {name}", "turn", "prefill, ms", tuple(enumerate(times, 1))) for name, times in prefill.items()
        ),
        facts={"rounds within": scale.rounds},
    )


def measured(report: dict[str, Any]) -> list[Measured]:
    turns = [
        Measured(f"prefill of turn {turn}, reuse {name}", "ms", (ms,))
        for name, times in report["prefill_ms"].items()
        for turn, ms in enumerate(times, 1)
    ]
    loads = [
        Measured(f"nothing hit, reuse {name}", "tok/s", (rate,))
        for name, rate in report["tokens_per_s_without_hits"].items()
    ]
    return [*turns, *loads]
