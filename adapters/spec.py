"""What an adapter is, before any tensor: its kind, and the rank and scale of every layer it changes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from adapters.errors import SHOWN_CHARACTERS, AdapterUnreadable, shown

Kind = Literal["lora", "dora", "delta", "full"]
DENSE_KINDS = ("delta", "full")
"""Without low-rank parts: tensors that are added to the base's parameters, or that take their place."""
Mode = Literal["adapter", "merged"]
"""Low-rank parts in their slot, or everything as parameters of its own."""
Place = Literal["linear", "embedding", "tied_embedding", "tied_head", "experts"]
"""A linear layer, an embedding, one whose weight is also the head's, that head, or stacked experts."""

HeadTask = Literal["classify", "token_classify"]
"""What a head scores: whole sequences, or tokens."""
HEAD_MODULES = ("score", "classifier")
"""What transformers and PEFT call the module of a head."""

HALVES = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude_vector"
MAX_RANK = 1 << 20
SHOWN_FIELDS = 5


class EmbeddingShape(NamedTuple):
    """The shape of a table [width = vocabulary, out]."""

    out: int
    width: int


class TiedEmbeddingShape(NamedTuple):
    """The shape of a table whose values are the head's weight as well."""

    out: int
    width: int


class TiedHeadShape(NamedTuple):
    """The shape of a head that has no weight of its own. Its path is `TIED_HEAD`, though the model has no such
    layer."""

    out: int
    width: int


class ExpertsShape(tuple[int, int]):
    """The shape of each of `experts` linear layers in one stack; A is [experts, rank, in] and B [experts, out,
    rank]."""

    experts: int

    def __new__(cls, out: int, width: int, experts: int) -> ExpertsShape:
        shape = super().__new__(cls, (out, width))
        shape.experts = experts
        return shape


TIED_HEAD = "lm_head"


def experts_of(shape: tuple[int, int]) -> tuple[int, ...]:
    """The leading dimension of A and B: (experts,), or () for all but stacks of experts."""
    return (shape.experts,) if isinstance(shape, ExpertsShape) else ()


def place_of(shape: tuple[int, int]) -> Place:
    """A plain tuple is the shape of a linear layer."""
    match shape:
        case EmbeddingShape():
            return "embedding"
        case TiedEmbeddingShape():
            return "tied_embedding"
        case TiedHeadShape():
            return "tied_head"
        case ExpertsShape():
            return "experts"
    return "linear"


def ends(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c`: what names a layer, or a pattern may match of its name."""
    yield name
    yield from (name[dot.end() :] for dot in re.finditer(r"\.", name))


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One adapted layer: V = W + scale · B · A with A [rank, in] and B [out, rank]. `scale` is a float32 value.

    W' = V for LoRA; for DoRA (arXiv 2402.09353) each row of V is brought to the length that a magnitude [out] says.
    An embedding is a layer from tokens to values: W [values, vocabulary] is its table transposed, as PEFT has it."""

    rank: int
    scale: float
    place: Place = "linear"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of the base's parameters. A quantised one has its unpacked shape, and the dtype of the activations."""

    shape: tuple[int, ...]
    dtype: str
    """`float32`, `float16` or `bfloat16`, as mlx calls it."""
    quantised: bool = False


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a base says to heads."""

    width: int = 0
    """Numbers in a hidden state; 0 where a head cannot read them."""
    task: HeadTask | None = None
    """What the base's own head scores; None for a base that generates."""
    whole: bool = False
    """The base's head is parameters like its others, so that a version's tensors take their place by name."""


NO_SCORING = Scoring()
"""What a base says that no head can read."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """`modules` maps the base's parameter path of each adapted layer (without `.weight`) to its rank and scale."""

    kind: Kind
    modules: Mapping[str, ModuleSpec]
    dense: tuple[str, ...] = ()
    """Parameter paths (with `.weight`) of whole tensors: added to the base's for kind `delta`, else in their place,
    and there below the low-rank parts. The head that shares its weight is `lm_head.weight`."""
    head: tuple[str, ...] = ()
    """Names of the tensors that score labels in the place of the output layer, or of the base's own head."""
    task: HeadTask | None = None
    """What they score; None where there are none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))
        object.__setattr__(self, "dense", tuple(sorted(self.dense)))
        object.__setattr__(self, "head", tuple(sorted(self.head)))

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How it can be served, the usual way first."""
        return ("merged",) if self.kind in DENSE_KINDS else ("adapter", "merged")

    @property
    def parts(self) -> tuple[str, ...]:
        """What every module has a tensor for."""
        return (*HALVES, MAGNITUDE) if self.kind == "dora" else HALVES


def lora_scale(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """alpha / rank, or alpha / √rank (rsLoRA, arXiv 2312.03732), divided in float64 and rounded to float32."""
    return to_float32(alpha / (math.sqrt(rank) if rank_stabilised else rank))


def to_float32(value: float) -> float:
    """The float32 nearest to `value`, as a Python float. Raises `AdapterUnreadable` where there is no finite one."""
    if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        raise AdapterUnreadable(f"The adapter's scale would be {value}, which is not a finite float32.")
    return float(np.float32(value))


def fields_shown(fields: Mapping[str, object]) -> str:
    """The first of a stranger's fields with their values, and how many more there are."""
    first = ", ".join(f"{quoted(name)} = {quoted(value)}" for name, value in islice(fields.items(), SHOWN_FIELDS))
    return f"{first} and {len(fields) - SHOWN_FIELDS} more" if len(fields) > SHOWN_FIELDS else first


def quoted(value: object) -> str:
    """A value that a stranger sent, as JSON tells it: text in quotes, so that '4' is not taken for 4; cut when very
    long."""
    try:
        return shown(_quoted(value))
    except RecursionError:
        return "something deeply nested"


def _quoted(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"'{shown(value)}'"
        case int() if abs(value) >= 10**SHOWN_CHARACTERS:
            return f"a number of more than {SHOWN_CHARACTERS} digits"
        case list() | tuple() | set() | frozenset():
            return f"[{', '.join(map(_quoted, _first(value)))}]"
        case Mapping():
            return f"{{{', '.join(f'{_quoted(k)}: {_quoted(v)}' for k, v in _first(value.items()))}}}"
    return str(value)


def _first(values: Iterable[Any]) -> Iterator[Any]:
    """The first values of many; more would not be shown."""
    return islice(values, SHOWN_CHARACTERS)
