"""Every family × LoRA, rsLoRA and DoRA on all linear layers: pushed as PEFT saved it, served over HTTP, and exported
back to where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers import reference
from tests.peers.conftest import Peer
from tests.peers.families import FAMILIES

pytestmark = pytest.mark.parametrize("peer", list(FAMILIES), indirect=True, scope="module")


@pytest.mark.parametrize("kind", list(reference.KINDS))
def test_an_adapter_gives_what_it_gives_in_peft(peer: Peer, kind: str, tmp_path: Path) -> None:
    model = reference.adapted(peer.directory, **reference.KINDS[kind])
    model.save_pretrained(tmp_path / "saved")
    pushed = peer.client.push(kind, tmp_path / "saved")
    assert not pushed.report["zero_modules"]
    peer.hold(model, kind, kind)
