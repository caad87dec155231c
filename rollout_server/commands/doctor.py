"""`rollout-server doctor`."""

from __future__ import annotations

import typer

from rollout_server.commands.terminal.command_options import Json, one_sentence, print_json


def doctor(json_output: Json = False) -> None:
    """Look at this machine: device, BLAS, measured GFLOP/s, memory and self-tests. Exit status 1 if one fails."""
    with one_sentence():
        from rollout_server.machine.doctor import examine, print_report

        report = examine()
        if json_output:
            print_json(report.as_json())
        else:
            print_report(report)
        raise typer.Exit(0 if report.ok else 1)
