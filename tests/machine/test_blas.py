"""Each case in a process of its own: what is loaded into a process stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rollout_server.machine.blas import BlasChoice, load_fast_blas

LINUX_CPU = sys.platform == "linux" and "installed" not in load_fast_blas().reason
FOUND = load_fast_blas().name is not None
needs_blas = pytest.mark.skipif(not (LINUX_CPU and FOUND), reason="no OpenBLAS or MKL on this machine")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_importing_it_brings_no_third_party_module() -> None:
    code = """
import sys
before = set(sys.modules)
import rollout_server.machine.blas
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"rollout_server"}))
"""
    assert python(code).stdout.strip() == "[]"


@needs_blas
def test_its_symbols_are_global_and_a_second_call_agrees_after_mlx() -> None:
    code = """
import ctypes
from rollout_server.machine.blas import load_fast_blas
assert not hasattr(ctypes.CDLL(None), "cblas_sgemm")
first = load_fast_blas()
assert hasattr(ctypes.CDLL(None), "cblas_sgemm")
import mlx.core as mx
assert load_fast_blas() == first and not first.missing
print(first)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BLAS: OpenBLAS") or done.stdout.startswith("BLAS: MKL")


@needs_blas
def test_mlx_computes_with_it(tmp_path: Path) -> None:
    """The dynamic linker's own record: libmlx's cblas_sgemm is bound to the chosen file."""
    code = """
from rollout_server.machine.blas import load_fast_blas
print(load_fast_blas().path)
import mlx.core as mx
a = mx.random.normal((128, 128), key=mx.random.key(0))
mx.eval(a @ a)
"""
    done = python(code, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "bindings"))
    assert done.returncode == 0, done.stderr
    record = "".join(file.read_text(errors="replace") for file in tmp_path.iterdir())
    bound = re.findall(r"binding file \S*/libmlx\.so \[0\] to (\S+) \[0\]: normal symbol `cblas_sgemm'", record)
    assert set(bound) == {done.stdout.strip()}


@pytest.mark.skipif(not LINUX_CPU, reason="only the Linux CPU build can be too late")
def test_after_mlx_it_refuses_and_says_so() -> None:
    done = python("import mlx.core\nfrom rollout_server.machine.blas import load_fast_blas\nload_fast_blas()")
    assert done.returncode != 0
    assert "mlx was imported before" in done.stderr


@pytest.mark.skipif(not LINUX_CPU, reason="other machines bring their own")
def test_where_none_is_found_the_command_is_named() -> None:
    code = """
from rollout_server.machine import blas
blas._candidates = lambda: iter(["libnothing.so.0", "libc.so.6"])
choice = blas.load_fast_blas()
assert choice.missing and choice.name is None
print(choice)
import mlx.core as mx
a = mx.ones((64, 64))
assert (a @ a)[0, 0].item() == 64
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"install (-y )?(libopenblas0-pthread|openblas-threads|mkl|--python \\S+ mkl)$", done.stdout.strip()
    )


def test_a_choice_reads_as_one_line() -> None:
    assert str(BlasChoice("OpenBLAS 0.3", "/lib/x.so", 2, "BLAS: OpenBLAS 0.3.")) == "BLAS: OpenBLAS 0.3."
    missing = BlasChoice(None, None, None, "BLAS: none was found.", "apt-get install x")
    assert str(missing) == "BLAS: none was found. To fix it: apt-get install x"
    assert missing.missing


@needs_blas
def test_numpys_own_threads_are_taken_away_and_not_those_of_mlx() -> None:
    code = """
from rollout_server.machine.blas import load_fast_blas, one_thread_for_numpy
before = load_fast_blas().threads
import numpy as np
found = one_thread_for_numpy()
lines = [line.split()[-1] for line in open("/proc/self/maps") if "libscipy_openblas" in line]
assert found == bool(lines)
if lines:
    import ctypes
    assert ctypes.CDLL(lines[0]).scipy_openblas_get_num_threads64_() == 1
assert load_fast_blas().threads == before
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
