"""What joins a batch, which batch that is, and what holds KV in it since when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from adapters.placement import BASE_SET
from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.kv_cache.prompt import Prompt


class BatchKey(NamedTuple):
    """Which batch; keys stand in this order."""

    parameters: int
    """The number of its parameter set."""
    bucket: int = 0
    """The number of its length bucket."""


FIRST = BatchKey(BASE_SET)
Age = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Joining:
    """Samples of one group whose prompt is being prefilled."""

    group: Group
    prompt: Prompt
    count: int
    first_sample: int


@dataclass(frozen=True, slots=True)
class KVUser:
    """What holds KV: a row or a joining group. `width` is what each of `count` rows needs for the next step."""

    age: Age
    key: BatchKey
    count: int
    width: int
    row: Row | None = None
    joining: Joining | None = None


class RowSink(Protocol):
    """Who is told what became of rows, see `reports.Reports`."""

    def progress(self, rows: Sequence[Row]) -> None:
        """Rows that were read: one new token each, or an error."""

    def release(self, rows: Sequence[Row]) -> None:
        """Rows whose places are free."""

    def drop(self, joining: Sequence[Joining]) -> None:
        """Groups that were aborted before their rows were seated."""


def age_of(group: Group, sample: int) -> Age:
    return group.number, sample


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """`count` samples of a group may start, in the batch that `key` names."""

    group: Group
    count: int
    key: BatchKey
