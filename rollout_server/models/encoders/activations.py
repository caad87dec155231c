"""The activations that configurations of encoders name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

Activation = Callable[[mx.array], mx.array]

# erf on [-4, 4] as x · P(x²) / Q(x²), highest power first: Eigen's, to an error of about one rounding.
_ABOVE = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def gelu(x: mx.array) -> mx.array:
    """x · Φ(x). On the CPU MLX's erf goes value by value and takes longer than the product in front of it; there it is
    a quotient of polynomials."""
    return _gelu_by_quotient(x) if mx.default_device() == mx.cpu else nn.gelu(x)


@partial(mx.compile, shapeless=True)
def _gelu_by_quotient(x: mx.array) -> mx.array:
    z = mx.clip(x * math.sqrt(0.5), -4.0, 4.0)
    square = z * z
    return x * (0.5 + 0.5 * (z * _polynomial(_ABOVE, square) / _polynomial(_BELOW, square)))


def _polynomial(coefficients: Sequence[float], x: mx.array) -> mx.array:
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "gelu_accurate": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu_python_tanh": nn.gelu_approx,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": nn.mish,
    "tanh": mx.tanh,
    "sigmoid": mx.sigmoid,
}
"""transformers' names, of functions that act on each value by itself."""
