"""What a trainer wants to know of an adapter it pushed: how large its deltas are, where, of which rank in effect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.bundle import AdapterBundle
from adapters.numerics import thinned
from adapters.spec import HALVES

LARGEST = 5
TINY = float(np.finfo(np.float64).tiny)
"""Instead of a largest value of zero, as an expert that nothing was routed to has."""


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What is told of one layer's ΔW, or of a whole tensor's."""

    module: str
    delta_norm: float
    """Frobenius."""
    effective_rank: float | None
    """exp of the entropy of the singular values of scale · B · A, from 1 to the rank; None where that is zero or there
    is none."""


@dataclass(frozen=True, slots=True)
class BundleReport:
    modules: int
    """Low-rank ones."""
    dense: int
    """Whole tensors."""
    delta_norm: float | None
    """Frobenius norm of all deltas together; None where none is known."""
    effective_rank: float | None
    """Mean over the modules that have one."""
    largest_modules: tuple[ModuleReport, ...]
    """Modules by delta norm, largest first; those that are zero are never among them."""
    zero_modules: tuple[str, ...]
    nbytes: int
    ranks: Mapping[str, float]
    """Effective rank of each module that has one."""


def report(bundle: AdapterBundle) -> BundleReport:
    """The report as far as the file tells: of DoRA the low-rank part, of tensors in place of the base's nothing. See
    `completed`."""
    return _report(bundle, effective_ranks(bundle), _norms(bundle))


def completed(first: BundleReport, bundle: AdapterBundle, changes: Mapping[str, float]) -> BundleReport:
    """The report with ‖W' − W‖ in place of what the file says, for the modules and tensors in `changes`."""
    if not changes:
        return first
    return _report(bundle, first.ranks, _norms(bundle) | dict(changes))


def delta_norm(bundle: AdapterBundle, changes: Mapping[str, float]) -> float | None:
    """The report's ‖ΔW‖ and nothing else of it: the Frobenius norm of all deltas together, of those in `changes` the
    one that staging found; None where none is known."""
    norms = _norms(bundle) | dict(changes)
    return math.sqrt(sum(norm**2 for norm in norms.values())) if norms else None


def _norms(bundle: AdapterBundle) -> dict[str, float]:
    """Norms of what the file adds; one that only underflowed is not the 0 of a module that adds nothing."""
    return {path: 0.0 if known.zero else max(known.norm, TINY) for path, known in bundle.measures.items()}


def _report(bundle: AdapterBundle, ranks: Mapping[str, float], all_norms: Mapping[str, float]) -> BundleReport:
    still = {path for path, norm in all_norms.items() if norm == 0}
    norms = {path: norm for path, norm in all_norms.items() if path not in still}
    largest = sorted(norms, key=lambda path: (-norms[path], path))[:LARGEST]
    return BundleReport(
        modules=len(bundle.spec.modules),
        dense=len(bundle.spec.dense),
        delta_norm=math.sqrt(sum(norm**2 for norm in all_norms.values())) if all_norms else None,
        effective_rank=sum(ranks.values()) / len(ranks) if ranks else None,
        largest_modules=tuple(ModuleReport(path, norms[path], ranks.get(path)) for path in largest),
        zero_modules=tuple(path for path in all_norms if path in still),
        nbytes=bundle.nbytes,
        ranks=ranks,
    )


def effective_ranks(bundle: AdapterBundle) -> dict[str, float]:
    """The effective rank of every module whose delta is a product and not zero (Roy and Vetterli, EUSIPCO 2007); the
    mean over the experts of a stack.

    The singular values of B · A are those of a rank × rank matrix, so products of one rank are done together."""
    by_rank: dict[int, list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]] = {}
    for path, measure in bundle.measures.items():
        if not measure.zero and f"{path}.lora_A" in bundle.tensors:
            a, b = _factors(bundle, path)
            by_rank.setdefault(a.shape[1], []).append((path, a @ a.swapaxes(1, 2), b.swapaxes(1, 2) @ b))
    found: dict[str, float] = {}
    for modules in by_rank.values():
        ranks = _effective(
            _squared_singular_values(
                np.concatenate([gram for _, gram, _ in modules]), np.concatenate([gram for _, _, gram in modules])
            )
        )
        ends = np.cumsum([len(gram) for _, gram, _ in modules])
        for (path, _, _), own in zip(modules, np.split(ranks, ends[:-1]), strict=True):
            if np.isfinite(own).any():
                found[path] = float(own[np.isfinite(own)].mean())
    return dict(sorted(found.items()))


def _factors(bundle: AdapterBundle, path: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A [experts or 1, rank, in] and B [experts or 1, out, rank], the rank at most min(out, in). Scaled to the largest
    value of each: the shares of singular values stay, and small float32 deltas do not vanish when squared."""
    a, b = (bundle.tensors[f"{path}.{half}"].float32().astype(np.float64) for half in HALVES)
    thin = thinned(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
    a, b = (factor / np.maximum(np.abs(factor).max(axis=(1, 2), keepdims=True), TINY) for factor in thin)
    return a, b


def _squared_singular_values(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared singular values of B · A from A · Aᵀ and Bᵀ · B, both [modules, rank, rank] → [modules, rank]. With A ·
    Aᵀ = S · Sᵀ they are the eigenvalues of Sᵀ · (Bᵀ · B) · S."""
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
