"""The policy of the prefix cache: which KV is stored when a prompt or a row ends, and what a new prompt reuses.

Kept are prompts when they were read and rows when they ended, under (digest of the version, how it is served). Not
kept: rows that switched versions, since their KV is of several; rows that failed, whose whole tree goes; versions that
are gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from adapters.placement import BASE_SET, BASE_SLOT, Placement
from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.prefix_tree import Key, PrefixCache, Segment
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.messages.status import PrefixStatus
from rollout_server.engine.messages.versions import PolicyStatus
from rollout_server.rollout import PolicyVersion

LEAST = 8
"""Fewer tokens than these are read again sooner than written from here."""


def key_of(version: PolicyVersion, placement: Placement) -> Key:
    """What KV was computed under. Slots and sets are taken by others later; whether there is one tells the modes of
    equal content apart. One process has one base."""
    return version.digest, placement.slot != BASE_SLOT, placement.parameters != BASE_SET


class PrefixReuse:
    """Rows come first: `fit` says what they leave. With `on` False it keeps and finds nothing."""

    def __init__(self, token_bytes: int, base_digest: str, *, on: bool) -> None:
        self._token_bytes = token_bytes
        self._base_digest = base_digest
        self._cache = PrefixCache(token_bytes)
        self._kept = {base_digest}
        self._seen: tuple[PolicyStatus, ...] | None = None
        self.on = on

    @property
    def status(self) -> PrefixStatus:
        cache = self._cache
        return PrefixStatus(self.on, cache.hits, cache.misses, cache.hit_tokens, cache.nbytes, cache.evictions)

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

    def find(self, key: Key, tokens: Sequence[int]) -> list[Segment]:
        return self._cache.find(key, tokens, LEAST)

    def forget(self, key: Key) -> None:
        self._cache.drop(lambda other: other == key)

    def keep(
        self, store: PaddedKV, place: int, key: Key, tokens: tuple[int, ...], ends: Sequence[int] = ()
    ) -> list[mx.array]:
        """What a place holds for `tokens`, as far as it is not there yet; returns the arrays to evaluate."""
        if key[0] not in self._kept:
            return []
        return self._cache.insert(key, tokens, lambda start, end: store.cut(place, start, end), ends)


class BatchPrefixes:
    """Between the places of one batch and what is kept for later."""

    def __init__(self, store: PaddedKV, prefix_reuse: PrefixReuse) -> None:
        self._store = store
        self._prefix_reuse = prefix_reuse

    def enter(self, groups: Sequence[Group]) -> None:
        """Gives each joining prompt that nobody has looked up what there is of it. One that an earlier prompt will
        bring along waits for that. No step in flight."""
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

    def keep_prompt(self, place: int, group: Group, prompt: Prompt) -> None:
        """Stores the KV of a prompt that was read in `place`. No step may be in flight."""
        if group.version is not None and prompt.tokens:
            mx.eval(self._prefix_reuse.keep(self._store, place, key_of(group.version, group.placement), prompt.key))

    def keep_rows(self, ended: Mapping[int, Row]) -> list[mx.array]:
        """Stores the KV of rows that leave their places; returns the arrays to evaluate before the next write."""
        copies: list[mx.array] = []
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
                copies += self._prefix_reuse.keep(self._store, place, key, tokens, (len(request.given_ids),))
        return copies


def _brings(earlier: Group, later: Group, prompt: Prompt) -> bool:
    """Returns whether at least half of a prompt is there once an earlier one was read."""
    first = earlier.prompt
    if first is None or first.done or earlier.cancelled or earlier.version != later.version:
        return False
    half = max(LEAST, len(prompt.tokens) // 2)
    if len(first.tokens) < half or len(prompt.tokens) < half or first.tokens[half - 1] != prompt.tokens[half - 1]:
        return False
    return first.key[:half] == prompt.key[:half]
