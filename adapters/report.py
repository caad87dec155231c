"""What a trainer wants to know of an adapter it pushed: how large its deltas are, where, of which rank in effect."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.bundle import AdapterBundle

LARGEST = 5


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """Of one layer's ΔW = scale · B · A, or of a whole tensor that is added to the base's."""

    module: str
    delta_norm: float
    """Frobenius."""
    effective_rank: float | None
    """exp of the entropy of its singular values, from 1 to the rank; None where ΔW is zero or has no factors."""


@dataclass(frozen=True, slots=True)
class BundleReport:
    modules: int
    """Low-rank ones."""
    dense: int
    """Whole tensors."""
    delta_norm: float | None
    """Frobenius norm of all deltas together; None where there are only tensors in place of the base's."""
    effective_rank: float | None
    """Mean over the modules that have one."""
    largest_modules: tuple[ModuleReport, ...]
    """By delta norm, largest first; zero ones are never among them."""
    zero_modules: tuple[str, ...]
    nbytes: int


def report(bundle: AdapterBundle) -> BundleReport:
    ranks = effective_ranks(bundle)
    norms = {path: measure.norm for path, measure in bundle.measures.items() if not measure.zero}
    largest = sorted(norms, key=lambda path: (-norms[path], path))[:LARGEST]
    return BundleReport(
        modules=len(bundle.spec.modules),
        dense=len(bundle.spec.dense),
        delta_norm=bundle.delta_norm if bundle.measures else None,
        effective_rank=sum(ranks.values()) / len(ranks) if ranks else None,
        largest_modules=tuple(ModuleReport(path, norms[path], ranks.get(path)) for path in largest),
        zero_modules=bundle.zero_modules,
        nbytes=bundle.nbytes,
    )


def effective_ranks(bundle: AdapterBundle) -> dict[str, float]:
    """Of every module whose delta is a product and not zero (Roy and Vetterli, EUSIPCO 2007).

    The singular values of B · A are those of a rank × rank matrix, so modules of one rank are done together."""
    by_rank: dict[int, list[str]] = {}
    for path, measure in bundle.measures.items():
        if not measure.zero and f"{path}.lora_A" in bundle.tensors:
            by_rank.setdefault(bundle.spec.modules[path].rank, []).append(path)
    found: dict[str, float] = {}
    for paths in by_rank.values():
        squares = _squared_singular_values(
            np.stack([_gram(bundle, path, "lora_A") for path in paths]),
            np.stack([_gram(bundle, path, "lora_B") for path in paths]),
        )
        found |= dict(zip(paths, _effective(squares).tolist(), strict=True))
    return {path: rank for path, rank in sorted(found.items()) if np.isfinite(rank)}


def _gram(bundle: AdapterBundle, path: str, half: str) -> NDArray[np.float64]:
    """A · Aᵀ or Bᵀ · B, [rank, rank]. Scaled to its largest value first: the shares of singular values stay, and small
    float32 deltas do not vanish when squared."""
    factor = bundle.tensors[f"{path}.{half}"].float32().astype(np.float64)
    factor /= np.abs(factor).max()
    return factor @ factor.T if half == "lora_A" else factor.T @ factor


def _squared_singular_values(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of B · A from A · Aᵀ and Bᵀ · B, both [modules, rank, rank] → [modules, rank]. With A · Aᵀ = S · Sᵀ they are the
    eigenvalues of Sᵀ · (Bᵀ · B) · S."""
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    return np.maximum(np.linalg.eigvalsh(root.swapaxes(1, 2) @ b @ root), 0.0)


def _effective(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(−Σ p log p) with p the share of each singular value; NaN where all are zero."""
    # What rounding left of a zero: the root of it would count.
    squares = np.where(squares > 1e-13 * squares.max(axis=1, keepdims=True), squares, 0.0)
    singular = np.sqrt(squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = singular / singular.sum(axis=1, keepdims=True)
        entropy = -np.where(share > 0, share * np.log(share), 0.0 * share).sum(axis=1)
    return np.exp(entropy)
