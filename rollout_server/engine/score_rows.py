"""Teacher forcing of many sequences in one forward, each in a place of its own in the rows' kind of KV store.

Passages that need values, and those that still read what stands before, go through the model apart, because only the
former pay for the head. A turn has one forward, since each is a pass over the weights, and the kinds take turns; within
a kind all have an equal share of the turn's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rollout_server.engine.cache import Forward, Piece, Prompt, SlotRows
from rollout_server.engine.passages import Family, Passage, ScoreJob
from rollout_server.engine.score import gather, measure

MOST_PASSAGES = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Joining:
    """Passages whose common prompt is being read."""

    family: Family
    passages: list[Passage]

    @property
    def prompt(self) -> Prompt:
        return self.family.prompt


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one place reads next: at most `left` inputs before something changes."""

    kind: Hashable
    place: int
    at: int
    tokens: tuple[int, ...]
    slot: Any
    left: int
    passage: Passage | None
    """None where a family's prompt is read."""
    prompt: Prompt | None


class SlotReader:
    """The methods of `score.Reader`. Rows of a forward have the same `apart(slot)`; `chunk` tokens may have their
    logits alive at once."""

    def __init__(
        self,
        forward: Forward,
        make_rows: Callable[[], SlotRows],
        route: Callable[[Sequence[Any]], None],
        apart: Callable[[Any], Hashable],
        chunk: int,
        hidden: Forward | None = None,
    ) -> None:
        self._forward = forward
        self._hidden = hidden or forward
        self._make_rows = make_rows
        self._route = route
        self._apart = apart
        self._chunk = chunk
        self.limit = min(MOST_PASSAGES, self._chunk)
        self._rows = make_rows()
        self._joining: list[_Joining] = []
        self._seated: list[Passage] = []
        self._kept: list[Family] = []
        """Families whose prompt's KV is kept for passages that still wait."""
        self._served: list[Hashable] = []
        """Kinds of forwards, the one that ran last at the end."""

    # ---- what it holds --------------------------------------------------------------------------------------------

    @property
    def _held(self) -> list[Passage]:
        return [passage for joining in self._joining for passage in joining.passages] + self._seated

    @property
    def size(self) -> int:
        return len(self._held)

    @property
    def left(self) -> int:
        prompts = [joining.prompt for joining in self._joining]
        joining = sum(each.family.own(passage) for each in self._joining for passage in each.passages)
        unread = sum(len(prompt.tokens) - prompt.fed for prompt in prompts)
        return unread + joining + sum(passage.left for passage in self._seated)

    @property
    def cells(self) -> int:
        return self.cells_with(0, 0) if self._held or self._kept else 0

    @property
    def nbytes(self) -> int:
        kept = (pair for family in self._kept for pair in family.prompt.kept or () if pair is not None)
        return self._rows.nbytes + sum(array.nbytes for pair in kept for array in pair)

    def cells_with(self, count: int, columns: int) -> int:
        held = self._held
        longest = max([columns, *(passage.length for passage in held)])
        return self._rows.cells(count, longest) + sum(len(family.prompt.tokens) for family in self._kept)

    # ---- joining and leaving --------------------------------------------------------------------------------------

    def begin(self, family: Family, count: int) -> None:
        longest = max(passage.length for passage in [*self._held, *islice(family.waiting, count)])
        self._rows.begin(family.prompt, count, longest)
        passages = [family.waiting.popleft() for _ in range(count)]
        family.joining = True
        self._joining.append(_Joining(family, passages))
        self._kept = [kept for kept in self._kept if kept is not family] + [family] * bool(family.waiting)

    def _seat(self) -> None:
        """Passages whose prompt was read get their own places."""
        for joining in [joining for joining in self._joining if joining.prompt.done]:
            keep = bool(joining.family.waiting)
            places = self._rows.seat(joining.prompt, len(joining.passages), keep)
            for passage, place in zip(joining.passages, places, strict=True):
                passage.place = place
                if joining.prompt.tokens:
                    passage.feed(len(joining.prompt.tokens))
            self._seated += joining.passages
            joining.family.joining = False
            self._joining.remove(joining)

    def drop(self, job: ScoreJob) -> None:
        self._kept = [family for family in self._kept if family not in job.families]
        joining = [joining for joining in self._joining if joining.passages[0].job is job]
        self._joining = [joining for joining in self._joining if joining.passages[0].job is not job]
        seated = [passage for passage in self._seated if passage.job is job]
        places = [place for each in joining for place in each.prompt.places] + [passage.place for passage in seated]
        # Nobody knows whether what they have read is finite.
        self._leave(seated, places, places)

    def _leave(self, passages: Sequence[Passage], places: Sequence[int], scrub: Sequence[int]) -> None:
        self._seated = [passage for passage in self._seated if passage not in passages]
        if not self._held:
            self._rows = self._make_rows()
            return
        moved = self._rows.leave(places, scrub) if places else None
        if moved is None:
            return
        for passage in self._seated:
            passage.place = moved[passage.place]
        for joining in self._joining:
            joining.prompt.places = [moved[place] for place in joining.prompt.places]

    def reset(self) -> None:
        self._joining, self._seated, self._kept, self._rows = [], [], [], self._make_rows()

    # ---- reading --------------------------------------------------------------------------------------------------

    def read(self, budget: int) -> list[Passage]:
        self._seat()
        kinds: dict[Hashable, list[_Part]] = {}
        for part in self._parts():
            kinds.setdefault(part.kind, []).append(part)
        if kinds:
            # Whoever was served stands behind the others; new ones stand before those.
            self._served = [kind for kind in self._served if kind in kinds]
            kind = next((kind for kind in kinds if kind not in self._served), next(iter(self._served), None))
            self._served = [*(other for other in self._served if other != kind), kind]
            self._run(kinds[kind], max(1, budget // len(kinds[kind])))
        self._seat()
        ended = [passage for passage in self._seated if passage.ended]
        faulty = [passage.place for passage in ended if passage.fault is not None]
        self._leave(ended, [passage.place for passage in ended], faulty)
        return ended

    def _parts(self) -> Iterator[_Part]:
        for joining in self._joining:
            prompt = joining.prompt
            left = len(prompt.tokens) - prompt.fed
            kind = (False, False, self._apart(prompt.slot))
            yield _Part(kind, prompt.places[0], prompt.fed, prompt.tokens, prompt.slot, left, None, prompt)
        for passage in self._seated:
            slot = passage.leg.slot
            kind = (passage.scoring, passage.scoring and passage.pool is not None, self._apart(slot))
            yield _Part(kind, passage.place, passage.fed, passage.tokens, slot, passage.left_alike, passage, None)

    def _run(self, parts: Sequence[_Part], share: int) -> None:
        """One forward over the next inputs of each part, at most `share` of them."""
        first = parts[0].passage
        scoring = first is not None and first.scoring
        pooled = scoring and first is not None and first.pool is not None
        most = min(share, self._chunk // len(parts)) if scoring and not pooled else share
        pieces = [
            Piece(part.place, part.at, part.tokens[part.at : part.at + min(most, part.left)], part.slot)
            for part in parts
        ]
        out = self._rows.read(self._hidden if pooled else self._forward, pieces, self._route)
        counts = [len(piece.tokens) for piece in pieces]
        if scoring:
            passages = [part.passage for part in parts if part.passage is not None]
            read = list(zip(passages, counts, strict=True))
            if pooled:
                gather(out, read, self._rows.arrays())
            else:
                measure(out, read, self._rows.arrays(), self._chunk)
        else:
            self._rows.evaluate()
        for part, count in zip(parts, counts, strict=True):
            if part.prompt is not None:
                part.prompt.fed += count
            elif part.passage is not None and part.passage.fault is None:
                part.passage.feed(count)
