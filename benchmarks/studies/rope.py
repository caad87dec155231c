"""How far angles of RoPE are rounded at long positions: `mx.fast.rope`, and float32 as torch has it, against float64.

`python -m benchmarks.studies.rope` prints the largest error of a turned unit vector over all pairs of a head of 128
wide, on the CPU or with `--gpu`. transformers' way: frequencies, then angles, then cosines and sines, each rounded to
float32.
"""

from __future__ import annotations

import argparse

import mlx.core as mx
import numpy as np

DIMS = 128
POSITIONS = (3_000, 30_000, 100_000)
BASES = (10_000.0, 500_000.0, 1_000_000.0)


def exact(base: float, position: int) -> np.ndarray:
    """Cosines and sines float64 [2, dims / 2] by float64 throughout."""
    angle = position * base ** (-np.arange(0, DIMS, 2) / DIMS)
    return np.stack([np.cos(angle), np.sin(angle)])


def as_transformers(base: float, position: int) -> np.ndarray:
    """The same in float32, step by step."""
    exponent = np.arange(0, DIMS, 2, dtype=np.float32) / np.float32(DIMS)
    angle = np.float32(position) * (np.float32(1) / np.float32(base) ** exponent)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float64)


def by_mlx(base: float, position: int, *, given: bool) -> np.ndarray:
    """The same from MLX's kernel, by its base or by given frequencies, which scaled RoPE uses."""
    frequency = base ** (np.arange(0, DIMS, 2) / DIMS)
    turned = mx.fast.rope(
        mx.eye(DIMS)[None, :, None, :],
        DIMS,
        traditional=False,
        base=None if given else base,
        scale=1.0,
        offset=position,
        freqs=mx.array(frequency.astype(np.float32)) if given else None,
    )
    pairs = np.array(turned, np.float64)[0, : DIMS // 2, 0]
    places = np.arange(DIMS // 2)
    return np.stack([pairs[places, places], pairs[places, places + DIMS // 2]])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gpu", action="store_true", help="measure the default device and not the CPU")
    if not options.parse_args().gpu:
        mx.set_default_device(mx.cpu)
    print(f"Largest error of a turned unit vector, head of {DIMS}, on {mx.default_device()}")
    print("| theta | position | MLX by base | MLX by frequencies | float32 as transformers |")
    print("|---|---|---|---|---|")
    for base in BASES:
        for position in POSITIONS:
            true = exact(base, position)
            found = [by_mlx(base, position, given=given) for given in (False, True)]
            errors = [np.hypot(*(each - true)).max() for each in (*found, as_transformers(base, position))]
            print(f"| {base:,.0f} | {position:,} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")


if __name__ == "__main__":
    main()
