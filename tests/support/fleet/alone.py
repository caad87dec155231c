"""Runs Python where there is loopback and no other network, if the system allows it. Ray listens on the address of the
machine's interface, and on loopback only where there is no such address.

    python -m tests.support.fleet.alone -m pytest tests/ray
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys

CLONE_NEWNET = 0x40000000
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1
"""Of interfaces, as Linux's netdevice(7) has them."""


def leave_the_network() -> bool:
    """Moves this process into a network of its own; returns whether it could."""
    process = ctypes.CDLL(None)
    if not hasattr(process, "unshare") or process.unshare(CLONE_NEWNET):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("16xh", fcntl.ioctl(any_socket, GET_FLAGS, asked))
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh14x", b"lo", flags | UP))
    return True


def main() -> None:
    if not leave_the_network():
        sys.stderr.write("No network namespace can be had here, so Ray listens where this machine is reached.\n")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
