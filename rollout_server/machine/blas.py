"""Loads a fast BLAS before mlx on Linux CPU, and keeps float32 products whole on CUDA. Standard library only; never
imports mlx.

The Linux wheel of mlx links the reference BLAS: some 5 GFLOP/s in float32 where OpenBLAS or MKL give hundreds. Symbols
of a library loaded first and globally win, so every entry point calls `load_fast_blas` before anything imports mlx.
`python -m rollout_server.machine.blas` prints what it finds; exit status 1 where a fast BLAS is missing.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CUDA_BUILDS = ("mlx-cuda-13", "mlx-cuda-12")

# Names for the dynamic linker. Fedora's plain libopenblas is single-threaded, its `p` variant is not.
_SONAMES = ("libopenblasp.so.0", "libopenblas.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2")


@dataclass(frozen=True, slots=True)
class BlasChoice:
    """What float32 products on the CPU will run on."""

    name: str | None
    """`OpenBLAS 0.3.21`, `MKL …`; None if nothing was loaded."""
    path: str | None
    threads: int | None
    reason: str
    """One sentence for the log."""
    fix: str | None = None
    """The command that makes it fast, where something is missing."""

    @property
    def missing(self) -> bool:
        """True if this machine would be faster with a library that was not found."""
        return self.fix is not None

    def __str__(self) -> str:
        return f"{self.reason} To fix it: {self.fix}" if self.fix else self.reason


def load_fast_blas() -> BlasChoice:
    """Load OpenBLAS or MKL with global symbols, if this machine needs one and has one. A second call says the same.

    Raises RuntimeError if mlx was imported first: its symbols are bound by then, and the process stays slow.
    """
    if sys.platform != "linux":
        return BlasChoice(None, None, None, f"BLAS: {platform.system()} brings its own (Accelerate on macOS).")
    if build := cuda_build():
        # TF32 keeps 10 bits of a float32 factor: rows would depend on their neighbours at 3e-4. MLX reads this at its
        # first product. Whoever wants the speed sets it to 1, or serves bfloat16.
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
        return BlasChoice(
            None, None, None, f"BLAS: {build} is installed, products run on the GPU, float32 ones in full."
        )
    if loaded := _global_blas():
        return loaded
    if "mlx.core" in sys.modules:
        raise RuntimeError("mlx was imported before rollout_server.machine.blas.load_fast_blas(): call it first.")
    for candidate in _candidates():
        if _load(candidate) and (loaded := _global_blas()):
            return loaded
    return BlasChoice(
        None,
        None,
        None,
        "BLAS: neither OpenBLAS nor MKL was found, so float32 products are some fifty times slower than they could be.",
        _install_command(),
    )


def share_cores(parts: int) -> None:
    """Leaves this process's products one part in so many of the machine's cores, where OpenBLAS computes them."""
    process = ctypes.CDLL(None)
    if parts > 1 and hasattr(process, "openblas_set_num_threads"):
        own = max(1, (os.cpu_count() or 1) // parts)
        process.openblas_set_num_threads(min(own, process.openblas_get_num_threads()))


def one_thread_for_numpy() -> bool:
    """Keeps the OpenBLAS inside numpy's wheels to one thread, and leaves mlx's alone; false where there is none.

    A server's numpy works on adapters beside the engine. With threads of its own it waits for cores that the engine
    has, 15 ms for a product of 0.3 ms, and keeps the engine from them meanwhile. numpy must have been imported."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "libscipy_openblas" in line}
    for path in paths:
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads"):
            if hasattr(library, name):
                getattr(library, name)(1)
    return bool(paths)


def cuda_build() -> str | None:
    """Name and version of the installed CUDA build of mlx."""
    for name in CUDA_BUILDS:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _candidates() -> Iterator[str]:
    """Libraries to try, best first: this environment's own (pip, conda), Debian's threaded one, then the linker's."""
    local = Path(sys.prefix) / "lib"
    for pattern in ("libopenblas*.so*", "libmkl_rt.so*"):
        yield from map(str, sorted(local.glob(pattern)))
    for folder in ("openblas-pthread", "openblas-openmp"):
        yield from map(str, sorted(Path("/usr/lib").glob(f"*/{folder}/libopenblas.so.0")))
    yield from _SONAMES


def _load(candidate: str) -> bool:
    """Load it globally if it is whole and has the C interface that mlx calls."""
    try:
        library = ctypes.CDLL(candidate, mode=ctypes.RTLD_LOCAL)
        if not hasattr(library, "cblas_sgemm"):
            return False
        ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _global_blas() -> BlasChoice | None:
    """The BLAS whose symbols are global in this process, whoever loaded it."""
    process = ctypes.CDLL(None)
    if not hasattr(process, "cblas_sgemm"):
        return None
    path = _path_of(process.cblas_sgemm)
    name, threads = "an unnamed BLAS", None
    if hasattr(process, "openblas_get_config"):
        process.openblas_get_config.restype = ctypes.c_char_p
        name = " ".join(process.openblas_get_config().decode().split()[:2])
        threads = process.openblas_get_num_threads()
    elif hasattr(process, "MKL_Get_Version_String"):
        text = ctypes.create_string_buffer(256)
        process.MKL_Get_Version_String(text, len(text))
        name = "MKL " + text.value.decode().partition("Version ")[2].partition(" ")[0]
        threads = process.MKL_Get_Max_Threads()
    where = f" from {path}" if path else ""
    count = f" with {threads} threads" if threads else ""
    return BlasChoice(name, path, threads, f"BLAS: {name}{where}{count}.")


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("file_name", ctypes.c_char_p),
        ("file_base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    )


def _path_of(function: ctypes._NamedFuncPointer) -> str | None:
    """The file a loaded function comes from."""
    dladdr = getattr(ctypes.CDLL(None), "dladdr", None)
    info = _DlInfo()
    if dladdr is None or not dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info)):
        return None
    return str(info.file_name.decode())


def _install_command() -> str:
    """The command of this machine's distribution, else one for this Python environment."""
    if Path("/usr/bin/apt-get").exists():
        return "sudo apt-get update && sudo apt-get install -y libopenblas0-pthread"
    if Path("/usr/bin/dnf").exists():
        return "sudo dnf install -y openblas-threads"
    if importlib.util.find_spec("pip"):
        return f"{sys.executable} -m pip install mkl"
    return f"uv pip install --python {sys.executable} mkl"


def main() -> int:
    """Print what is taken; 1 where a fast BLAS is missing."""
    choice = load_fast_blas()
    sys.stdout.write(f"{choice}\n")
    return int(choice.missing)


if __name__ == "__main__":
    sys.exit(main())
