"""The numeric tests under each of OpenBLAS's kernels, as other processors would choose them.

python -m tests.support.numbers.kernels Haswell Zen
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

KERNELS = ("Haswell", "Zen", "Sandybridge", "SkylakeX")
NEEDS = {"SkylakeX": "avx512f", "Haswell": "avx2", "Zen": "avx2", "Sandybridge": "avx"}
"""What a kernel's instructions are called in /proc/cpuinfo; without them it crashes."""
# What is asked of a process with a kernel chosen: what its products really run on.
ASK = (
    "import ctypes; from rollout_server.machine.blas import load_fast_blas; load_fast_blas(); "
    "name = getattr(ctypes.CDLL(None), 'openblas_get_corename', None); "
    "name and setattr(name, 'restype', ctypes.c_char_p); print(name().decode() if name else '')"
)
TESTS = ("-m", "numeric and not server and not long", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")


def run(kernel: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OPENBLAS_CORETYPE": kernel}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def tested(kernel: str, flags: set[str], arguments: list[str]) -> bool:
    """Prints one line, and what pytest said where it failed; False where it did."""
    if NEEDS[kernel] not in flags:
        sys.stdout.write(f"{kernel}: skipped, this processor has no {NEEDS[kernel]}\n")
        return True
    if (chosen := run(kernel, ["-c", ASK]).stdout.strip()) != kernel:
        sys.stdout.write(f"{kernel}: skipped, products run on {chosen or 'no OpenBLAS that lets itself be asked'}\n")
        return True
    began = time.monotonic()
    done = run(kernel, ["-m", "pytest", "-q", *TESTS, *arguments])
    *_, last = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        sys.stdout.write(done.stdout + done.stderr)
    sys.stdout.write(f"{kernel}: {last.strip('= ')} ({time.monotonic() - began:.0f} s with the start)\n")
    sys.stdout.flush()
    return done.returncode == 0


def main() -> int:
    asked = [word for word in sys.argv[1:] if word in KERNELS]
    arguments = [word for word in sys.argv[1:] if word not in KERNELS]
    information = Path("/proc/cpuinfo")
    flags = set(information.read_text().split()) if information.exists() else set()
    passed = [tested(kernel, flags, arguments) for kernel in asked or KERNELS]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
