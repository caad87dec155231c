"""Which replica gets a group: the one that has read most of its prompt, unless it has much more to do than others."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.fleet.ledger.prefixes import hashes
from rollout_server.fleet.ledger.records import Replica, Version, Work

KNOWN_SHARE = 0.3
"""A known beginning counts from this share of the prompt on."""
BUSIER, ROWS_BUSIER = 1.5, 8
"""A replica that knows a prompt may have so many times the rows of the least loaded one, and so many rows more."""


def place(work: Work, version: Version, candidates: Sequence[Replica]) -> Replica | None:
    """The replica for a group among those that may get rows; None where none has room, so that it waits its turn.
    `version` is what it will begin on, as far as anybody knows: KV is of one version."""
    free = [replica for replica in candidates if not replica.rows or replica.rows + work.counted <= replica.room]
    if not free:
        return None
    blocks = hashes(version, work.prompt)
    least = min(free, key=lambda replica: replica.rows)
    known = {replica.id: replica.prefixes.length(blocks) for replica in free}
    best = max(free, key=lambda replica: (known[replica.id], -replica.rows))
    bound = BUSIER * least.rows + ROWS_BUSIER
    chosen = best if known[best.id] >= KNOWN_SHARE * len(work.prompt) and best.rows <= bound else least
    chosen.prefixes.add(blocks)
    return chosen
