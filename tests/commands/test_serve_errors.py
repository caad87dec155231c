"""What keeps a server from starting, as its user reads it: the sentence says what to do."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout_server.errors import RolloutError
from rollout_server.http.sockets.unusable import holder_of, unusable
from rollout_server.machine.this_device import device_memory
from tests.engine.model.test_footprints import hollow
from tests.support import tiny_models
from tests.support.live_server import server_here


def refused(*options: str) -> str:
    """The last line on standard error of a `serve` that does not start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROLLOUT_")}
    done = subprocess.run(
        [sys.executable, "-m", "rollout_server", "serve", *options],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 1 and not done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("rollout-server: ")
    assert done.stderr.count(said.removeprefix("rollout-server: ")) == 1, f"it is said once: {done.stderr}"
    return said.removeprefix("rollout-server: ")


def refused_here(model: Path | None = None, **options: Any) -> str:
    """What such a `serve` would say, without a process: the one of a taken port shows how a sentence is printed."""
    with pytest.raises(RolloutError) as refusal, server_here(model, **options):
        pass
    return refusal.value.message


@pytest.mark.long
def test_a_taken_port_is_named_with_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        said = refused("--port", str(port))
    assert said.startswith(f"The address 127.0.0.1:{port} cannot be used: ")
    who = rf"process {os.getpid()} \(.*\) listens there\." if Path("/proc/net/tcp").exists() else "another program"
    assert re.search(who, said), said
    assert said.endswith("Stop it, or choose another port with --port; 0 takes a free one.")


def test_who_cannot_be_seen_is_not_named(tmp_path: Path) -> None:
    assert holder_of(1, tmp_path) is None
    (tmp_path / "net").mkdir()
    listens = "  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4242 1\n"
    (tmp_path / "net" / "tcp").write_text("  sl  local_address\n" + listens)
    assert holder_of(8000, tmp_path) is None and holder_of(8080, tmp_path) is None, "nobody has the socket open"
    fd = tmp_path / "17" / "fd"
    fd.mkdir(parents=True)
    (fd / "3").symlink_to("socket:[4242]")
    (tmp_path / "17" / "cmdline").write_bytes(b"python\0-m\0it\x1b")
    assert holder_of(8080, tmp_path) == r"process 17 (python -m it\x1b) listens there"
    assert holder_of(8081, tmp_path) is None


@pytest.mark.parametrize(
    ("host", "port", "error", "fix"),
    [
        ("127.0.0.1", 80, PermissionError(13, "Permission denied"), "--port"),
        ("192.0.2.1", 8000, OSError(99, "Cannot assign requested address"), "--host"),
        ("nowhere.invalid", 8000, socket.gaierror(-2, "Name or service not known"), "--host"),
    ],
)
def test_another_fault_of_the_address_says_which_option_mends_it(
    host: str, port: int, error: OSError, fix: str
) -> None:
    assert fix in unusable(host, port, error)


def test_an_address_of_another_machine() -> None:
    assert "--host" in refused_here(host="192.0.2.1", insecure=True)


def test_a_model_that_is_missing(tmp_path: Path) -> None:
    for model, found in ((tmp_path / "nowhere", "There is no directory"), (tmp_path, "holds no config.json")):
        said = refused_here(model)
        assert found in said and "config.json" in said and "Hub id" in said and "embedded" in said


@pytest.mark.long
def test_a_model_of_a_family_that_nobody_knows(tmp_path: Path) -> None:
    model = tiny_models.build("qwen3", tmp_path)
    (model / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "(unheard_of) could not be loaded: Model type unheard_of not supported." in refused(
        "--port", "0", "--model", str(model)
    )


@pytest.mark.long
def test_an_adapter_for_another_base(tmp_path: Path) -> None:
    other = tiny_models.build("qwen3", tmp_path / "other")
    tensors, config = tiny_models.random_adapter(tiny_models.linear_layers(other), 4, 1)
    adapter = tiny_models.save_adapter(
        tmp_path / "adapter", tensors, {**config, "base_model_name_or_path": "Owner/Other-1B"}
    )
    said = refused_here(adapters=(("policy", adapter),))
    assert said.startswith(f"--adapter policy={adapter}: The adapter does not fit the base; ")
    assert said.endswith(
        "If it was trained on another base (Owner/Other-1B, by its configuration), serve that one with --model."
    )
    (adapter / "adapter_model.safetensors").unlink()
    assert f"--adapter policy={adapter}: {adapter} holds neither" in refused_here(adapters=(("policy", adapter),))


def test_a_model_that_is_larger_than_the_device(tmp_path: Path) -> None:
    model = hollow(tmp_path / "model", 2 * device_memory())
    said = refused_here(model)
    assert re.search(r"The weights of \S+ take [\d.]+ GiB in memory, and this device has [\d.]+ GiB: ", said), said
    assert "smaller model" in said and "mlx_lm.convert -q" in said
    shutil.rmtree(model)


def test_more_memory_for_keys_and_values_than_there_is() -> None:
    said = refused_here(kv_memory=2 * device_memory())
    assert said.startswith("--kv-memory is ") and "give less, or leave the option out" in said


def test_models_that_do_not_fit_the_memory_given_for_them() -> None:
    said = refused_here(memory="1MB")
    assert "--memory is 976.6 KiB: give more" in said
