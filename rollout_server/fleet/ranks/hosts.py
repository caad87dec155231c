"""The hosts of ranks, as the file names them that `mlx.launch` reads, and that launcher as a child of this command.

It passes no signal on: whoever ends it alone leaves the ranks running. So it has a group of processes of its own, which
ends as a whole, and what it has started over ssh ends with the connection that it was started by.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rollout_server.errors import InvalidField
from rollout_server.quoting import quoted

RDMA = ("jaccl", "jaccl-ring")
LAUNCH = "mlx.launch"
HERE = "127.0.0.1"
"""The only name that it starts a rank by without ssh."""
SPARED = 'trap "" TERM; exec "$@"'
"""The launcher itself passes over the signal that rank 0 ends at, and so tells what rank 0 still says."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where one rank runs."""

    ssh: str
    ips: tuple[str, ...]


def read_hosts(path: Path, size: int, backend: str) -> tuple[Host, ...]:
    """One host for each rank, rank 0 first. Raises `InvalidField` with what is wrong where: `mlx.launch` itself would
    start what it can, and the ranks would wait for the rest."""
    try:
        content = json.loads(path.expanduser().read_bytes())
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _wrong(path, f"is no JSON: {error}") from error
    entries = content.get("hosts") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise _wrong(path, 'is neither a list of hosts nor an object with "hosts"')
    if len(entries) != size:
        raise _wrong(
            path, f"names {len(entries)} hosts, and --tensor-parallel asks for {size} ranks: one host for each"
        )
    hosts = tuple(_host(path, number, entry) for number, entry in enumerate(entries))
    if backend in RDMA:
        for number, entry in enumerate(entries):
            _check_rdma(path, number, entry.get("rdma"), size)
    return hosts


def lead_address(nccl_ip: str | None, coordinator: str | None, ring: Path | None) -> str | None:
    """Where the other ranks reach rank 0, as `mlx.launch` has told a rank of each backend: by the variable alone, by
    one with a port, or by a file of each rank's addresses. None where it has told nothing."""
    if nccl_ip is not None:
        return nccl_ip
    if coordinator is None and ring is not None:
        try:
            coordinator = json.loads(ring.read_bytes())[0][0]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InvalidField(f"MLX_HOSTFILE {ring} lists no addresses of ranks.", param="hostfile") from error
    return None if coordinator is None else coordinator.rpartition(":")[0].strip("[]")


def _host(path: Path, number: int, entry: Any) -> Host:
    where = f"host {number}"
    if not isinstance(entry, dict):
        raise _wrong(path, f'{where} is no object with "ssh" and "ips"')
    ssh, ips = entry.get("ssh"), entry.get("ips", [])
    if not isinstance(ssh, str) or not ssh:
        raise _wrong(path, f'{where} has no "ssh", the name that it is reached by')
    if not isinstance(ips, list) or not all(isinstance(ip, str) and ip for ip in ips):
        raise _wrong(path, f'"ips" of {where} ({quoted(ssh)}) is no list of addresses')
    if not ips:
        raise _wrong(path, f'{where} ({quoted(ssh)}) has no "ips", the addresses at which other ranks reach it')
    return Host(ssh, tuple(ips))


def _check_rdma(path: Path, number: int, devices: Any, size: int) -> None:
    if not isinstance(devices, list) or len(devices) != size:
        raise _wrong(path, f'"rdma" of host {number} does not list a device for each of {size} hosts')
    if devices[number] is not None:
        raise _wrong(path, f'"rdma" of host {number} names a device for itself, where null belongs')


def _wrong(path: Path, what: str) -> InvalidField:
    return InvalidField(f"--hostfile {path} {what}.", param="hostfile")


def launching(path: Path, backend: str, variables: Mapping[str, str], arguments: list[str]) -> list[str]:
    """The command that runs this very command on every host, with these variables. Raises `InvalidField` where MLX
    brings no launcher."""
    launcher = Path(sys.executable).with_name(LAUNCH)
    if not launcher.exists():
        raise InvalidField(f"{LAUNCH} is not beside {sys.executable}: install mlx there.", param="hostfile")
    own = [sys.executable, "-m", "rollout_server", *arguments]
    given = [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
    return [str(launcher), "--hostfile", str(path.expanduser()), "--backend", backend, *given, "--", *own]


def launch(command: Sequence[str], lead: Host, within_s: float) -> bool:
    """Runs the launcher until all ranks have ended; returns whether a signal has ended them. Rank 0 may take `within_s`
    seconds to end what it serves, and is cut off where it runs elsewhere: ssh passes no signal on."""
    # Its input stays open and empty: at the end of it the launcher would read without end.
    launcher = subprocess.Popen(["sh", "-c", SPARED, "sh", *command], stdin=subprocess.PIPE, start_new_session=True)
    told = threading.Event()
    late = threading.Timer(within_s, _signal, (launcher.pid, signal.SIGKILL))
    late.daemon = True

    def stop(number: int, frame: FrameType | None) -> None:
        if not told.is_set():
            told.set()
            _signal(launcher.pid, signal.SIGTERM if lead.ssh == HERE else signal.SIGKILL)
            late.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    launcher.wait()
    late.cancel()
    _signal(launcher.pid, signal.SIGKILL)
    return told.is_set()


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
