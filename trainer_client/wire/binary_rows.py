"""Binary replies: one safetensors file, whose arrays become the batch's own without a copy.

Rows are made when they are looked at. What no array can say comes as JSON in the metadata and is parsed then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainer_client.data.rollout import PER_TOKEN, Rollout, RowReward, Span
from trainer_client.data.versions import PolicyRef
from trainer_client.errors import BadReply
from trainer_client.wire.json_rows import reward_model, row_fields
from trainer_client.wire.replies import need, parse_json
from trainer_client.wire.safetensors_file import read_container

MEDIA_TYPE = "application/vnd.safetensors"
FINISH_REASONS = ("stop", "length", "superseded", "aborted", "error")
KV_KINDS = (None, "carried", "recomputed")
NO_VERSION = -1
_PER_ROW: Mapping[str, DTypeLike] = MappingProxyType(
    {"prompt_index": np.int32, "sample_index": np.int32, "seed": np.int64, "finish_reason": np.uint8}
)
_OFFSETS = ("offsets", "prompt_offsets", "span_offsets")


class ReplyFile:
    """The arrays of one reply, checked, and its metadata, parsed when asked for."""

    def __init__(self, content: bytes | bytearray) -> None:
        try:
            tensors, self._texts = read_container(content)
        except ValueError as error:
            raise BadReply(f"The server's reply is not a safetensors file: {error}.") from error
        self.arrays = {name: tensor.array for name, tensor in tensors.items()}
        if self._texts.get("format") != "1":
            raise BadReply(f"The server's reply has format {self._texts.get('format')!r}; this client reads '1'.")

    def array(self, name: str, dtype: DTypeLike, shape: tuple[int | None, ...], required: bool = True) -> Any:
        """One array of this dtype and shape (None is any size); None if it is absent and not `required`."""
        found = self.arrays.get(name)
        if found is None and not required:
            return None
        if found is None or found.dtype != dtype or len(found.shape) != len(shape):
            what = "is missing" if found is None else f"is {found.dtype}{list(found.shape)}"
            raise BadReply(f"The server's reply is not as the contract says: array {name!r} {what}.")
        if any(want not in (None, size) for want, size in zip(shape, found.shape, strict=True)):
            raise BadReply(f"The server's reply has {name} of shape {list(found.shape)}, where {list(shape)} fits.")
        return found

    def offsets(self, name: str, groups: int | None, total: int | None) -> NDArray[np.int64]:
        """Bounds of `groups` runs that tile `total` items; None is any number."""
        found: NDArray[np.int64] = self.array(name, np.int64, (None if groups is None else groups + 1,))
        ordered = len(found) > 0 and found[0] == 0 and bool((found[1:] >= found[:-1]).all())
        if not ordered or total not in (None, int(found[-1])):
            raise BadReply(f"The server's reply has {name} that do not divide what they should.")
        return found

    def json(self, name: str) -> Any:
        """One metadata string; None if it is absent."""
        text = self._texts.get(name)
        return None if text is None else parse_json(f'{{"value":{text}}}').get("value")


class BinaryRows(Sequence[Rollout]):
    """R rollouts of a reply file, each made when it is first looked at; their arrays are views of the reply."""

    def __init__(self, file: ReplyFile) -> None:
        self._file = file
        self.offsets = file.offsets("offsets", None, None)
        count, tokens = len(self.offsets) - 1, int(self.offsets[-1])
        required = ("token_ids", "loss_mask", "logprobs")
        self.per_token: dict[str, NDArray[Any]] = {}
        for name, dtype in PER_TOKEN.items():
            found = file.array(name, dtype, (tokens,), name in required)
            if found is not None:
                self.per_token[name] = found
        top_ids = file.array("top_ids", np.int32, (tokens, None), required=False)
        if top_ids is not None:
            self.per_token["top_ids"] = top_ids
            self.per_token["top_logprobs"] = file.array("top_logprobs", np.float32, top_ids.shape)
        self.per_row = {name: file.array(name, dtype, (count,)) for name, dtype in _PER_ROW.items()}
        self.rewards: dict[str, Any] = {}
        """`rewards` and `reward_scores` of a batch, where they were asked for."""
        rewards = file.array("reward", np.float32, (count,), required=False)
        if rewards is not None:
            scores = file.array("reward_scores", np.float32, (count, None))
            self.rewards = {"rewards": rewards, "reward_scores": scores}
        self._check_prompts()
        self._check_spans()
        self.reply: Mapping[str, Any] = file.json("reply") or {}
        self._about: Mapping[str, Any] = need(self.reply, "rollouts", dict)
        self._made: list[Rollout | None] = [None] * count

    def _check_prompts(self) -> None:
        self._prompt_offsets = self._file.offsets("prompt_offsets", None, None)
        tokens = int(self._prompt_offsets[-1])
        self._prompt_ids = self._file.array("prompt_token_ids", np.int32, (tokens,))
        self._prompt_logprobs = self._file.array("prompt_logprobs", np.float32, (tokens,), required=False)
        index = self.per_row["prompt_index"]
        if len(index) and not 0 <= index.min() <= index.max() < len(self._prompt_offsets) - 1:
            raise BadReply("The server's reply has rows of prompts that it does not hold.")
        if self.per_row["finish_reason"].max(initial=0) >= len(FINISH_REASONS):
            raise BadReply("The server's reply has a finish_reason that this client does not know.")

    def _check_spans(self) -> None:
        """The spans of each row tile its tokens: ends grow within a row, and the last is its length."""
        ends: NDArray[np.int64] = self._file.array("span_end", np.int64, (None,))
        bounds = self._file.offsets("span_offsets", len(self.offsets) - 1, len(ends))
        self._span_offsets, self._span_ends = bounds, ends
        self._span_versions = self._file.array("span_version", np.int32, (len(ends),))
        self._span_kinds = self._file.array("span_kv", np.uint8, (len(ends),))
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
        firsts, lengths = bounds[:-1][np.diff(bounds) > 0], np.diff(self.offsets)
        starts[firsts] = 0
        last = np.zeros_like(lengths)
        last[np.diff(bounds) > 0] = ends[bounds[1:][np.diff(bounds) > 0] - 1]
        if not (starts < ends).all() or not (last == lengths).all():
            raise BadReply("The versions of the server's reply do not tile the tokens of its rows.")
        if self._span_kinds.max(initial=0) >= len(KV_KINDS):
            raise BadReply("The server's reply has a span_kv that this client does not know.")

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, index: int) -> Rollout: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Rollout, ...]: ...
    def __getitem__(self, index: int | slice) -> Rollout | tuple[Rollout, ...]:
        if isinstance(index, slice):
            return tuple(self[at] for at in range(len(self))[index])
        at = range(len(self))[index]
        made = self._made[at]
        if made is None:
            made = self._made[at] = self._make(at)
        return made

    def __iter__(self) -> Iterator[Rollout]:
        return (self[at] for at in range(len(self)))

    def _make(self, at: int) -> Rollout:
        start, end = self._bounds[at]
        group = self._of_prompt[at]
        first, last = self._prompt_bounds[group]
        written: Mapping[str, Any] = self._written.get(str(at)) or {}
        fields: dict[str, Any] = dict.fromkeys((*PER_TOKEN, "top_ids", "top_logprobs"))
        fields |= {name: array[start:end] for name, array in self.per_token.items()}
        prompt_logprobs = None if self._prompt_logprobs is None else self._prompt_logprobs[first:last]
        fields |= {
            "prompt_index": group,
            "sample_index": self._samples[at],
            "prompt_token_ids": self._prompt_ids[first:last],
            "prompt_logprobs": prompt_logprobs,
            "spans": self._spans(at),
            "finish_reason": FINISH_REASONS[self._finished[at]],
            "stop_reason": self._stop_reasons[at],
            "seed": self._seeds[at],
            "text": None if self._texts is None else self._texts[at],
            "id": self._ids[at],
            "prompt_id": self._names_of_prompts[group],
            "error": None,
            "reward": self._reward(at),
            "sampling": self._sampling[at],
            "timings_ms": {name: column[at] for name, column in self._timings.items()},
        }
        # a row without an array that others have keeps its NaN, as rows of a JSON reply get them when they are joined
        overriding = {name: value for name, value in row_fields(written, f"row {at}").items() if value is not None}
        if "prompt_logprobs" in written:
            overriding["prompt_logprobs"] = overriding.get("prompt_logprobs")
        return Rollout(**{**fields, **overriding})

    def _reward(self, at: int) -> RowReward | None:
        """A row without one says why where it is written out."""
        if not self.rewards or self._reward_model is None:
            return None
        return RowReward(scores=tuple(self.rewards["reward_scores"][at].tolist()), version=self._reward_model)

    def _spans(self, at: int) -> tuple[Span, ...]:
        spans = []
        start = 0
        for place in range(*self._span_bounds[at]):
            number, end = int(self._span_versions[place]), int(self._span_ends[place])
            policy, about = self._versions.get(number, (None, {}))
            version = None if number == NO_VERSION else number
            kv = KV_KINDS[self._span_kinds[place]]
            spans.append(Span(policy, version, about.get("digest"), about.get("label"), start, end, kv))
            start = end
        return tuple(spans)

    @property
    def digests(self) -> set[str | None]:
        """Digests of the versions of all spans; None among them for tokens that came without one."""
        found = {self._digest(number) for number in np.unique(self._span_versions).tolist()}
        written = (span.get("digest") for row in self._written.values() for span in row.get("versions", ()))
        return found | set(written)

    def _digest(self, number: int) -> str | None:
        return self._versions.get(number, (None, {}))[1].get("digest")

    # ---- what all rows share, read when the first of them is made ----

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        return list(pairwise(self.offsets.tolist()))

    @cached_property
    def _prompt_bounds(self) -> list[tuple[int, int]]:
        return list(pairwise(self._prompt_offsets.tolist()))

    @cached_property
    def _span_bounds(self) -> list[tuple[int, int]]:
        return list(pairwise(self._span_offsets.tolist()))

    @cached_property
    def _of_prompt(self) -> list[int]:
        return self.per_row["prompt_index"].tolist()

    @cached_property
    def _samples(self) -> list[int]:
        return self.per_row["sample_index"].tolist()

    @cached_property
    def _seeds(self) -> list[int]:
        return self.per_row["seed"].tolist()

    @cached_property
    def _finished(self) -> list[int]:
        return self.per_row["finish_reason"].tolist()

    @cached_property
    def _versions(self) -> dict[int, tuple[str, Mapping[str, Any]]]:
        policies: Mapping[str, Mapping[str, Any]] = self._file.json("policies") or {}
        return {
            int(number): (policy, about) for policy, versions in policies.items() for number, about in versions.items()
        }

    @cached_property
    def _ids(self) -> list[Any]:
        return self._list("ids", len(self))

    @cached_property
    def _stop_reasons(self) -> list[Any]:
        return self._list("stop_reasons", len(self))

    @cached_property
    def _names_of_prompts(self) -> list[Any]:
        return self._list("prompt_ids", len(self._prompt_bounds))

    @cached_property
    def _texts(self) -> list[Any] | None:
        return None if self._file.json("texts") is None else self._list("texts", len(self))

    @cached_property
    def _sampling(self) -> list[Mapping[str, Any]]:
        distinct = need(self._about, "sampling", list)
        return [distinct[which] for which in _as_long(need(self._about, "sampling_of", list), len(self), "sampling_of")]

    @cached_property
    def _timings(self) -> dict[str, list[float]]:
        timings = need(self._about, "timings_ms", dict)
        return {name: _as_long(column, len(self), name) for name, column in timings.items()}

    @cached_property
    def _reward_model(self) -> PolicyRef | None:
        model = self._about.get("reward_model")
        return None if model is None else reward_model(model, "reply")

    @cached_property
    def _written(self) -> Mapping[str, Any]:
        return self._about.get("rows") or {}

    def _list(self, name: str, length: int) -> list[Any]:
        return _as_long(self._file.json(name), length, name)


def _as_long(values: Any, length: int, name: str) -> list[Any]:
    if not isinstance(values, list) or len(values) != length:
        raise BadReply(f"The server's reply needs a list of {length} {name}.")
    return values
