"""`rollout-server top`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout_server.commands.terminal.command_options import Json, Url, connected, one_sentence, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trainer_client import PolicyLine, RolloutClient

MIB = 2**20


def top(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show one state, over one interval, and end.")] = False,
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Watch a server: tokens a second, rows, memory for KV, versions. Ctrl-C ends it.

    On a terminal a view that renews itself, elsewhere a line for each look; --json prints one state and ends."""
    from rich.console import Console
    from rich.live import Live

    with one_sentence(), connected(url) as client:
        looks = watch(client, interval)
        if json_output:
            return print_json(next(looks).as_json())
        console = Console(highlight=False)
        if once:
            return console.print(view(next(looks)))
        if not console.is_terminal:
            for state in looks:
                typer.echo(state.line())
        with Live(console=console, auto_refresh=False) as live:
            for state in looks:
                live.update(view(state), refresh=True)


Counted = dict[tuple[str, str], float]
"""(name of a metric, the value of its label or nothing) → value, of all models together."""


@dataclass(frozen=True, slots=True)
class State:
    """What a server did over `seconds`, and what it holds at their end."""

    url: str
    health: dict[str, Any]
    policies: tuple[PolicyLine, ...]
    before: Counted = field(repr=False)
    now: Counted = field(repr=False)
    seconds: float

    def rate(self, name: str) -> float:
        """Increase of a counter a second. A server that was started again counts from nothing."""
        change = self.now.get((name, ""), 0.0) - self.before.get((name, ""), 0.0)
        return max(0.0, change) / self.seconds

    def gauge(self, name: str, label: str = "") -> int | None:
        value = self.now.get((name, label))
        return None if value is None else int(value)

    @property
    def hit_share(self) -> float | None:
        """The share of the prompts since the start of which the prefix cache held something."""
        hits, misses = (self.now.get((f"rollout_prefix_{what}_total", ""), 0.0) for what in ("hits", "misses"))
        return hits / (hits + misses) if hits + misses else None

    def as_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "state": self.health["state"],
            "paused": self.health.get("paused"),
            "tokens_per_s": self.rate("rollout_tokens_total"),
            "steps_per_s": self.rate("rollout_steps_total"),
            "running": self.health["running"],
            "waiting": self.health["waiting"],
            "kv_bytes": self.gauge("rollout_memory_bytes", "kv_held"),
            "kv_limit_bytes": self.gauge("rollout_memory_bytes", "kv_limit"),
            "prefix_bytes": self.gauge("rollout_prefix_bytes"),
            "prefix_hit_share": self.hit_share,
            "tokens": self.health["tokens"],
            "models": self.health.get("models", []),
            "policies": [
                {
                    "name": line.name,
                    "live": line.live,
                    "versions": [kept.version for kept in line.versions],
                    "rows_in_use": sum(kept.rows_in_use for kept in line.versions),
                    "bytes": sum(kept.nbytes or 0 for kept in line.versions),
                }
                for line in self.policies
            ],
        }

    def line(self) -> str:
        at = ", ".join(f"{line.name}@{line.live}" for line in self.policies if line.live is not None)
        return (
            f"{time.strftime('%H:%M:%S')} {self.rate('rollout_tokens_total'):.0f} tok/s, "
            f"{self.health['running']} running, {self.health['waiting']} waiting, KV {kv(self)}, live: {at or 'base'}"
        )


def kv(state: State) -> str:
    held, limit = (state.gauge("rollout_memory_bytes", part) for part in ("kv_held", "kv_limit"))
    if held is None:
        held = state.gauge("rollout_prefix_bytes") or 0
        return f"{held / MIB:.0f} MiB kept"
    return f"{held / MIB:.0f} of {limit / MIB:.0f} MiB" if limit else f"{held / MIB:.0f} MiB"


def watch(client: RolloutClient, interval_s: float) -> Iterator[State]:
    """A state after every interval, until somebody stops asking."""
    from trainer_client.wire.call import Call
    from trainer_client.wire.replies import parse_json

    metrics = Call(method="GET", path="/metrics", parse=lambda reply: counted(reply.body.decode()), idempotent=True)
    health = Call(method="GET", path="/health", parse=lambda reply: parse_json(reply.body), idempotent=True)
    before, at = client.send(metrics), time.perf_counter()
    while True:
        time.sleep(interval_s)
        now, then = client.send(metrics), time.perf_counter()
        said = client.send(health)
        lines = [line for model in said.get("models", [{}]) for line in client.weights(model.get("model"))]
        yield State(client.url, said, tuple(lines), before, now, then - at)
        before, at = now, then


def counted(text: str) -> Counted:
    """Prometheus' text format, as far as it is shown here."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Counted = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.type in ("gauge", "counter") else ():
            label = next((value for name, value in sample.labels.items() if name != "model"), "")
            found[sample.name, label] = found.get((sample.name, label), 0.0) + sample.value
    return found


def view(state: State) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    paused = f", paused ({state.health['paused']})" if state.health.get("paused") else ""
    hits = "" if state.hit_share is None else f", prefix hits {state.hit_share:.0%}"
    said = [
        f"{state.url}: {state.health['state']}{paused}",
        f"{state.rate('rollout_tokens_total'):.0f} tok/s, {state.rate('rollout_steps_total'):.0f} steps/s, "
        f"{state.health['tokens']} tokens since the start",
        f"{state.health['running']} rows running, {state.health['waiting']} requests waiting",
        f"KV {kv(state)}{hits}",
    ]
    if len(models := state.health.get("models", [])) > 1:
        said += [
            f"{each['model']}: {each['state']}, {each['running']} rows running, {each['waiting']} requests waiting, "
            f"{each['tokens']} tokens"
            for each in models
        ]
    table = Table("policy", "live", "kept", "rows", "MiB", box=None, pad_edge=False)
    for line in state.policies:
        kept = ", ".join(str(version.version) for version in line.versions)
        rows, nbytes = (sum(getattr(v, name) or 0 for v in line.versions) for name in ("rows_in_use", "nbytes"))
        live = "" if line.live is None else str(line.live)
        table.add_row(line.name, live, kept, str(rows), f"{nbytes / MIB:.1f}")
    text = Text("\n".join(said))
    return Group(text, Text(""), table) if state.policies else text
