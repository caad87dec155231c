"""The policy of the prefix cache: which KV is stored when a prompt or a row ends, and what a new prompt reuses.

Kept are prompts when they were read and rows when they ended, under (digest of the version, how it is served). Not
kept: rows that switched versions, since their KV is of several; rows that failed, whose whole tree goes; versions that
are gone. Where state cannot be cut at a token, it is kept whole at places where others may go on: there a message ends,
or a prompt parts from one that was read before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import mlx.core as mx

from adapters.placement import BASE_SET, BASE_SLOT, Placement
from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.kv_cache.mlx_caches import MlxCacheKV
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.prefix_tree import Block, Columns, Key, PrefixCache, Segment, arrays_of, common
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.snapshots import Caches, Found, Snapshots
from rollout_server.engine.kv_cache.store import KVStore
from rollout_server.engine.messages.status import PrefixStatus
from rollout_server.engine.messages.versions import PolicyStatus
from rollout_server.rollout import PolicyVersion

LEAST = 8
"""Fewer tokens than these are read again sooner than written from here."""
BLOCK_TOKENS = 1024
"""Tokens of several rows or prompts that are copied into one block; one that has more of them is a block by itself."""
APART = 64
"""Tokens between two places of a prompt at which whole states are kept, at least: each costs a forward of its own and
the memory of a row."""
MOST_ENDS = 8
"""Messages of one prompt at whose ends whole states are kept: the first, which other conversations share, and the last
ones."""


def key_of(version: PolicyVersion, placement: Placement) -> Key:
    """What KV was computed under. Slots and sets are taken by others later; whether there is one tells the modes of
    equal content apart. One process has one base."""
    return version.digest, placement.slot != BASE_SLOT, placement.parameters != BASE_SET


class PrefixReuse:
    """Rows come first: `fit` says what they leave. `store` is of the kind that batches have, never filled. With `on`
    False, and where nothing of it can be kept, nothing is found."""

    def __init__(self, token_bytes: int, base_digest: str, store: KVStore, *, on: bool) -> None:
        self._token_bytes = token_bytes
        self._base_digest = base_digest
        self._cache: PrefixCache | Snapshots = (
            Snapshots() if isinstance(store, MlxCacheKV) else PrefixCache(token_bytes)
        )
        self._kept = {base_digest}
        self._seen: tuple[PolicyStatus, ...] | None = None
        self.on = on and (not isinstance(store, MlxCacheKV) or store.snapshots)

    @property
    def status(self) -> PrefixStatus:
        cache = self._cache
        return PrefixStatus(
            self.on, cache.hits, cache.misses, cache.hit_tokens, cache.nbytes, cache.evictions, cache.asked_tokens
        )

    # ---- room -------------------------------------------------------------------------------------------------------

    def fit(self, cells: int) -> None:
        """Fills at most so many KV columns from now on."""
        if self.on:
            self._cache.fit(cells * self._token_bytes)

    @property
    def cells(self) -> int:
        """KV columns that are kept."""
        return self._cache.nbytes // self._token_bytes

    def follow(self, policies: tuple[PolicyStatus, ...]) -> None:
        """Forgets what was computed under versions that are kept no longer."""
        if not self.on or policies is self._seen:
            return
        self._seen = policies
        kept = {status.version.digest for policy in policies for status in policy.versions} | {self._base_digest}
        if self._kept - kept:
            self._cache.drop(lambda key: key[0] not in kept)
        self._kept = kept

    def clear(self) -> int:
        """Forgets everything; returns how many bytes that were."""
        freed = self._cache.nbytes
        self._cache.clear()
        return freed

    # ---- prompts and rows -------------------------------------------------------------------------------------------

    def of_batch(self, store: KVStore, ends: frozenset[int]) -> Prefixes | None:
        """What stands between a batch's places and what is kept; None where nothing is. Messages end with `ends`."""
        if not self.on:
            return None
        if isinstance(self._cache, PrefixCache) and isinstance(store, PaddedKV):
            return BatchPrefixes(store, self)
        if isinstance(self._cache, Snapshots) and isinstance(store, MlxCacheKV):
            return BatchSnapshots(store, self, self._cache, ends)
        raise RuntimeError("What is kept for later is not of the kind that this batch computes with.")

    def find(self, key: Key, tokens: Sequence[int], *, count: bool = True) -> list[Segment]:
        """The columns that there are of a prompt; none where state is kept whole. See `PrefixCache.find`."""
        return self._cache.find(key, tokens, LEAST, count=count) if isinstance(self._cache, PrefixCache) else []

    def keep(self, store: PaddedKV, wanted: Sequence[Wanted]) -> list[mx.array]:
        """The columns that places hold for their tokens, as far as they are not there yet; returns the arrays to
        evaluate."""
        if not isinstance(self._cache, PrefixCache):
            return []
        gathering, arrays = _Gathering(store), []
        for place, key, tokens, ends in wanted:
            if self.keeps(key):
                arrays += self._cache.insert(key, tokens, partial(gathering.take, place), ends)
        return arrays + gathering.arrays()

    def keeps(self, key: Key) -> bool:
        """Returns whether what was computed under a key may be kept."""
        return key[0] in self._kept

    def forget(self, key: Key) -> None:
        self._cache.drop(lambda other: other == key)


class Wanted(NamedTuple):
    """What a place holds and is to be kept; `ends` are where others may part from it."""

    place: int
    key: Key
    tokens: tuple[int, ...]
    ends: tuple[int, ...] = ()


class _Gathering:
    """Columns of places that are copied together: one copy of each array of the store for a block of them, not one for
    each place. A block has few tokens, since one node that is used again and again keeps all of it."""

    def __init__(self, store: PaddedKV) -> None:
        self._store = store
        self._blocks: list[tuple[Block, list[tuple[int, int, int]]]] = []
        self._count = 0
        """Tokens of the last block."""

    def take(self, place: int, start: int, end: int) -> Columns:
        """Some columns of a place, which are there once `arrays` was called."""
        count = end - start
        if not self._blocks or self._count + count > BLOCK_TOKENS:
            self._blocks.append((Block(), []))
            self._count = 0
        block, pieces = self._blocks[-1]
        pieces.append((place, start, end))
        self._count += count
        return Columns(block, self._count - count, self._count)

    def arrays(self) -> list[mx.array]:
        """What is to be evaluated before the next write."""
        needed = [(block, pieces) for block, pieces in self._blocks if block.nodes]
        for block, pieces in needed:
            block.layers = self._store.gather(pieces)
        return [array for block, _ in needed for array in arrays_of(block.layers)]


class Prefixes(Protocol):
    """Between the places of one batch and what is kept for later."""

    def enter(self, groups: Sequence[Group]) -> None:
        """Gives each joining prompt that nobody has looked up what there is of it. One that an earlier prompt will
        bring along waits for that. No step in flight."""

    def recall(self, prompt: Prompt, key: Key, most: int) -> None:
        """Gives what a preempted row has to read again what there is of its first `most` tokens. No step in flight."""

    def keep_read(self, groups: Sequence[Group]) -> bool:
        """Told of groups whose prompts were read on; returns whether one stopped before its end, to be read on."""

    def keep_prompts(self, seated: Sequence[tuple[int, Group, Prompt]]) -> None:
        """Told of prompts that were read and have sat down, each in its place. No step may be in flight."""

    def keep_rows(self, ended: Mapping[int, Row], steps: int) -> list[mx.array]:
        """Stores the KV of rows that leave their places after `steps` steps of the batch; returns the arrays to
        evaluate before the next write."""


class BatchPrefixes:
    """The methods of `Prefixes`, for places with columns."""

    def __init__(self, store: PaddedKV, prefix_reuse: PrefixReuse) -> None:
        self._store = store
        self._prefix_reuse = prefix_reuse

    def enter(self, groups: Sequence[Group]) -> None:
        for index, group in enumerate(groups):
            prompt = group.prompt
            if prompt is None or prompt.looked_up or group.version is None:
                continue
            if any(_brings(earlier, group, prompt) for earlier in groups[:index]):
                continue
            prompt.looked_up = True
            if prompt.done:
                continue
            if segments := self._prefix_reuse.find(key_of(group.version, group.placement), prompt.key):
                self._store.paste(prompt, segments)
                if not group.prefilled_at:
                    group.cached_tokens = prompt.prefilled

    def recall(self, prompt: Prompt, key: Key, most: int) -> None:
        if segments := self._prefix_reuse.find(key, prompt.key[:most], count=False):
            self._store.paste(prompt, segments)

    def keep_read(self, groups: Sequence[Group]) -> bool:
        return False

    def keep_prompts(self, seated: Sequence[tuple[int, Group, Prompt]]) -> None:
        wanted = [
            Wanted(place, key_of(group.version, group.placement), prompt.key)
            for place, group, prompt in seated
            if group.version is not None and prompt.tokens
        ]
        mx.eval(self._prefix_reuse.keep(self._store, wanted))

    def keep_rows(self, ended: Mapping[int, Row], steps: int) -> list[mx.array]:
        wanted = []
        for place, row in ended.items():
            key = key_of(row.version, row.placement)
            if row.error is not None:
                # Nobody knows since when its numbers were not finite.
                self._prefix_reuse.forget(key)
            elif row.token_ids and not row.switched:
                request = row.group.request
                # The last token was sampled and never read. Rows of a group part behind what all were given.
                tokens = request.prompt_ids + tuple(row.token_ids[:-1])
                if row.group.sight is not None:
                    tokens = row.group.sight.key_of(tokens)
                wanted.append(Wanted(place, key, tokens, (len(request.given_ids),)))
        return self._prefix_reuse.keep(self._store, wanted)


class BatchSnapshots:
    """The methods of `Prefixes`, for rows whose state is kept whole."""

    def __init__(
        self, store: MlxCacheKV, prefix_reuse: PrefixReuse, snapshots: Snapshots, ends: frozenset[int]
    ) -> None:
        self._store = store
        self._prefix_reuse = prefix_reuse
        self._snapshots = snapshots
        self._ends = ends

    def enter(self, groups: Sequence[Group]) -> None:
        for index, group in enumerate(groups):
            prompt = group.prompt
            if prompt is None or prompt.looked_up or group.version is None:
                continue
            if any(_will_leave(earlier, group, prompt) for earlier in groups[:index]):
                continue
            prompt.looked_up = True
            if prompt.done:
                continue
            found = self._snapshots.find(key_of(group.version, group.placement), prompt.tokens, LEAST)
            if found.caches is not None:
                prompt.kept, prompt.prefilled = found.caches, found.count
                if not group.prefilled_at:
                    group.cached_tokens = found.count
            prompt.stops = _stops(prompt.tokens, found, self._ends)

    def recall(self, prompt: Prompt, key: Key, most: int) -> None:
        found = self._snapshots.find(key, prompt.tokens[:most], LEAST, count=False)
        if found.caches is not None:
            prompt.kept, prompt.prefilled = found.caches, found.count

    def keep_read(self, groups: Sequence[Group]) -> bool:
        stopped = False
        for group in groups:
            prompt = group.prompt
            if prompt is None or prompt.kept is None or group.version is None:
                continue
            if prompt.done or prompt.prefilled in prompt.stops:
                caches, tokens = prompt.kept, prompt.tokens[: prompt.prefilled]
                self._keep(key_of(group.version, group.placement), tokens, lambda caches=caches: caches)  # type: ignore[misc]
                stopped = stopped or not prompt.done
        return stopped

    def keep_prompts(self, seated: Sequence[tuple[int, Group, Prompt]]) -> None:
        """They were kept when they were read."""

    def keep_rows(self, ended: Mapping[int, Row], steps: int) -> list[mx.array]:
        for place, row in ended.items():
            key = key_of(row.version, row.placement)
            if row.error is not None:
                self._prefix_reuse.forget(key)
            elif row.token_ids and not row.switched and row.last_step >= 0 and (more := steps - row.last_step) <= 1:
                # A step for others that came after its last one has read the token that this one sampled.
                read = row.offset + more
                tokens = (*row.group.request.prompt_ids, *row.token_ids)[:read]
                if len(tokens) == read:
                    self._keep(key, tokens, lambda place=place, read=read: self._store.copy(place, read))  # type: ignore[misc]
        return []

    def _keep(self, key: Key, tokens: tuple[int, ...], take: Callable[[], Caches]) -> None:
        if self._prefix_reuse.keeps(key):
            self._snapshots.insert(key, tokens, take)


def _stops(tokens: tuple[int, ...], found: Found, ends: frozenset[int]) -> tuple[int, ...]:
    """Where a prompt's state is kept before its end: behind messages, and where it parts from what was read before."""
    places = [at + 1 for at, token in enumerate(tokens) if token in ends]
    places = places if len(places) <= MOST_ENDS else [places[0], *places[1 - MOST_ENDS :]]
    stops: list[int] = []
    for place in sorted({*places, found.known}):
        if place - max([found.count, *stops]) >= APART and place < len(tokens):
            stops.append(place)
    return tuple(stops)


def _will_leave(earlier: Group, later: Group, prompt: Prompt) -> bool:
    """Returns whether an earlier prompt will leave a state that saves at least half of a prompt. It stops where the two
    part, unless it has been read beyond."""
    first = earlier.prompt
    if first is None or first.done or earlier.cancelled or not first.looked_up or earlier.version != later.version:
        return False
    alike = common(first.tokens, prompt.tokens, 0)
    if alike < max(LEAST, len(prompt.tokens) // 2):
        return False
    places = [place for place in (*first.stops, len(first.tokens)) if place <= alike]
    if alike - max(places, default=0) >= APART and alike > first.prefilled:
        first.stops = tuple(sorted((*first.stops, alike)))
        places.append(alike)
    return max(places, default=0) > max(first.prefilled, LEAST, len(prompt.tokens) // 2 - 1)


def _brings(earlier: Group, later: Group, prompt: Prompt) -> bool:
    """Returns whether at least half of a prompt is there once an earlier one was read."""
    first = earlier.prompt
    if first is None or first.done or earlier.cancelled or earlier.version != later.version:
        return False
    half = max(LEAST, len(prompt.tokens) // 2)
    if len(first.tokens) < half or len(prompt.tokens) < half or first.tokens[half - 1] != prompt.tokens[half - 1]:
        return False
    return first.key[:half] == prompt.key[:half]
