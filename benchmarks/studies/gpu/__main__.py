"""Figures of a GPU, part by part: `python -m benchmarks.studies.gpu [PART …] [--out DIR] [--rounds 3] [--trace]`.

Every part asks one question and prints one line a figure, beside what is asked of it, with the seconds since the
start. All figures are in DIR/gpu.json after each of them; a part that fails is named there, and the next one runs.
`--shape tiny` runs parts on a small model, on a CPU too but for `launches` and `low-rank`, which are about kernels: it
says whether the study works, and nothing else.
`--trace` keeps the servers' timelines in DIR.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from rollout_server.machine.blas import load_fast_blas

BLAS = load_fast_blas()  # Before anything imports mlx.

import mlx.core as mx  # noqa: E402

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.studies.gpu import decoding, latency, peers, serving  # noqa: E402
from benchmarks.studies.gpu.figures import Figure, Report  # noqa: E402
from benchmarks.studies.gpu.held import Held  # noqa: E402
from benchmarks.studies.gpu.kernels import host, launches, low_rank  # noqa: E402
from benchmarks.studies.gpu.shapes import SIZES  # noqa: E402

PARTS: dict[str, tuple[str, Callable[[Held], Iterable[Figure]]]] = {
    "step-lora": ("How fast is a trainer's step, with its push?", serving.step_lora),
    "step-base": ("How fast is it on the base?", serving.step_base),
    "pushes": ("What does a push a second cost rows that decode?", serving.pushes),
    "decode": ("How near does decode come to a bare compiled loop?", decoding.decode),
    "adapters": ("What do adapters cost a step?", decoding.adapters),
    "launches": ("What does the device do in a step of one LoRA?", launches.launches),
    "low-rank": ("How is a launch of the adapters' kernel best shared out over threads?", low_rank.low_rank),
    "host": ("What does one operation cost the host?", host.host),
    "top-p": ("What does a filter by row cost a step?", decoding.top_p),
    "widths": ("How long is a step by rows and columns?", decoding.widths),
    "bandwidth": ("How much of the bandwidth does a larger model take?", decoding.bandwidth),
    "latency": ("How long do rows wait that are read as they come?", latency.latency),
    "batch-generator": ("How fast is mlx-lm in process?", peers.batch_generator),
    "mlx-server": ("How fast is mlx_lm.server?", peers.mlx_server),
    "transformers": ("How fast is generate of transformers with PEFT?", peers.transformers),
}
"""In the order in which they run: those that share an engine stand together."""


def figures_of(name: str, held: Held) -> Iterator[Figure]:
    """A part's. What it leaves behind when it fails is not there for the next one."""
    try:
        yield from PARTS[name][1](held)
    except Exception:
        held.free()
        raise


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"), help="folder of the figures")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, taken in turns")
    parser.add_argument("--shape", choices=list(SIZES), default="0.6B")
    parser.add_argument("--trace", action="store_true", help="keep the timelines of servers")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if mx.default_device() == mx.cpu and options.shape != "tiny":
        parser.error("there is no GPU that MLX can use; --shape tiny runs on a CPU, to see that the study works")
    options.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in PARTS if name in (options.parts or PARTS)]
    with tempfile.TemporaryDirectory() as folder:
        held = Held(SIZES[options.shape], options.rounds, Path(folder), options.out, trace=options.trace)
        about = {"command": shlex.join(["python", "-m", "benchmarks.studies.gpu", *sys.argv[1:]])}
        about |= describe_machine(BLAS.name) | {"device": held.about, "bandwidth": held.bandwidth()}
        report = Report(options.out / "gpu.json", about, judged=options.shape != "tiny")
        report.say(f"{held.about.get('device_name', mx.default_device())}: {held.bandwidth() / 1e12:.3f} TB/s")
        with held:
            for name in names:
                report.measure(name, PARTS[name][0], partial(figures_of, name, held))
    if report.failed:
        print(f"These parts failed: {', '.join(report.failed)}.", file=sys.stderr)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
