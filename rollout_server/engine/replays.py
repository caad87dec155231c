"""What crosses the border of the engine thread to have rollouts drawn again."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_server.rollout import SamplingParams, SpanAddress


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """A rollout as it was recorded. `judged` and `logprobs` have the length of `token_ids`."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    spans: tuple[SpanAddress, ...]
    """What each token was sampled under. They tile `token_ids`, or are empty if nothing of it is to be read."""
    judged: tuple[bool, ...]
    """False: given to the row, so it is read and not drawn."""
    logprobs: tuple[float | None, ...]
    sampling: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Draw the tokens of rows again, each from the logits after the recorded ones before it."""

    id: str
    rows: tuple[RecordedRow, ...]


@dataclass(frozen=True, slots=True)
class ReplayedRow:
    first_difference: int | None
    """Index in `token_ids` of the first token that is drawn otherwise now; None if there is none."""
    margin: float | None
    """By how much it is another one, see `redraw.RowReplay.margin`; None also where it could not have been drawn."""
    max_abs_logprob_difference: float | None
    """Over the judged tokens that have a recorded log-probability; None if none has."""

    @property
    def exact(self) -> bool:
        return self.first_difference is None


@dataclass(frozen=True, slots=True)
class Replayed:
    """In the order of the request."""

    id: str
    rows: tuple[ReplayedRow, ...]
