"""What a trainer wants to know of an adapter it pushed: how large its deltas are, where, of which rank in effect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.bundle import AdapterBundle, grams_of
from adapters.numerics import Grams

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


def report(bundle: AdapterBundle, grams: Mapping[str, Grams] | None = None) -> BundleReport:
    """The report as far as the file tells: of DoRA the low-rank part, of tensors in place of the base's nothing. See
    `completed`. `grams` are those of `measured`, where they are still there."""
    return _report(bundle, effective_ranks(bundle, grams_of(bundle) if grams is None else grams), _norms(bundle))


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


def effective_ranks(bundle: AdapterBundle, grams: Mapping[str, Grams]) -> dict[str, float]:
    """The effective rank of every module whose delta is a product and not zero (Roy and Vetterli, EUSIPCO 2007); the
    mean over the experts of a stack.

    The singular values of B · A are those of a rank × rank matrix, so products of one rank are done together."""
    by_rank: dict[int, list[tuple[str, Grams]]] = {}
    for path, both in grams.items():
        if not bundle.measures[path].zero:
            stacks = Grams(*(gram.reshape(-1, *gram.shape[-2:]) for gram in both))
            by_rank.setdefault(stacks.a.shape[1], []).append((path, stacks))
    found: dict[str, float] = {}
    for modules in by_rank.values():
        halves = zip(*(stacks for _, stacks in modules), strict=True)
        ranks = _effective(_squared_singular_values(*(_scaled(np.concatenate(half)) for half in halves)))
        begins = np.cumsum([0, *(len(stacks.a) for _, stacks in modules[:-1])])
        known = np.isfinite(ranks)
        count = np.add.reduceat(known, begins, dtype=np.intp)
        means = np.add.reduceat(np.where(known, ranks, 0.0), begins) / np.maximum(count, 1)
        of_each = zip(modules, means.tolist(), count.tolist(), strict=True)
        found |= {path: mean for (path, _), mean, of in of_each if of}
    return dict(sorted(found.items()))


def _scaled(grams: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each divided by its largest value: the shares of singular values stay, and products of small ones do not
    vanish."""
    largest: NDArray[np.float64] = np.abs(grams).max(axis=(1, 2), keepdims=True)
    return grams / np.maximum(largest, TINY)


def _squared_singular_values(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared singular values of B · A from A · Aᵀ and Bᵀ · B, both [modules, rank, rank] → [modules, rank]. With A ·
    Aᵀ = S · Sᵀ they are the eigenvalues of Sᵀ · (Bᵀ · B) · S."""
    try:
        root = np.linalg.cholesky(a)
    except np.linalg.LinAlgError:  # A of one of them has rows that depend on each other; this takes many times as long.
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
