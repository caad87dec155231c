"""What several GPUs of one host bring: a replica on each, and one model cut over all of them.

`python -m benchmarks.studies.gpu.several [PART …] [--shape 0.6B|4B] [--out DIR] [--rounds 3] [--gpus N]`. Every part
prints one line a figure, beside what is asked of it; all are in DIR/several-SHAPE.json after each of them. `--cpu` runs
every part on a small model with two ranks on the ring of this machine, which says whether the study works, and
nothing else. NCCL is told to leave NVLink's multicast off.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from rollout_server.machine.blas import load_fast_blas

BLAS = load_fast_blas()  # Before anything imports mlx.

import mlx.core as mx  # noqa: E402

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.studies.gpu.figures import Figure, Report  # noqa: E402
from benchmarks.studies.gpu.several import parts  # noqa: E402
from benchmarks.studies.gpu.several.engines import Machine  # noqa: E402
from benchmarks.studies.gpu.shapes import SHAPES, write_model  # noqa: E402
from rollout_server.machine.gpus import NVIDIA, gpus_for  # noqa: E402

PARTS: dict[str, tuple[str, Callable[[parts.Study], AsyncIterator[Figure]]]] = {
    "replicas": ("How much do more replicas bring, and what does a push to all cost?", parts.replicas),
    "replica-killed": ("What becomes of rows whose replica is killed?", parts.replica_killed),
    "exact": ("Do ranks compute what one GPU computes?", parts.exact),
    "decode": ("How fast do ranks decode, and how much of it is sums?", parts.decode),
    "rank-killed": ("What becomes of rows when a rank is killed?", parts.rank_killed),
    "turns": ("Do ranks do the same for ten thousand turns?", parts.turns),
}
OFF = {"NCCL_NVLS_ENABLE": "0"}


def figures_of(name: str, study: parts.Study) -> Iterator[Figure]:
    """A part's, as they are found."""
    with asyncio.Runner() as runner:
        found = PARTS[name][1](study)
        while (figure := runner.run(anext(found, None))) is not None:
            yield figure


def study_of(options: argparse.Namespace, folder: Path) -> parts.Study:
    """The models are written on the CPU: this process takes no GPU."""
    mx.set_default_device(mx.cpu)
    shape = "tiny" if options.cpu else options.shape
    halves = write_model(folder / "bfloat16", shape, mx.bfloat16)
    machine = Machine((), "ring") if options.cpu else Machine(gpus_for(options.gpus, None), "nccl")
    small = {"prompts": 4, "prompt_tokens": 24, "samples": 2, "tokens": 16, "many": (1, 4), "turns": 300}
    usual = {"prompts": 32, "prompt_tokens": 256, "samples": 8, "tokens": 128, "many": (1, 32, 256), "turns": 10_000}
    sizes = (small if options.cpu else usual) | ({"turns": options.turns} if options.turns else {})
    count = 2 if options.cpu else options.gpus
    return parts.Study(
        machine,
        shape,
        halves,
        lambda: write_model(folder / "float32", shape, mx.float32),
        count,
        options.rounds,
        push_rank=16,
        **sizes,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.gpu.several", description=__doc__.split("\n")[0]
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"), help="folder of the figures")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], default="0.6B")
    parser.add_argument("--gpus", type=int, default=len(list(NVIDIA.glob("*"))), help="how many to use; all there are")
    parser.add_argument("--turns", type=int, help="of the part of that name; 10,000, and 300 with --cpu")
    parser.add_argument("--cpu", action="store_true", help="a small model without GPUs: says that the study works")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not options.cpu and options.gpus < 2:
        parser.error(f"there are {options.gpus} GPUs, and several are asked about; --cpu says whether the study works")
    os.environ.update({name: value for name, value in OFF.items() if name not in os.environ})
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(options, Path(folder))
        about = {"command": shlex.join(["python", "-m", "benchmarks.studies.gpu.several", *sys.argv[1:]])}
        about |= describe_machine(BLAS.name) | {"shape": study.shape, "gpus": study.count}
        report = Report(options.out / f"several-{study.shape}.json", about, judged=not options.cpu)
        for name in [name for name in PARTS if name in (options.parts or PARTS)]:
            report.measure(name, PARTS[name][0], lambda name=name: figures_of(name, study))  # type: ignore[misc]
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
