"""Teacher forcing of many sequences in one forward, each in a place of its own in the rows' kind of KV store.

Sequences that need values, and those that still read what stands before, go through the model apart, because only the
former pay for the head. A turn has one forward, since each is a pass over the weights, and the kinds take turns; so do
those of a kind, each with as much of itself as fits: pieces of all of them would be many, and padded to the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import mlx.core as mx

from rollout_server.engine.batch.prefix_reuse import LEAST, PrefixReuse, Wanted
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.prefix_tree import Key
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.sizes import plan
from rollout_server.engine.kv_cache.store import Piece, Reading, Seating
from rollout_server.engine.sampling.filter_kernel import FilterKernel
from rollout_server.engine.scoring.job import ScoredSequenceState, ScoreJob, SharedPrefix
from rollout_server.engine.scoring.reader import gather, measure
from rollout_server.engine.sight.seen import View

MOST_SEQUENCES = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Joining:
    """Sequences whose common prompt is being read."""

    prefix: SharedPrefix
    sequences: list[ScoredSequenceState]

    @property
    def prompt(self) -> Prompt:
        return self.prefix.prompt

    @property
    def key(self) -> Key | None:
        """What its KV is kept under."""
        return self.sequences[0].job.key


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one place reads next: at most `left` inputs before something changes."""

    kind: Hashable
    place: int
    at: int
    tokens: tuple[int, ...]
    slot: Any
    left: int
    sequence: ScoredSequenceState | None
    """None where a family's prompt is read."""
    prompt: Prompt | None

    @property
    def read(self) -> ScoredSequenceState | Prompt:
        """What it is a part of."""
        found = self.sequence or self.prompt
        if found is None:
            raise RuntimeError("A part is of nothing.")
        return found

    def piece(self, most: int) -> Piece:
        """About `most` of its tokens."""
        end = self.at + self.read.chunk(min(most, self.left))
        return Piece(self.place, self.at, self.tokens[self.at : end], self.slot, self.read.sight)


class BatchedReader:
    """The methods of `reader.Reader`. Rows of a forward have the same `apart(slot)`; `chunk` tokens may have their
    logits alive at once."""

    def __init__(
        self,
        forward: Reading,
        make_rows: Callable[[], PaddedKV],
        route: Callable[[Sequence[Any]], None],
        apart: Callable[[Any], Hashable],
        chunk: int,
        prefixes: PrefixReuse,
        hidden: Reading | None = None,
        filter_kernel: FilterKernel | None = None,
    ) -> None:
        self._forward = forward
        self._hidden = hidden or forward
        self._filter_kernel = filter_kernel
        self._prefixes = prefixes
        self._make_rows = make_rows
        self._route = route
        self._apart = apart
        self._chunk = chunk
        self.limit = min(MOST_SEQUENCES, self._chunk)
        self._rows = make_rows()
        self._joining: list[_Joining] = []
        self._seated: list[ScoredSequenceState] = []
        self._kept: list[SharedPrefix] = []
        """Families whose prompt's KV is kept for sequences that still wait."""
        self._turn = 0
        self._waiting_since: dict[ScoredSequenceState | Prompt, int] = {}
        """The forward after which each of what is read last had a part, or came."""
        self._served: list[Hashable] = []
        """Kinds of forwards, the one that ran last at the end."""

    # ---- what it holds --------------------------------------------------------------------------------------------

    @property
    def _held(self) -> list[ScoredSequenceState]:
        return [sequence for joining in self._joining for sequence in joining.sequences] + self._seated

    @property
    def size(self) -> int:
        return len(self._held)

    @property
    def left(self) -> int:
        prompts = [joining.prompt for joining in self._joining]
        joining = sum(each.prefix.own(sequence) for each in self._joining for sequence in each.sequences)
        unread = sum(len(prompt.tokens) - prompt.prefilled for prompt in prompts)
        return unread + joining + sum(sequence.left for sequence in self._seated)

    @property
    def cells(self) -> int:
        return self.cells_with(0, 0) if self._held or self._kept else 0

    @property
    def nbytes(self) -> int:
        kept = (pair for prefix in self._kept for pair in prefix.prompt.kept or () if pair is not None)
        return self._rows.nbytes + sum(array.nbytes for pair in kept for array in pair)

    def cells_with(self, count: int, columns: int) -> int:
        held = self._held
        longest = max([columns, *(sequence.length for sequence in held)])
        return self._rows.cells(count, longest) + sum(len(prefix.prompt.tokens) for prefix in self._kept)

    # ---- joining and leaving --------------------------------------------------------------------------------------

    def begin(self, prefix: SharedPrefix, count: int) -> None:
        longest = max(sequence.length for sequence in [*self._held, *islice(prefix.waiting, count)])
        self._rows.begin(prefix.prompt, count, longest)
        sequences = [prefix.waiting.popleft() for _ in range(count)]
        prefix.joining = True
        self._joining.append(_Joining(prefix, sequences))
        key, prompt = sequences[0].job.key, prefix.prompt
        unknown = bool(prompt.tokens) and prompt.kept is None
        if key is not None and unknown and (segments := self._prefixes.find(key, prompt.key)):
            self._rows.paste(prompt, segments)
        self._kept = [kept for kept in self._kept if kept is not prefix] + [prefix] * bool(prefix.waiting)

    def awaits(self, prefix: SharedPrefix) -> bool:
        """Once, so that nobody waits for one after another where there is no room to keep any."""
        key = prefix.waiting[0].job.key
        if key is None or not self._prefixes.on:
            return False
        for joining in self._joining:
            first = prefix.awaited in (None, joining.prompt)
            if first and joining.key == key and _begins_like(joining.prompt, prefix.prompt):
                prefix.awaited = joining.prompt
                return True
        return False

    def _seat(self) -> None:
        """Sequences whose prompt was read get their own places."""
        if not (ready := [joining for joining in self._joining if joining.prompt.done]):
            return
        seated = self._rows.seat(
            [Seating(each.prompt, len(each.sequences), keep=bool(each.prefix.waiting)) for each in ready]
        )
        wanted = [
            Wanted(places[0], joining.key, joining.prompt.key)
            for joining, places in zip(ready, seated, strict=True)
            if joining.key is not None and joining.prompt.tokens
        ]
        mx.eval(self._prefixes.keep(self._rows, wanted))
        for joining, places in zip(ready, seated, strict=True):
            for sequence, place in zip(joining.sequences, places, strict=True):
                sequence.place = place
                if joining.prompt.tokens:
                    sequence.advance(len(joining.prompt.tokens))
            self._seated += joining.sequences
            joining.prefix.joining = False
            self._waiting_since.pop(joining.prompt, None)
            self._joining.remove(joining)

    def drop(self, job: ScoreJob) -> None:
        self._kept = [prefix for prefix in self._kept if prefix not in job.prefixes]
        joining = [joining for joining in self._joining if joining.sequences[0].job is job]
        self._joining = [joining for joining in self._joining if joining.sequences[0].job is not job]
        seated = [sequence for sequence in self._seated if sequence.job is job]
        places = [place for each in joining for place in each.prompt.places] + [sequence.place for sequence in seated]
        # Nobody knows whether what they have read is finite.
        self._leave(seated, places, places)

    def _leave(self, sequences: Sequence[ScoredSequenceState], places: Sequence[int], scrub: Sequence[int]) -> None:
        self._seated = [sequence for sequence in self._seated if sequence not in sequences]
        for sequence in sequences:
            self._waiting_since.pop(sequence, None)
        if not self._held:
            self._empty()
            return
        moved = self._rows.leave(places, scrub) if places else None
        if moved is None:
            return
        for sequence in self._seated:
            sequence.place = moved[sequence.place]
        for joining in self._joining:
            joining.prompt.places = [moved[place] for place in joining.prompt.places]

    def reset(self) -> None:
        self._joining, self._seated, self._kept, self._waiting_since = [], [], [], {}
        self._empty()

    def _empty(self) -> None:
        # A store and its layers know each other: until a collector looks for such circles, the arrays would stay.
        self._rows.give_arrays()
        self._rows = self._make_rows()

    # ---- reading --------------------------------------------------------------------------------------------------

    def views(self, budget: int) -> list[View]:
        self._seat()
        return [(piece.sight, piece.at, len(piece.tokens)) for _, piece in self._next(budget)]

    def read(self, budget: int) -> list[ScoredSequenceState]:
        self._seat()
        if pieces := self._next(budget):
            kind = pieces[0][0].kind
            self._served = [*(other for other in self._served if other != kind), kind]
            self._run(pieces)
            self._turn += 1
            self._waiting_since |= {part.read: self._turn for part, _ in pieces}
        self._seat()
        ended = [sequence for sequence in self._seated if sequence.ended]
        faulty = [sequence.place for sequence in ended if sequence.fault is not None]
        for sequence in ended:
            if sequence.fault is not None and sequence.job.key is not None:
                # Nobody knows since when its numbers were not finite.
                self._prefixes.forget(sequence.job.key)
        self._leave(ended, [sequence.place for sequence in ended], faulty)
        return ended

    def _next(self, budget: int) -> list[tuple[_Part, Piece]]:
        """What goes through the model together: parts of one kind, about `budget` tokens with what pads them."""
        kinds: dict[Hashable, list[_Part]] = {}
        for part in self._parts():
            kinds.setdefault(part.kind, []).append(part)
        # Whoever was served stands behind the others; new ones stand before those.
        self._served = [kind for kind in self._served if kind in kinds]
        kind = next((kind for kind in kinds if kind not in self._served), next(iter(self._served), None))
        # Whoever waits longest comes first, since its own arrival or its last turn: it always has a part.
        self._waiting_since = {
            part.read: self._waiting_since.get(part.read, self._turn) for parts in kinds.values() for part in parts
        }
        parts = sorted(kinds.get(kind, []), key=lambda part: self._waiting_since[part.read])
        first = parts[0].sequence if parts else None
        of_logits = first is not None and first.scoring and not first.of_states
        chosen = plan([part.left for part in parts], min(budget, self._chunk) if of_logits else budget)
        return [(parts[index], parts[index].piece(count)) for index, count in chosen]

    def _parts(self) -> Iterator[_Part]:
        for joining in self._joining:
            prompt = joining.prompt
            left = len(prompt.tokens) - prompt.prefilled
            kind = (False, False, self._apart(prompt.slot))
            yield _Part(kind, prompt.places[0], prompt.prefilled, prompt.tokens, prompt.slot, left, None, prompt)
        for sequence in self._seated:
            slot = sequence.run.placement
            kind = (sequence.scoring, sequence.scoring and sequence.of_states, self._apart(slot))
            yield _Part(
                kind, sequence.place, sequence.next_input, sequence.tokens, slot, sequence.left_alike, sequence, None
            )

    def _run(self, read: Sequence[tuple[_Part, Piece]]) -> None:
        """One forward over the next inputs of each part."""
        parts, pieces = [part for part, _ in read], [piece for _, piece in read]
        first = parts[0].sequence
        scoring = first is not None and first.scoring
        of_states = scoring and first is not None and first.of_states
        out = self._rows.read(self._hidden if of_states else self._forward, pieces, self._route)
        counts = [len(piece.tokens) for piece in pieces]
        if scoring:
            sequences = [part.sequence for part in parts if part.sequence is not None]
            counted = list(zip(sequences, counts, strict=True))
            if of_states:
                gather(out, counted, self._rows.arrays())
            else:
                measure(out, counted, self._rows.arrays(), self._chunk, self._filter_kernel)
        else:
            self._rows.evaluate()
        for part, count in zip(parts, counts, strict=True):
            if part.prompt is not None:
                part.prompt.prefilled += count
            elif part.sequence is not None and part.sequence.fault is None:
                part.sequence.advance(count)


def _begins_like(first: Prompt, second: Prompt) -> bool:
    """Returns whether at least half of the second prompt is there once the first was read."""
    half = max(LEAST, len(second.tokens) // 2)
    return len(first.tokens) >= half and first.key[:half] == second.key[:half]
