"""What the messages hold that MessagePack does not know: arrays, errors, grammars, and shapes of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
import numpy as np

from adapters.spec import (
    EmbeddingShape,
    ExpertsShape,
    Place,
    TiedEmbeddingShape,
    TiedHeadShape,
    experts_of,
    place_of,
)
from adapters.tensors import STORAGE, frozen
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.errors import AdapterMismatch, EngineFault, PreconditionFailed, QueueFull, RolloutError
from rollout_server.grammar import Constraint, Follower, Grammar

Size = Annotated[int, msgspec.Meta(ge=0)]
Standing = tuple[str, tuple[Size, ...], Size]
"""How an array stands there: its dtype as numpy writes it, its shape, and where it begins."""
Compile = Callable[[Grammar], Constraint]
"""Makes a grammar ready for this process's tokenizer."""


@dataclass(frozen=True, slots=True)
class Uncompiled:
    """A grammar on its way: whoever reads it compiles it, since what is compiled belongs to one process."""

    grammar: Grammar

    def follow(self, token_ids: object) -> Follower:
        raise TypeError("A grammar that travels follows no row.")

    def accepted(self, token_ids: object) -> int:
        raise TypeError("A grammar that travels accepts no token.")


@dataclass(frozen=True, slots=True)
class ToldError:
    """An error of the tree as it travels: by the name of its class, which only classes of the tree have."""

    cls: str
    message: str
    param: str | None
    retryable: bool
    faults: tuple[str, ...] = ()
    at: tuple[str, int, str] | None = None
    retry_after_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Described:
    """A `ModelInfo` as it travels: shapes lose their class on the way, so each one that is no linear layer is named."""

    info: ModelInfo
    places: dict[str, tuple[Place, int]]
    """What each such layer is, and how many experts it has, by its path."""


def described(info: ModelInfo) -> Described:
    """A model's description, ready to travel."""
    special = {path: shape for path, shape in info.layers.items() if place_of(shape) != "linear"}
    places = {path: (place_of(shape), next(iter(experts_of(shape)), 0)) for path, shape in special.items()}
    return Described(replace(info, layers={path: (rows, width) for path, (rows, width) in info.layers.items()}), places)


def model_info(told: Described) -> ModelInfo:
    """What `described` was made of."""
    layers = dict(told.info.layers)
    for path, (place, experts) in told.places.items():
        layers[path] = _shape(place, *layers[path], experts)
    return replace(told.info, layers=layers)


def _shape(place: Place, out: int, width: int, experts: int) -> tuple[int, int]:
    match place:
        case "embedding":
            return EmbeddingShape(out, width)
        case "tied_embedding":
            return TiedEmbeddingShape(out, width)
        case "tied_head":
            return TiedHeadShape(out, width)
        case "experts":
            return ExpertsShape(out, width, experts)
    return out, width


class Arrays:
    """The arrays of one message, as they are in memory: they travel behind it, and are copied nowhere on their way."""

    ALIGNED = 8
    """Each begins at a multiple of so many bytes, so that whoever reads them reads numbers where they stand."""

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self.nbytes = 0

    def add(self, array: np.ndarray[Any, Any]) -> int:
        """Returns where it begins."""
        at, gap = self.nbytes, bytes(-array.nbytes % self.ALIGNED)
        self.parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, gap]
        self.nbytes += array.nbytes + len(gap)
        return at


def to_wire(arrays: Arrays, value: Any) -> Any:
    """What stands on the wire for a value that MessagePack does not know; for an array, where in `arrays` it is."""
    match value:
        case RolloutError():
            return told(value)
        case Mapping():
            return dict(value)
        case np.ndarray():
            if value.dtype not in STORAGE.values() and value.dtype not in (np.float32, np.float64):
                raise NotImplementedError(f"Arrays of {value.dtype} do not travel.")
            return (value.dtype.str, value.shape, arrays.add(value))
        case np.generic():
            return value.item()
    raise NotImplementedError(f"{type(value).__name__} does not travel.")


def from_wire(compile: Compile, arrays: memoryview, kind: Any, value: Any) -> Any:
    """A value of a type that MessagePack does not know, of what `to_wire` wrote: an array is read where it stands.
    Raises `ValidationError`."""
    if kind is RolloutError:
        return error_of(msgspec.convert(value, ToldError))
    if kind is Constraint:
        return compile(msgspec.convert(value, Uncompiled).grammar)
    if kind is np.ndarray or getattr(kind, "__origin__", None) is np.ndarray:
        dtype, shape, at = msgspec.convert(value, Standing)
        nbytes = np.dtype(dtype).itemsize * math.prod(shape)
        return frozen(np.frombuffer(arrays[at : at + nbytes], np.dtype(dtype)).reshape(shape))
    raise msgspec.ValidationError(f"{kind} is no type of a message.")


def told(error: RolloutError) -> ToldError:
    """An error, ready to travel."""
    extra: dict[str, Any] = {}
    match error:
        case AdapterMismatch():
            extra = {"faults": error.faults}
        case PreconditionFailed():
            extra = {"at": error.at}
        case QueueFull():
            extra = {"retry_after_s": error.retry_after_s}
    return ToldError(type(error).__name__, error.message, error.param, error.retryable, **extra)


def error_of(told: ToldError) -> RolloutError:
    """The error that `told` was made of; an engine's fault where its class is unknown here."""
    cls = next((cls for cls in _classes(RolloutError) if cls.__name__ == told.cls), EngineFault)
    if issubclass(cls, AdapterMismatch):
        error: RolloutError = cls(told.message, faults=told.faults, param=told.param)
    elif issubclass(cls, PreconditionFailed):
        error = cls(told.message, param=told.param, at=told.at)
    elif issubclass(cls, QueueFull):
        error = cls(told.message, param=told.param, retry_after_s=told.retry_after_s)
    else:
        error = cls(told.message, param=told.param)
    error.retryable = told.retryable
    return error


def _classes(cls: type[RolloutError]) -> Iterator[type[RolloutError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _classes(child)
