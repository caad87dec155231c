"""`rollout-server doctor`: what this machine is, how fast it multiplies, and whether mlx computes batches correctly.

The self-tests cover what the engine builds on: one token per row through RoPE and attention, scatter into rows,
adapters on every kind of layer, the sampler, float32 log-softmax. mlx before 0.32 failed the first on Metal.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_server.machine.blas import CUDA_BUILDS, BlasChoice, load_fast_blas
from rollout_server.machine.device_defaults import USUAL_SHAPES, Device, DeviceDefaults, choose
from rollout_server.machine.host_memory import group_limit, physical_memory
from rollout_server.machine.memory_shares import SHARE_OF_DEVICE
from rollout_server.open_files import OpenFiles, raise_limit

MINIMUM_MLX = (0, 32)
PACKAGES = ("rollout-server", "mlx", "mlx-cpu", "mlx-metal", *CUDA_BUILDS, "mlx-lm", "transformers", "numpy")
PRODUCT_SIDE = 2048
PRODUCT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """One self-test: what was tried, whether it held, and the figure behind it."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `doctor` says. Sizes in bytes, speed in GFLOP/s of a float32 matrix product."""

    device: str
    """`cpu` or `gpu`; `none` if mlx could not be used."""
    device_name: str
    platform: str
    python: str
    versions: dict[str, str]
    blas: BlasChoice
    gflops: float | None
    bandwidth: float | None
    """GB/s that an elementwise operation reads and writes."""
    memory: dict[str, int]
    files: OpenFiles
    """As a server has them, which raises the limit as far as it may."""
    defaults: dict[str, DeviceDefaults]
    """What a server would choose here for models of usual shapes, by their names."""
    checks: tuple[Check, ...]
    advice: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        found = {"ok": self.ok, **dataclasses.asdict(self)}
        return found | {"files": {**dataclasses.asdict(self.files), "connections": self.files.connections}}


def examine() -> Report:
    """Look, measure and test. Takes a few seconds; imports mlx after its BLAS."""
    blas = load_fast_blas()
    files = raise_limit()
    versions = installed_versions()
    checks = [check_version(versions), check_backend(versions)]
    if all(check.ok for check in checks):
        checks.append(check_import())
    device, name, gflops, memory = "none", "unknown", None, machine_memory()
    bandwidth, defaults = None, dict[str, DeviceDefaults]()
    if all(check.ok for check in checks):
        # Lazy: an mlx that is too old or broken is reported, not imported.
        import mlx.core as mx

        from rollout_server.machine import selftest, this_device

        device = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
        info = mx.device_info()
        name = str(info.get("device_name", "unknown"))
        gflops = round(measure_gflops(), 1)
        speed = this_device.measure_bandwidth()
        bandwidth = round(speed / 1e9, 1)
        usable = this_device.device_memory()
        defaults = usual_defaults(Device(usable, speed, device == "cpu"))
        checks += run_checks(selftest.CHECKS)
        memory |= {f"device_{key}": int(value) for key, value in info.items() if key.endswith("size")}
        memory |= {"several_models": usable // SHARE_OF_DEVICE}
        memory |= {"mlx_limit": mx.get_memory_limit(), "mlx_peak": mx.get_peak_memory()}
    return Report(
        device=device,
        device_name=name,
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=versions,
        blas=blas,
        gflops=gflops,
        bandwidth=bandwidth,
        memory=memory,
        files=files,
        defaults=defaults,
        checks=tuple(checks),
        advice=tuple(_advice(blas, versions, files)),
    )


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter; those that are not installed are left out."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def check_version(versions: dict[str, str]) -> Check:
    """mlx is there and not older than 0.32, whose predecessors corrupt batch rows above 0 on Metal."""
    found = versions.get("mlx")
    if found is None:
        return Check("mlx version", False, f"mlx is not installed: {sys.executable} -m pip install 'mlx[cpu]'")
    release = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    wanted = ".".join(map(str, MINIMUM_MLX))
    if release < MINIMUM_MLX:
        detail = f"mlx {found} corrupts batch rows above 0 on Metal: install mlx {wanted} or newer"
        return Check("mlx version", False, detail)
    return Check("mlx version", True, f"{found}, at least {wanted}")


def check_backend(versions: dict[str, str]) -> Check:
    """Exactly one backend: on Linux the CPU and the CUDA build own the same file, and the last one installed wins."""
    builds = [name for name in ("mlx-cpu", "mlx-metal", *CUDA_BUILDS) if name in versions]
    if len(builds) == 1:
        return Check("mlx backend", True, builds[0])
    if not builds:
        return Check("mlx backend", False, f"mlx has no backend: {sys.executable} -m pip install 'mlx[cpu]'")
    remedy = f"uninstall {' and '.join(builds)}, then install the one you want"
    return Check("mlx backend", False, f"{' and '.join(builds)} overwrite each other: {remedy}")


def check_import() -> Check:
    """mlx loads: its CUDA build needs the driver's library, its CPU build a C++ runtime."""
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        return Check("mlx import", False, f"mlx cannot be loaded: {error}")
    return Check("mlx import", True, "loaded")


def run_checks(checks: tuple[tuple[str, Callable[[], tuple[bool, str]]], ...]) -> Iterator[Check]:
    """Run each self-test; one that mlx refuses to compute has failed."""
    for name, check in checks:
        try:
            ok, detail = check()
        except (RuntimeError, ValueError, TypeError) as error:
            ok, detail = False, f"mlx raised {type(error).__name__}: {error}"
        yield Check(name, ok, detail)


def measure_gflops(side: int = PRODUCT_SIDE, seconds: float = PRODUCT_SECONDS) -> float:
    """GFLOP/s of the product of two random float32 [side, side] matrices on the default device; best of several."""
    import mlx.core as mx

    left, right = (mx.random.normal((side, side), key=mx.random.key(seed)) for seed in (0, 1))
    mx.eval(left, right)
    times: list[float] = []
    # At least three: the first one pays for memory and threads.
    while sum(times) < seconds or len(times) < 3:
        before = time.perf_counter()
        mx.eval(left @ right)
        times.append(time.perf_counter() - before)
    return 2 * side**3 / min(times) / 1e9


def usual_defaults(device: Device) -> dict[str, DeviceDefaults]:
    """What `device_defaults.choose` says for usual models, those that the device holds."""
    sizes = {name: shape.footprint(device) for name, shape in USUAL_SHAPES.items()}
    return {name: choose(device, size) for name, size in sizes.items() if size.weights < device.memory}


def machine_memory() -> dict[str, int]:
    """Physical memory of the machine and, on Linux, what is available of it and what this process may have."""
    memory = {"physical": physical_memory()}
    if (limit := group_limit()) is not None and limit < memory["physical"]:
        memory["limit"] = limit
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        memory["available"] = int(found[1]) * 1024
    return memory


def _advice(blas: BlasChoice, versions: dict[str, str], files: OpenFiles) -> Iterator[str]:
    if blas.fix:
        yield f"For fast float32 products: {blas.fix}"
    if files.few:
        yield f"For more than {files.connections} connections at once: a higher hard limit of open files (ulimit -Hn)"
    if Path("/proc/driver/nvidia/version").exists() and not any(build in versions for build in CUDA_BUILDS):
        pip = f"{sys.executable} -m pip"
        wanted = f"'mlx[cuda13]=={versions.get('mlx', '')}*'"
        yield f"An NVIDIA driver is here, mlx has no CUDA: {pip} uninstall -y mlx-cpu && {pip} install {wanted}"


def print_report(report: Report) -> None:
    """The report as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("device", f"{report.device}: {report.device_name} ({report.platform}, Python {report.python})")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    table.add_row("BLAS", report.blas.reason.removeprefix("BLAS: "))
    if report.gflops is not None:
        speed = f"{report.gflops:.1f} GFLOP/s, float32 product of {PRODUCT_SIDE} x {PRODUCT_SIDE}"
        table.add_row("speed", speed + (f"; memory at {report.bandwidth:.1f} GB/s" if report.bandwidth else ""))
    table.add_row("memory", ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in report.memory.items()))
    table.add_row("files", str(report.files))
    for name, chosen in report.defaults.items():
        table.add_row("defaults", f"for {name}. {' '.join(chosen.sentences())}")
    for check in report.checks:
        table.add_row("[green]passed[/]" if check.ok else "[red]FAILED[/]", f"{check.name}: {check.detail}")
    for advice in report.advice:
        table.add_row("[yellow]advice[/]", advice)
    Console(highlight=False).print(table)
