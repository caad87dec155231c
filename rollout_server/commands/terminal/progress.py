"""Shows how far a command has come."""

from __future__ import annotations

import typer


class Progress:
    """Shows a bar on a terminal, and elsewhere a line for each step when it is done; both on standard error."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        console = Console(stderr=True, highlight=False)
        self._bar = Bar(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=steps)
        self._plain = not console.is_terminal

    def begin(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def done(self, line: str) -> None:
        self._bar.advance(self._task)
        if self._plain:
            typer.echo(line, err=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
