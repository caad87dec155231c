"""Checks that mlx computes a batch correctly on this device. Each check is (holds, figure); exact where rows must be
equal."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from adapters.resident.device_check import check_adapters
from adapters.resident.layers.expert_product import use_expert_product
from adapters.resident.model_layers import adaptable_layers
from rollout_server.engine.sampling.sampler_check import check_sampler

ROWS, HEADS, WIDTH = 8, 4, 64


def _noise(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def _worst(left: mx.array, right: mx.array) -> float:
    """Largest absolute difference, compared in float32 on the host."""
    return float(np.max(np.abs(np.array(left.astype(mx.float32)) - np.array(right.astype(mx.float32)))))


def _rope(x: mx.array, offset: mx.array | int) -> mx.array:
    return mx.fast.rope(x, WIDTH, traditional=False, base=10_000.0, scale=1.0, offset=offset)


class _Layers(nn.Module):
    """One layer of every kind that an adapter may target, narrow and of odd widths among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(203, 64)
        self.narrow = nn.Linear(6, 5)
        self.linear = nn.Linear(64, 52)
        self.experts = SwitchGLU(64, 96, 4)
        use_expert_product(self)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embed.as_linear(self.embed(tokens))


def rope_rows() -> tuple[bool, str]:
    """One token in each of 8 equal rows at one position: row k equals row 0, which equals the formula."""
    position = 37
    rows = mx.broadcast_to(_noise(1, HEADS, 1, WIDTH, seed=1), (ROWS, HEADS, 1, WIDTH))
    spread = 0.0
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        # A copy: decode hands RoPE a real array, never a broadcast view.
        turned = _rope(mx.contiguous(rows.astype(dtype)), mx.full((ROWS,), position, dtype=mx.int32))
        spread = max(spread, _worst(turned, turned[:1]))
    single = _rope(mx.contiguous(rows), position)
    x = np.array(rows, dtype=np.float64)[..., : WIDTH // 2], np.array(rows, dtype=np.float64)[..., WIDTH // 2 :]
    angle = position * 10_000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    cosine, sine = np.cos(angle), np.sin(angle)
    exact = np.concatenate([x[0] * cosine - x[1] * sine, x[0] * sine + x[1] * cosine], axis=-1)
    error = float(np.max(np.abs(np.array(single) - exact)))
    return spread == 0 and error < 1e-4, f"rows differ by {spread:g}, formula by {error:.1e}"


def rope_offsets() -> tuple[bool, str]:
    """Rows at different positions: each as if it were alone."""
    rows, positions = _noise(ROWS, HEADS, 1, WIDTH, seed=2), [5 * k for k in range(ROWS)]
    together = _rope(rows, mx.array(positions, dtype=mx.int32))
    alone = mx.concatenate([_rope(rows[k : k + 1], position) for k, position in enumerate(positions)])
    worst = _worst(together, alone)
    return worst < 1e-5, f"differs from each alone by {worst:.1e}"


def attention_rows() -> tuple[bool, str]:
    """One query in each of 8 rows of different lengths over one block: each row as if it were alone."""
    columns = 32
    queries = _noise(ROWS, HEADS, 1, WIDTH, seed=11)
    keys, values = (_noise(ROWS, HEADS, columns, WIDTH, seed=seed) for seed in (12, 13))
    lengths = [columns - 3 * k for k in range(ROWS)]
    mask = (mx.arange(columns)[None] < mx.array(lengths)[:, None])[:, None, None]
    scale = WIDTH**-0.5
    together = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    alone = [
        mx.fast.scaled_dot_product_attention(
            queries[r : r + 1], keys[r : r + 1, :, :n], values[r : r + 1, :, :n], scale=scale
        )
        for r, n in enumerate(lengths)
    ]
    worst = _worst(together, mx.concatenate(alone))
    # Metal and CUDA may multiply float32 at reduced precision; a wrong row is off by the order of one.
    return worst < 5e-3, f"differs from each alone by {worst:.1e}"


def scatter_rows() -> tuple[bool, str]:
    """A token written into every row at its own column lands there and nowhere else."""
    columns = 16
    block, token = _noise(ROWS, HEADS, columns, WIDTH, seed=3), _noise(ROWS, HEADS, WIDTH, seed=4)
    expected, places = np.array(block), [(3 * k) % columns for k in range(ROWS)]
    for row, column in enumerate(places):
        expected[row, :, column] = np.array(token[row])
    block[mx.arange(ROWS), :, mx.array(places)] = token
    wrong = int(np.sum(np.array(block) != expected))
    return wrong == 0, f"{wrong} of {expected.size} values wrong"


def _adapters(layers: _Layers, places: tuple[str, ...]) -> tuple[bool, str]:
    """Versions mixed by row, and one for all rows, on the layers at such places: each as by plain products."""
    # A CPU serves float32 alone.
    dtypes = (mx.float32,) if mx.default_device() == mx.cpu else (mx.float32, mx.bfloat16)
    faults = []
    for dtype in dtypes:
        layers.set_dtype(dtype)
        found = check_adapters(layers, adaptable_layers(layers), dtype)
        faults += [fault for place, fault in found.items() if place in places]
    return not faults, " ".join(faults) or f"as plain products in {len(dtypes)} precisions"


def linear_adapters() -> tuple[bool, str]:
    """Adapters on linear layers of even and odd widths."""
    return _adapters(_Layers(), ("linear",))


def embedding_adapters() -> tuple[bool, str]:
    """Adapters on an embedding and on the head that shares its weight."""
    return _adapters(_Layers(), ("tied_embedding", "tied_head"))


def expert_adapters() -> tuple[bool, str]:
    """Adapters on stacked experts, plain and quantised, few tokens and so many that they are sorted."""
    plain, detail = _adapters(_Layers(), ("experts",))
    layers = _Layers()
    nn.quantize(layers, group_size=32, bits=4, class_predicate=lambda _, layer: isinstance(layer, SwitchLinear))
    packed, of_packed = _adapters(layers, ("experts",))
    return plain and packed, detail if plain == packed else f"{detail}; quantised: {of_packed}"


def sampler() -> tuple[bool, str]:
    """Draws, log-probabilities and kept mass under every filter, against numpy."""
    fault = check_sampler(32_768, mx.float32, ROWS)
    return fault is None, fault or "as numpy computes it in float64"


def log_softmax() -> tuple[bool, str]:
    """Log-probabilities of bfloat16 logits, upcast first, sum to one."""
    logits = (4 * _noise(ROWS, 32_768, seed=8)).astype(mx.bfloat16).astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), dtype=np.float64)
    error = float(np.max(np.abs(np.exp(logprobs).sum(axis=-1) - 1)))
    return error < 1e-3, f"probabilities sum to one within {error:.1e}"


def float32_product() -> tuple[bool, str]:
    """A float32 matrix product against float64: says whether the device rounds its inputs (TF32 and the like)."""
    left, right = _noise(256, 256, seed=9), _noise(256, 256, seed=10)
    exact = np.array(left, dtype=np.float64) @ np.array(right, dtype=np.float64)
    error = float(np.max(np.abs(np.array(left @ right) - exact)) / np.max(np.abs(exact)))
    kind = "full float32" if error < 1e-5 else "reduced precision, log-probabilities will differ from a trainer's"
    return error < 1e-2, f"relative error {error:.1e}: {kind}"


CHECKS: tuple[tuple[str, Callable[[], tuple[bool, str]]], ...] = (
    ("RoPE, equal rows", rope_rows),
    ("RoPE, rows at their own positions", rope_offsets),
    ("attention, rows of different lengths", attention_rows),
    ("scatter into rows", scatter_rows),
    ("adapters on linear layers", linear_adapters),
    ("adapters on embeddings", embedding_adapters),
    ("adapters on stacked experts", expert_adapters),
    ("the sampler", sampler),
    ("log-softmax", log_softmax),
    ("float32 product", float32_product),
)
