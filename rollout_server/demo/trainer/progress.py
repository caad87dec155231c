"""Live progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .loop import Step

PLAIN_EVERY = 5
"""Steps between two plain lines."""


class Watch:
    """Shows what happens. Made by `watching`."""

    def __init__(self, console: Console, steps: int, bar: Progress | None) -> None:
        self._console = console
        self._steps = steps
        self._bar = bar
        self._task = bar.add_task("", total=steps, figures="") if bar else None

    def say(self, text: str) -> None:
        """One plain line; on a terminal above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: Step) -> None:
        push = "" if step.push_ms is None else f"  push {step.push_ms:.0f} ms"
        figures = f"reward {step.reward:.3f}  gap {step.max_abs_gap:.0e}{push}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step.step, figures=figures)
        elif step.step in (1, self._steps) or step.step % PLAIN_EVERY == 0:
            self.say(f"step {step.step}/{self._steps}  {figures}  {step.seconds:.1f} s")


@contextmanager
def watching(console: Console, steps: int) -> Iterator[Watch]:
    """A `Watch` for the time of the training. The bar is removed at the end, so that the result stands alone."""
    if not console.is_terminal:
        yield Watch(console, steps, None)
        return
    columns = (
        TextColumn("GRPO"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Watch(console, steps, bar)
