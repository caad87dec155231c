"""Every family × LoRA, rsLoRA and DoRA on all linear layers: pushed as PEFT saved it, served over HTTP, and exported
back to where it came from."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.peers.conftest import Peer
from tests.support.peers import reference
from tests.support.peers.families import FAMILIES, load

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
XLSTM = ["q", "v", "fgate_preact", "proj_down"]

pytestmark = pytest.mark.parametrize("peer", list(FAMILIES), indirect=True, scope="module")


@pytest.mark.parametrize("kind", list(reference.KINDS))
def test_an_adapter_gives_what_it_gives_in_peft(peer: Peer, kind: str, tmp_path: Path) -> None:
    options = dict(reference.KINDS[kind])
    if kind == "dora" and FAMILIES[peer.family].experts:
        options["target_modules"] = ATTENTION  # PEFT has no DoRA for stacked experts, which all-linear includes.
    model = reference.adapted(peer.directory, **options)
    model.save_pretrained(tmp_path / "saved")
    pushed = peer.client.push(kind, tmp_path / "saved")
    assert not pushed.report["zero_modules"]
    peer.hold(model, kind, kind)
    if not experts_in(model):
        reference.unpack(peer.export(kind, "peft"), tmp_path / "exported")
        peer.hold(reference.reloaded(peer.directory, tmp_path / "exported"), kind, f"{kind}, exported")
        reference.unpack(peer.export(kind, "mlx"), tmp_path / "for mlx-lm", "adapters.safetensors")
        peer.hold_mlx_lm(model, tmp_path / "for mlx-lm", f"{kind}, in mlx-lm")
    else:
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            peer.export(kind, "peft")


def test_embeddings_are_those_of_transformers(peer: Peer, tmp_path: Path) -> None:
    targets = XLSTM if peer.family == "xlstm" else ATTENTION
    model = reference.adapted(peer.directory, target_modules=targets, r=3, lora_alpha=5)
    model.save_pretrained(tmp_path / "saved")
    peer.client.push("embeds", tmp_path / "saved")
    for policy, module in (("base", load(peer.directory)), ("embeds", model)):
        peer.hold_embeddings(module, policy)


def experts_in(model: reference.PeftModel) -> bool:
    return any(".experts." in name for name, _ in model.named_parameters() if "lora_" in name)
