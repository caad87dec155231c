"""What fits into KV memory, counted in columns over all rows. Plain Python; knows neither arrays nor threads.

Whoever fills KV has an account here: rows, prompts that are kept for samples that wait, what is scored, and pictures
that the tower has read for what is read next. Arrays that
rows have left count only where the next step needs them gone. What is kept for later requests fills what all of them
leave, and gives way at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Cells = Callable[[], int]
"""Says a number of columns when it is asked."""


@dataclass(frozen=True, slots=True)
class _Account:
    cells: Cells
    after_step: Cells
    wanted: Cells


class KVLedger:
    """All accounts together fill at most `limit` columns. `leave(cells)` is told how many columns they do not need.

    `instead` says, by the name of an account, what it would come to fill; the others are asked."""

    def __init__(self, limit: int, leave: Callable[[int], None] = lambda _: None) -> None:
        self.limit = limit
        self._leave = leave
        self._accounts: dict[str, _Account] = {}

    def register(self, name: str, cells: Cells, *, after_step: Cells | None = None, wanted: Cells = lambda: 0) -> None:
        """Opens an account. `cells` are the columns that it may come to fill soon, `after_step` those of its arrays
        once the next step is done, `wanted` those for which it needs room kept so that it can begin."""
        self._accounts[name] = _Account(cells, after_step or cells, wanted)

    def used(self, **instead: int) -> int:
        """Columns that all of them may come to fill. Raises `KeyError` for a name that has no account."""
        if strange := instead.keys() - self._accounts.keys():
            raise KeyError(f"Nobody has a KV account of this name: {', '.join(sorted(strange))}.")
        total = 0
        for name, account in self._accounts.items():
            total += instead[name] if name in instead else account.cells()
        return total

    def fits(self, extra: int = 0, *, wanted: bool = False, **instead: int) -> bool:
        """Returns whether `extra` columns more fit; with `wanted`, beside the room that is kept for what cannot begin
        yet."""
        kept = sum(account.wanted() for account in self._accounts.values()) if wanted else 0
        return self.used(**instead) + kept + extra <= self.limit

    def fits_after_step(self) -> bool:
        """Returns whether all arrays fit once the next step is done."""
        return sum(account.after_step() for account in self._accounts.values()) <= self.limit

    def left_for(self, name: str) -> int:
        """Columns that the other accounts leave to this one."""
        return self.limit - self.used(**{name: 0})

    def leave_rest(self, **instead: int) -> None:
        """What is kept for later requests may fill what all accounts leave, and no more."""
        self._leave(max(0, self.limit - self.used(**instead)))
