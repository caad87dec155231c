"""How models share a device's memory: arithmetic over tables of models."""

from __future__ import annotations

import pytest

from rollout_server.errors import InvalidField
from rollout_server.machine.device_defaults import ADAPTERS
from rollout_server.machine.memory_shares import Claim, Share, share_out

GIB, MIB = 2**30, 2**20
BASE = Claim("base", 8 * GIB, has_kv=True)
JUDGE = Claim("rm", GIB, has_kv=True)
ENCODER = Claim("enc", 512 * MIB, has_kv=False)


def used(claim: Claim, share: Share) -> int:
    return claim.weights + share.versions + (share.kv or 0)


@pytest.mark.parametrize(
    "claims",
    [
        [BASE],
        [BASE, JUDGE],
        [BASE, JUDGE, ENCODER],
        [BASE, Claim("rm", GIB, has_kv=True, versions=GIB)],
        [BASE, Claim("rm", GIB, has_kv=True, kv=GIB)],
        [Claim("base", 8 * GIB, has_kv=True, versions=GIB, kv=2 * GIB), ENCODER],
    ],
)
@pytest.mark.parametrize("memory", [16 * GIB, 70 * GIB])
def test_all_together_stay_within(claims: list[Claim], memory: int) -> None:
    shares = share_out(memory, claims)
    assert sum(share.memory for share in shares) <= memory
    for claim, share in zip(claims, shares, strict=True):
        assert used(claim, share) <= share.memory
        assert (
            share.versions >= claim.weights // ADAPTERS if claim.versions is None else share.versions == claim.versions
        )
        assert (share.kv is None) == (not claim.has_kv)
        if claim.kv is not None:
            assert share.kv == claim.kv


def test_what_is_left_goes_by_weights() -> None:
    base, judge, encoder = share_out(40 * GIB, [BASE, JUDGE, ENCODER])
    assert base.kv is not None and judge.kv is not None
    assert base.kv / judge.kv == pytest.approx(8, rel=1e-6) and encoder.versions > GIB // 2
    left = [share.memory - claim.least for claim, share in zip((BASE, JUDGE), (base, judge), strict=True)]
    assert left[0] / left[1] == pytest.approx(8, rel=1e-6)


def test_what_does_not_fit_is_refused_with_the_sum() -> None:
    needed = BASE.least + JUDGE.least
    assert share_out(needed, [BASE, JUDGE])
    with pytest.raises(InvalidField) as refused:
        share_out(needed - 1, [BASE, JUDGE])
    assert refused.value.param == "memory"
    assert "10.1 GiB together (base 9.0 GiB, rm 1.1 GiB" in refused.value.message
    with pytest.raises(InvalidField, match=r"rm 5\.1 GiB"):
        share_out(14 * GIB, [BASE, Claim("rm", GIB, has_kv=True, kv=4 * GIB)])
