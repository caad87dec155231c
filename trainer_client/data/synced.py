"""Checks that tokens were sampled by the version that the trainer thinks. A sync that silently does nothing is found
here."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trainer_client.data.rollout import Rollout, Span
from trainer_client.data.versions import PolicyRef, PublishedVersion
from trainer_client.errors import NotSynced


def check_synced(
    rollouts: Sequence[Rollout],
    expected: PublishedVersion | PolicyRef | str,
    *,
    instance: str | None,
    max_staleness: int = 0,
    digests: Collection[str | None] | None = None,
) -> None:
    """Raises `NotSynced` for the first span that is not of `expected` or, with `max_staleness` above 0, not of the same
    name at most that many numbers older. `instance` is that of the rollouts; `digests` those of all their spans, where
    that is known without looking at each."""
    if max_staleness < 0:
        raise ValueError(f"max_staleness must be at least 0, not {max_staleness}.")
    if not rollouts:
        raise NotSynced("The batch is empty: nothing shows which version would have sampled it.")
    if not any(len(row.token_ids) for row in rollouts):
        raise NotSynced(f"None of the {len(rollouts)} rows has a token: nothing shows which version sampled them.")
    digest = expected if isinstance(expected, str) else expected.digest
    if digests is not None and set(digests) == {digest}:
        return
    for index, row in enumerate(rollouts):
        for span in row.spans:
            if span.digest is None and not row.loss_mask[span.start : span.end].any():
                continue  # given text that no loss is taken from
            if span.digest == digest:
                continue
            where = (
                f"Row {index} (prompt {row.prompt_index}, sample {row.sample_index}), tokens {span.start}–{span.end}"
            )
            fault = _staleness_fault(span, expected, instance, max_staleness)
            if fault is not None:
                raise NotSynced(
                    f"{where}: sampled by {_span_name(span)}, expected {_name(expected)}{fault}.", row=index
                )


def _staleness_fault(
    span: Span, expected: PublishedVersion | PolicyRef | str, instance: str | None, max_staleness: int
) -> str | None:
    """None if another digest is allowed here, else the end of a sentence that says why it is not."""
    if max_staleness == 0:
        return ""
    if isinstance(expected, str) or span.version is None:
        return f"; max_staleness={max_staleness} needs version numbers on both sides"
    if span.policy != expected.name:
        return ", which is another policy"
    made_in = expected.instance if isinstance(expected, PublishedVersion) else instance
    if instance is None or made_in != instance:
        return f"; their numbers are of different server instances ({instance} and {made_in}), so cannot be compared"
    behind = expected.version - span.version
    if 0 <= behind <= max_staleness:
        return None
    return f"; {behind} versions behind, allowed are 0 to {max_staleness}"


def _span_name(span: Span) -> str:
    if span.digest is None:
        return "no known version"
    return f"{span.policy}@{span.version} ({span.digest[:19]}…)"


def _name(expected: PublishedVersion | PolicyRef | str) -> str:
    if isinstance(expected, str):
        return expected
    return f"{expected.name}@{expected.version} ({expected.digest[:19]}…)"
