"""Top-k, top-p and min-p of a whole batch by one kernel of our own on a GPU, one block of threads a row.

It finds the number that `filters` finds, the smallest weight that stays, from the bits of the weights: floats in [0, 1]
are ordered as integers of 30 bits. Three passes over a row take 11, 10 and 9 of them, from the top. Each counts what
the weights with one digit come to, their number for top-k and their mass for top-p, and steps into the digit in which
the goal is reached. Top-p after top-k is three passes more, over what top-k left. No row takes more passes than another
that asks for the same, though few distinct weights take longer: additions to one digit wait for each other.

A mass here is an integer: a weight counts ⌊w · 2⁴⁴⌋. So sums are exact whatever order threads add in, and the same
logits always keep the same tokens. A token stays if the mass of the more probable ones is less than P · 2⁻³² of what
top-k left, where P is ⌈top_p · 2³²⌉. `descend` and `bisect` add float32 numbers instead: where no sum of theirs is
rounded all three keep the same tokens, and else they may differ by tokens whose mass is within the rounding of those
sums of top_p (2e-6 of the whole; here it is 2⁻²⁶). `least_kept` says the same in numpy.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from adapters.kernels.text import INDICES, Compiler, Device, Launch, compile_kernel, macros
from rollout_server.engine.sampling.filters import ONE_BITS
from rollout_server.rollout import SamplingParams

MOST_TOKENS = 1 << 18
"""Tokens that a row may have: their masses then add up to 62 bits at most."""
THREADS = 512
SHARE_BITS = 32
TAKEN = frozenset({"top_k", "top_p", "min_p"})
COLUMNS = 4
"""Numbers a row in the limits, uint32: top_k (0: off), P (0: off), the bits of min_p, nothing."""

FUNCTIONS = """
typedef unsigned int U32;
#define DIGITS 2048
#define GROUP 32
#define ONE 0x3F800000u

struct RowTally {
  // What the weights with each digit come to: what does not fit 32 bits is carried, since Metal adds no more at once.
  COUNTER low[DIGITS];
  COUNTER high[DIGITS];
  COUNTER strange;
  U64 groups[DIGITS / GROUP];
  U64 goal;
  U64 above;
  U32 prefix;
};

// NaN is the largest weight; what is negative weighs nothing.
FN U32 key_of(U32 bits) {
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return ONE;
  return bits >> 31 ? 0u : (bits < ONE ? bits : ONE);
}

// floor(weight * 2^44) in units of its own exponent, at most 24 bits: below 2^-21 the unit is 1.
FN U32 mass_of(U32 key) {
  const U32 below = 127u - (key >> 23);
  const U32 lost = below < 21u ? 0u : below - 21u;
  return ((key & 0x7FFFFFu) | 0x800000u) >> (lost < 31u ? lost : 31u);
}

// Weights with one digit have one exponent, and so one unit.
template <bool RANK, int SHIFT, int WIDTH>
FN U64 tallied(IN_SHARED RowTally& tally, U32 prefix, int digit) {
  const U64 sum = ((U64)LOAD(tally.high[digit]) << 32) + LOAD(tally.low[digit]);
  const U32 below = 127u - ((((prefix << WIDTH) | (U32)digit) << SHIFT) >> 23);
  return RANK || below >= 21u ? sum : sum << (21u - below);
}

template <bool RANK, int SHIFT, int WIDTH>
FN void tally_weight(IN_SHARED RowTally& tally, U32 bits, U32 least, U32 prefix) {
  const U32 key = key_of(bits);
  if (key == 0u || key < least || (key >> (SHIFT + WIDTH)) != prefix) return;
  const U32 digit = (key >> SHIFT) & ((1u << WIDTH) - 1u);
  if (RANK) {
    ADD(tally.low[digit], 1u);
    return;
  }
  if (key == ONE && bits != ONE) STORE(tally.strange, 1u);
  const U32 mass = mass_of(key);
  if (mass != 0u && ADD(tally.low[digit], mass) > 0xFFFFFFFFu - mass) ADD(tally.high[digit], 1u);
}

template <bool RANK, int SHIFT, int WIDTH, int VOCABULARY, int THREADS>
FN void tally_row(IN_SHARED RowTally& tally, const DEVICE U32* row, int tid, U32 least, U32 prefix) {
  if (VOCABULARY % 4 != 0) {
    for (int at = tid; at < VOCABULARY; at += THREADS) {
      tally_weight<RANK, SHIFT, WIDTH>(tally, row[at], least, prefix);
    }
    return;
  }
  // Four loads of each thread are under way at once; 0 weighs nothing.
  const DEVICE uint4* fours = (const DEVICE uint4*)row;
  for (int start = tid; start < VOCABULARY / 4; start += 4 * THREADS) {
    uint4 read[4];
    for (int turn = 0; turn < 4; turn++) {
      const int at = start + turn * THREADS;
      read[turn].x = read[turn].y = read[turn].z = read[turn].w = 0u;
      if (at < VOCABULARY / 4) read[turn] = fours[at];
    }
    for (int turn = 0; turn < 4; turn++) {
      tally_weight<RANK, SHIFT, WIDTH>(tally, read[turn].x, least, prefix);
      tally_weight<RANK, SHIFT, WIDTH>(tally, read[turn].y, least, prefix);
      tally_weight<RANK, SHIFT, WIDTH>(tally, read[turn].z, least, prefix);
      tally_weight<RANK, SHIFT, WIDTH>(tally, read[turn].w, least, prefix);
    }
  }
}

// Where the goal is known, or is to be known from all that was tallied. One thread runs it.
template <bool RANK, int SHIFT, int WIDTH>
FN void step_into_digit(IN_SHARED RowTally& tally, U32 wanted) {
  const int count = (1 << WIDTH) / GROUP;
  if (SHIFT + WIDTH == 30) {
    U64 total = 0;
    for (int group = 0; group < count; group++) total += tally.groups[group];
    // ceil(total * wanted / 2^32), in two parts of 64 bits.
    const U64 share = (total >> 32) * wanted + (((total & 0xFFFFFFFFu) * (U64)wanted + 0xFFFFFFFFu) >> 32);
    tally.goal = RANK ? (U64)wanted : share;
    tally.above = 0;
    tally.prefix = 0u;
    // Not so many weigh anything: then all stay, which a goal of nothing says.
    if (total < tally.goal) tally.goal = 0;
  }
  if (tally.goal == 0) return;
  int group = count - 1;
  U64 above = tally.above;
  for (; group > 0 && above + tally.groups[group] < tally.goal; group--) above += tally.groups[group];
  int digit = group * GROUP + GROUP - 1;
  for (; digit > group * GROUP; digit--) {
    const U64 sum = tallied<RANK, SHIFT, WIDTH>(tally, tally.prefix, digit);
    if (above + sum >= tally.goal) break;
    above += sum;
  }
  tally.above = above;
  tally.prefix = (tally.prefix << WIDTH) | (U32)digit;
}

template <bool RANK, int SHIFT, int WIDTH, int VOCABULARY, int THREADS>
FN void read_digits(IN_SHARED RowTally& tally, const DEVICE U32* row, int tid, U32 wanted, U32 least) {
  const U32 prefix = SHIFT + WIDTH == 30 ? 0u : tally.prefix;
  for (int digit = tid; digit < 1 << WIDTH; digit += THREADS) {
    STORE(tally.low[digit], 0u);
    STORE(tally.high[digit], 0u);
  }
  BARRIER();
  tally_row<RANK, SHIFT, WIDTH, VOCABULARY, THREADS>(tally, row, tid, least, prefix);
  BARRIER();
  for (int group = tid; group < (1 << WIDTH) / GROUP; group += THREADS) {
    U64 sum = 0;
    // Each begins at another digit, so that threads do not wait for one bank of memory.
    for (int turn = 0; turn < GROUP; turn++) {
      sum += tallied<RANK, SHIFT, WIDTH>(tally, prefix, group * GROUP + (turn + group) % GROUP);
    }
    tally.groups[group] = sum;
  }
  BARRIER();
  if (tid == 0) step_into_digit<RANK, SHIFT, WIDTH>(tally, wanted);
  BARRIER();
}

// The largest key down to which the weights come to what is wanted: so many, or that share of all from `least` on.
template <bool RANK, int VOCABULARY, int THREADS>
FN U32 find_edge(IN_SHARED RowTally& tally, const DEVICE U32* row, int tid, U32 wanted, U32 least) {
  read_digits<RANK, 19, 11, VOCABULARY, THREADS>(tally, row, tid, wanted, least);
  if (tally.goal == 0) return 0u;
  read_digits<RANK, 9, 10, VOCABULARY, THREADS>(tally, row, tid, wanted, least);
  read_digits<RANK, 0, 9, VOCABULARY, THREADS>(tally, row, tid, wanted, least);
  return tally.prefix;
}

// What `weights * (weights >= edge)` is.
FN U32 kept_of(U32 bits, U32 edge) {
  return (bits & 0x7FFFFFFFu) > 0x7F800000u || bits >= edge ? bits : 0u;
}
"""

BODY = string.Template(
    """
  const int tid = $thread;
  const U64 place = $block_x;
  SHARED RowTally tally;
  const DEVICE U32* row = weights + place * VOCABULARY;
  DEVICE U32* result = kept + place * VOCABULARY;
  const U32 rank = limits[4 * place];
  const U32 share = limits[4 * place + 1];
  const U32 floor_bits = limits[4 * place + 2];
  if (tid == 0) STORE(tally.strange, 0u);
  U32 edge = 0u;
  if (rank != 0u) edge = find_edge<true, VOCABULARY, THREADS>(tally, row, tid, rank, 0u);
  if (share != 0u) {
    const U32 crossing = find_edge<false, VOCABULARY, THREADS>(tally, row, tid, share, edge);
    edge = crossing > edge ? crossing : edge;
    // A share of what is no number is reached nowhere.
    if (LOAD(tally.strange) != 0u) edge = ONE;
  }
  if (floor_bits > edge) edge = floor_bits;
  if (tid == 0) least[place] = edge;
  if (VOCABULARY % 4 != 0) {
    for (int at = tid; at < VOCABULARY; at += THREADS) result[at] = kept_of(row[at], edge);
  } else {
    for (int at = tid; at < VOCABULARY / 4; at += THREADS) {
      uint4 four = ((const DEVICE uint4*)row)[at];
      four.x = kept_of(four.x, edge);
      four.y = kept_of(four.y, edge);
      four.z = kept_of(four.z, edge);
      four.w = kept_of(four.w, edge);
      ((DEVICE uint4*)result)[at] = four;
    }
  }
"""
)

COUNTERS: dict[Device, str] = {
    "cuda": """
#define U64 unsigned long long
#define COUNTER unsigned int
#define ADD(cell, value) atomicAdd(&(cell), value)
#define LOAD(cell) (cell)
#define STORE(cell, value) (cell) = (value)
""",
    "metal": """
#define U64 ulong
#define COUNTER metal::atomic_uint
#define ADD(cell, value) metal::atomic_fetch_add_explicit(&(cell), value, metal::memory_order_relaxed)
#define LOAD(cell) metal::atomic_load_explicit(&(cell), metal::memory_order_relaxed)
#define STORE(cell, value) metal::atomic_store_explicit(&(cell), value, metal::memory_order_relaxed)
""",
}


def build_kernel(device: Device, compiler: Compiler = compile_kernel) -> Launch:
    """Its text is compiled when it first runs. Raises RuntimeError where MLX has no such GPU."""
    body = BODY.substitute(INDICES[device])
    header = macros(device) + COUNTERS[device] + FUNCTIONS
    return compiler(device, "row_filters", ["weights", "limits"], ["kept", "least"], body, header)


@dataclass(frozen=True, slots=True, eq=False)
class FilterKernel:
    """A compiled kernel, and how many threads share a row."""

    launch: Launch
    threads: int = THREADS
    taken: frozenset[str] = TAKEN
    """The filters that its text has."""

    def __call__(self, weights: mx.array, limits: mx.array) -> tuple[mx.array, mx.array]:
        """float32 weights [R, V] and `limits_of` R rows → the weights with 0 for those that do not stay [R, V], and
        the smallest that stays [R, 1]; 0 where all do, 1 where a row with top-p holds NaN."""
        rows, vocabulary = weights.shape
        kept, least = self.launch(
            inputs=[weights.view(mx.uint32), limits],
            template=[("VOCABULARY", vocabulary), ("THREADS", self.threads)],
            grid=(rows * self.threads, 1, 1),
            threadgroup=(self.threads, 1, 1),
            output_shapes=[(rows, vocabulary), (rows, 1)],
            output_dtypes=[mx.uint32, mx.uint32],
        )
        return kept.view(mx.float32), least.view(mx.float32)

    def takes(self, rows: Sequence[SamplingParams | None]) -> bool:
        """Returns whether it has every filter of some rows; `filters` has them all."""
        return all(row is None or self.taken.issuperset(row.filters) for row in rows)

    def prepare(self, rows: Sequence[SamplingParams | None], vocabulary: int) -> KernelFilters | None:
        """None if no row filters."""
        filtered = [row is not None and row.filtered for row in rows]
        if not any(filtered):
            return None
        return KernelFilters(mx.array(filtered), mx.array(limits_of(rows, vocabulary)), self)


@dataclass(frozen=True, slots=True, eq=False)
class KernelFilters:
    """What the rows of a batch filter by, as the kernel reads it."""

    filtered: mx.array
    """bool [R]."""
    limits: mx.array
    """uint32 [R, 4], see `COLUMNS`."""
    kernel: FilterKernel

    def keep(self, weights: mx.array, total: mx.array) -> mx.array:
        """`Filters.keep`; the kernel sums by itself."""
        return self.kernel(weights, self.limits)[0]


def limits_of(rows: Sequence[SamplingParams | None], vocabulary: int) -> np.ndarray:
    """uint32 [R, 4], zeros for rows that do not filter."""
    limits = np.zeros((len(rows), COLUMNS), dtype=np.uint32)
    for place, row in enumerate(rows):
        if row is not None and row.filtered:
            limits[place, 0] = row.top_k if row.top_k < vocabulary else 0
            limits[place, 1] = min(math.ceil(row.top_p * 2**SHARE_BITS), 2**SHARE_BITS - 1) if row.top_p < 1 else 0
            limits[place, 2] = np.float32(row.min_p + 0.0).view(np.uint32)  # −0 is 0
    return limits


def least_kept(weights: np.ndarray, limits: np.ndarray) -> np.float32:
    """The definition: the smallest weight that stays of one row's float32 weights [V], under its limits uint32 [4].
    By sorting, where the kernel goes digit by digit."""
    bits = weights.view(np.uint32)
    keys = np.where(bits >> 31, 0, np.minimum(bits, ONE_BITS))
    keys[np.isnan(weights)] = ONE_BITS
    keys = np.sort(keys[keys > 0])[::-1].astype(np.uint64)
    top_k, share, least = (int(limit) for limit in limits[:3])
    edge = int(keys[top_k - 1]) if 0 < top_k <= len(keys) else 0
    keys = keys[keys >= edge]
    if share:
        exponents = 127 - (keys >> np.uint64(23))
        masses = ((keys & 0x7FFFFF) | 0x800000) << np.uint64(21) >> np.minimum(exponents, 63)
        running = np.cumsum(masses)
        goal = -(-int(running[-1]) * share >> SHARE_BITS) if len(keys) else 0
        if goal:
            edge = int(keys[np.searchsorted(running, np.uint64(goal))])
        edge = ONE_BITS if np.isnan(weights).any() else edge
    return np.uint32(max(edge, least)).view(np.float32)
