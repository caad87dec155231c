"""What `rollouts` returns: many rows in flat arrays, the layout of the wire and of a loss over tokens.

Row r owns `offsets[r]:offsets[r + 1]` of every per-token array. Looking at a row copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from trainer_client.data.advantages import Denominator, group_advantages
from trainer_client.data.arrays import host_array
from trainer_client.data.padding import Side, pad
from trainer_client.data.rollout import LOGPROB_ARRAYS, NO_TOKEN, PER_TOKEN, Rollout, Span
from trainer_client.data.synced import check_synced
from trainer_client.data.versions import PolicyRef, PublishedVersion


@dataclass(frozen=True, eq=False, kw_only=True)
class RolloutBatch:
    """R rows with N tokens in all, ordered by prompt, then sample. Iterating gives the rows."""

    rollouts: Sequence[Rollout]
    """[R]; their arrays are views into those below. Those of a binary reply are made when they are looked at."""
    prompt_index: NDArray[np.int32]
    """[R]: rows of one prompt form a group."""
    sample_index: NDArray[np.int32]
    """[R]"""
    seeds: NDArray[np.int64]
    """[R]: each row's own seed."""
    offsets: NDArray[np.int64]
    """[R + 1]"""
    token_ids: NDArray[np.int32]
    """[N], as every array below. Exactly what was sampled, end tokens included."""
    loss_mask: NDArray[np.uint8]
    """1 = sampled by a policy, 0 = given in a prefix."""
    logprobs: NDArray[np.float32]
    """Log-probabilities under the unmodified distribution (temperature 1, no filter). NaN = none, here and below."""
    sampling_logprobs: NDArray[np.float32] | None = None
    """Log-probabilities under the distribution sampled from. None = not asked for, here and below."""
    log_kept_mass: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None
    base_logprobs: NDArray[np.float32] | None = None
    top_ids: NDArray[np.int32] | None = None
    """[N, k]; −1 = none"""
    top_logprobs: NDArray[np.float32] | None = None
    """[N, k]"""
    rewards: NDArray[np.float32] | None = None
    """[R]: what the reward model gave each row; NaN where that failed, or where it scores several labels. None unless
    one was named; `rollouts[r].reward` says why there is none."""
    reward_scores: NDArray[np.float32] | None = None
    """[R, L]: scores of each label, NaN = none."""
    policy: PolicyRef | None = None
    """Where the alias pointed when the reply was made; None if nowhere, and for rows that came one by one."""
    instance: str | None = None
    """Version numbers are only comparable within one."""
    complete: bool = True
    """True if every row ended as `stop` or `length`."""
    usage: Mapping[str, Any] = field(default_factory=dict)
    timings_ms: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rollouts: Iterable[Rollout], **about: Any) -> RolloutBatch:
        """Joins rows into one batch: those of a stream, or a selection of another batch. `about` may hold `policy`,
        `instance`, `usage` and `timings_ms`. `prompt_index` is kept: see `concatenate` for rows of several requests."""
        rows = tuple(rollouts)
        offsets = np.cumsum([0, *(len(row.token_ids) for row in rows)], dtype=np.int64)
        flat = {name: _join(rows, name, dtype) for name, dtype in PER_TOKEN.items()}
        flat |= _join_top(rows)
        kept: dict[str, Any] = {name: array for name, array in flat.items() if array is not None}
        views = (
            replace(row, **{name: array[start:end] for name, array in kept.items()})
            for row, (start, end) in zip(rows, pairwise(offsets.tolist()), strict=True)
        )
        about.setdefault("complete", all(row.finish_reason in ("stop", "length") for row in rows))
        return cls(
            rollouts=tuple(views),
            offsets=offsets,
            prompt_index=np.array([row.prompt_index for row in rows], np.int32),
            sample_index=np.array([row.sample_index for row in rows], np.int32),
            seeds=np.array([row.seed for row in rows], np.int64),
            **kept,
            **_rewards(rows),
            **about,
        )

    @classmethod
    def concatenate(cls, batches: Sequence[RolloutBatch]) -> RolloutBatch:
        """Joins the batches of several requests; prompts are numbered on, so groups stay apart."""
        rows: list[Rollout] = []
        first = 0
        for batch in batches:
            rows += [replace(row, prompt_index=row.prompt_index + first) for row in batch.rollouts]
            first += int(batch.prompt_index.max(initial=-1)) + 1
        instances = {batch.instance for batch in batches}
        return cls.of(
            rows,
            instance=instances.pop() if len(instances) == 1 else None,
            complete=all(batch.complete for batch in batches),
        )

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rollouts)

    def __getitem__(self, row: int) -> Rollout:
        return self.rollouts[row]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[R]: tokens per row."""
        return np.diff(self.offsets)

    @property
    def prompt_width(self) -> int:
        """Tokens of the longest prompt: the first completion column of `padded()` with prompts left-padded."""
        return max((len(row.prompt_token_ids) for row in self.rollouts), default=0)

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        return tuple(row.finish_reason for row in self.rollouts)

    @property
    def texts(self) -> tuple[str | None, ...]:
        """The text of each row; None for every row unless `text` was asked for."""
        return tuple(row.text for row in self.rollouts)

    @property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Which version sampled which tokens, per row."""
        return tuple(row.spans for row in self.rollouts)

    @property
    def sequences(self) -> list[dict[str, Any]]:
        """Prompt and completion of each row, to be scored from its first completion token: what `logprobs` takes."""
        return [
            {
                "token_ids": [*row.prompt_token_ids.tolist(), *row.token_ids.tolist()],
                "start": len(row.prompt_token_ids),
                **({"images": list(row.images)} if row.images else {}),
            }
            for row in self.rollouts
        ]

    def assert_synced(self, version: PublishedVersion | PolicyRef | str, *, max_staleness: int = 0) -> None:
        """Raises `NotSynced` unless every span was sampled by `version` (an object with a digest, or the digest).

        With `max_staleness` above 0, also by a version of the same name and instance at most so many numbers older.
        A batch without any token proves nothing and raises too."""
        digests = getattr(self.rollouts, "digests", None)
        check_synced(self.rollouts, version, instance=self.instance, max_staleness=max_staleness, digests=digests)

    def padded(self, pad_token_id: int = 0, *, prompt_padding: Side = "left") -> dict[str, NDArray[Any]]:
        """The batch as rectangles [R, L], all aligned with `input_ids`: the value at column t is of the token at t, so
        it goes with the model's logits at column t − 1.

        `input_ids`, `attention_mask`, `position_ids`, `completion_mask`, `loss_mask` int32; `logprobs` and whichever of
        `sampling_logprobs`, `log_kept_mass`, `entropy`, `base_logprobs` were asked for float32. Outside completions all
        but the first three are 0; a token without a value has NaN there, so select with `where`, do not multiply.

        `prompt_padding="left"`: completions start at column `prompt_width` in every row and are padded on the right.
        `"right"`: all padding at the end, for models that take no padding mask, such as mlx-lm's."""
        per_token = {"loss_mask": self.loss_mask.astype(np.int32)}
        for name in LOGPROB_ARRAYS:
            array = getattr(self, name)
            if array is not None:
                per_token[name] = array
        rows = [(row.prompt_token_ids, row.token_ids) for row in self.rollouts]
        return pad(rows, per_token, pad_token_id=pad_token_id, prompt_padding=prompt_padding)

    def advantages(
        self, rewards: ArrayLike, *, scale_by_std: bool = True, epsilon: float = 1e-4
    ) -> NDArray[np.float32]:
        """GRPO advantages float32 [R] of rewards [R], each within the rows of its prompt; see `group_advantages`."""
        return group_advantages(rewards, self.prompt_index, scale_by_std=scale_by_std, epsilon=epsilon)

    def per_token(self, values: ArrayLike) -> NDArray[Any]:
        """Repeats one value per row [R] for each of its tokens [N]."""
        return np.repeat(host_array(values), self.lengths)

    def denominator(self, of: Denominator | str) -> NDArray[np.float32]:
        """What stands under the importance ratio, float32 [N]: `filtered` = `sampling_logprobs`, `tempered` =
        `sampling_logprobs + log_kept_mass`, `unmodified` = `logprobs`; see `Denominator` for which to take.

        Raises `ValueError` where it does not exist: not asked for, greedy rows under `tempered`, rows that were not
        sampled at temperature 1 without filter, penalty, bias or mask under `unmodified`."""
        of = Denominator(of)
        if of is Denominator.UNMODIFIED:
            for index, row in enumerate(self.rollouts):
                if changed := row.modified_by:
                    raise ValueError(
                        f"Row {index} was sampled with {changed}: its `logprobs` are not what was sampled."
                    )
            return self.logprobs
        if self.sampling_logprobs is None or self.log_kept_mass is None:
            raise ValueError(
                "The rollouts carry no sampling_logprobs: ask for them with returns=['sampling_logprobs']."
            )
        if of is Denominator.FILTERED:
            return self._whole(self.sampling_logprobs, "sampling_logprobs")
        return self._whole(self.sampling_logprobs + self.log_kept_mass, "log_kept_mass (greedy rows have none)")

    def _whole(self, values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        missing = np.isnan(values) & (self.loss_mask == 1)
        if missing.any():
            row = int(np.searchsorted(self.offsets, np.argmax(missing), side="right")) - 1
            raise ValueError(f"Row {row} has sampled tokens without {name}: there is no importance ratio for them.")
        return values


def _join(rows: Sequence[Rollout], name: str, dtype: DTypeLike) -> NDArray[Any] | None:
    """One flat array of all rows. None where no row has it; NaN for a row that lacks it where others do not."""
    parts = [getattr(row, name) for row in rows]
    if rows and all(part is None for part in parts):
        return None
    filled = (
        np.full(len(row.token_ids), np.nan) if part is None else part for row, part in zip(rows, parts, strict=True)
    )
    return np.concatenate([np.zeros(0, dtype), *filled], dtype=dtype, casting="same_kind")


def _rewards(rows: Sequence[Rollout]) -> dict[str, Any]:
    """Both arrays of rewards; neither where no row has one."""
    rewards = [row.reward for row in rows]
    scores = [() if reward is None else reward.scores for reward in rewards]
    if all(reward is None for reward in rewards):
        return {}
    labels = max(map(len, scores))
    table = np.array([own or (np.nan,) * labels for own in scores], np.float32).reshape(len(rows), labels)
    values = table[:, 0] if labels == 1 else np.full(len(rows), np.nan, np.float32)
    return {"rewards": values, "reward_scores": table}


def _join_top(rows: Sequence[Rollout]) -> dict[str, NDArray[Any] | None]:
    """`top_ids` and `top_logprobs` of all rows, [N, k] with the largest k of them; −1 and NaN where a row has fewer."""
    widths = [row.top_ids.shape[1] for row in rows if row.top_ids is not None]
    if not widths:
        return {}
    shape = (sum(len(row.token_ids) for row in rows), max(widths))
    ids, logprobs = np.full(shape, NO_TOKEN, np.int32), np.full(shape, np.nan, np.float32)
    end = 0
    for row in rows:
        start, end = end, end + len(row.token_ids)
        if row.top_ids is not None and row.top_logprobs is not None:
            ids[start:end, : row.top_ids.shape[1]] = row.top_ids
            logprobs[start:end, : row.top_ids.shape[1]] = row.top_logprobs
    return {"top_ids": ids, "top_logprobs": logprobs}
