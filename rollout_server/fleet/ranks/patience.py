"""Ends a process that waits for ranks which do not come.

    python -m rollout_server.fleet.ranks.patience PID SECONDS

MLX holds Python's lock while ranks meet, so that no thread of the process itself could. This one ends when its standard
input does, which is when they have met.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """What is done here may take so long; behind that this process is killed, and the log says why."""
    command = [sys.executable, "-m", "rollout_server.fleet.ranks.patience", str(os.getpid()), str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as watch:
        try:
            yield
        finally:
            if watch.stdin is not None:
                watch.stdin.close()


def main() -> int:
    pid, seconds = int(sys.argv[1]), float(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if select.select([sys.stdin], [], [], seconds)[0]:
        return 0
    sys.stderr.write(
        f"Not all ranks have met within {seconds:g} s: one of them ended before, or its address cannot be reached. "
        f"This one (process {pid}) ends; the logs of the others say more.\n"
    )
    sys.stderr.flush()
    os.kill(pid, signal.SIGKILL)
    return 1


if __name__ == "__main__":
    sys.exit(main())
