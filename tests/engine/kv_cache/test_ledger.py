"""The KV ledger alone: what fits beside what."""

from __future__ import annotations

import pytest

from rollout_server.engine.kv_cache.ledger import KVLedger


def test_everybody_counts_and_whoever_asks_may_say_what_it_would_fill() -> None:
    ledger = KVLedger(100)
    filled = {"rows": 40, "prompts": 10, "scoring": 30}
    for name in filled:
        ledger.register(name, lambda name=name: filled[name])  # type: ignore[misc]
    assert ledger.used() == 80 and ledger.left_for("rows") == 60
    assert ledger.fits(20) and not ledger.fits(21)
    assert ledger.fits(rows=60) and not ledger.fits(rows=61)
    assert ledger.fits(70, rows=0, prompts=0) and not ledger.fits(71, rows=0, prompts=0)
    filled["scoring"] = 0
    assert ledger.left_for("rows") == 90


def test_whatever_joins_leaves_room_for_what_waits_to_begin() -> None:
    ledger = KVLedger(100)
    ledger.register("rows", lambda: 40)
    ledger.register("scoring", lambda: 0, wanted=lambda: 50)
    assert ledger.fits(rows=60) and ledger.fits(wanted=True, rows=50) and not ledger.fits(wanted=True, rows=51)


def test_arrays_that_rows_have_left_count_for_the_next_step_alone() -> None:
    ledger = KVLedger(100)
    ledger.register("rows", lambda: 40, after_step=lambda: 70)
    ledger.register("scoring", lambda: 30)
    assert ledger.fits() and ledger.fits_after_step()
    ledger.limit = 99
    assert ledger.fits() and not ledger.fits_after_step()


def test_what_is_kept_for_later_requests_fills_what_is_left() -> None:
    told: list[int] = []
    ledger = KVLedger(100, told.append)
    ledger.register("rows", lambda: 40)
    ledger.leave_rest()
    ledger.leave_rest(rows=90)
    ledger.leave_rest(rows=130)
    assert told == [60, 10, 0]


def test_a_name_without_an_account_is_no_silent_nothing() -> None:
    ledger = KVLedger(100)
    ledger.register("rows", lambda: 40)
    with pytest.raises(KeyError, match="row"):
        ledger.fits(row=50)
