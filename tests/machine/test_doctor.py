"""The doctor passes this machine, and fails what is wrong by name."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from rollout_server.cli import app
from rollout_server.machine import doctor, selftest
from rollout_server.machine.blas import BlasChoice
from rollout_server.machine.device_defaults import USUAL_SHAPES, Device


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement on small matrices: its figure is not tested here."""
    monkeypatch.setattr(doctor, "measure_gflops", lambda: 1.0)


@pytest.mark.parametrize(("name", "check"), selftest.CHECKS, ids=[name for name, _ in selftest.CHECKS])
def test_this_machine_passes(name: str, check: object) -> None:
    assert callable(check)
    ok, detail = check()
    assert ok, f"{name}: {detail}"


def test_json_is_one_object_with_everything(quick: None) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["versions"]["mlx"].startswith("0.32.")
    assert {check["name"] for check in report["checks"]} >= {name for name, _ in selftest.CHECKS}
    assert report["device"] in ("cpu", "gpu") and report["memory"]["physical"] > 2**30
    assert report["bandwidth"] > 0
    assert set(report["defaults"]["Qwen3-0.6B"]) == {"max_batch", "prefill_tokens", "kv_memory"}
    assert set(report["blas"]) == {"name", "path", "threads", "reason", "fix"}


def test_table_names_every_check(quick: None) -> None:
    done = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for name, _ in selftest.CHECKS:
        assert f"passed    {name}: " in done.stdout
    assert "GFLOP/s" in done.stdout and " GB/s" in done.stdout


def test_it_says_what_a_server_would_choose_here_and_why() -> None:
    cpu, gpu = (doctor.usual_defaults(Device(80 * 2**30, 1.8e12, cpu=cpu)) for cpu in (True, False))
    assert cpu.keys() == gpu.keys() == USUAL_SHAPES.keys()
    assert {found.max_batch.value for found in cpu.values()} == {64}
    assert gpu["Qwen3-0.6B"].max_batch.value > gpu["Llama-3.1-8B"].max_batch.value > 64
    assert "Llama-3.1-8B" not in doctor.usual_defaults(Device(8 * 2**30, 1e11, cpu=False)), "it does not fit"


def test_its_table_has_the_defaults(quick: None) -> None:
    done = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "300"})
    shown = " ".join(done.stdout.split())
    for option in ("--max-batch is ", "--prefill-tokens is ", "--kv-memory is "):
        assert "defaults for Qwen3-0.6B. " in shown and option in shown


def test_corrupt_rows_fail_it(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What mlx before 0.32 did on Metal: right in row 0, wrong above."""
    rope = mx.fast.rope

    def corrupt(x: mx.array, *args: object, **kwargs: object) -> mx.array:
        rows = mx.arange(x.shape[0]).reshape(-1, 1, 1, 1)
        return mx.where(rows > 0, x, rope(x, *args, **kwargs))

    monkeypatch.setattr(mx.fast, "rope", corrupt)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    failed = [check["name"] for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert failed == ["RoPE, equal rows", "RoPE, rows at their own positions"]


def test_a_product_that_mlx_refuses_is_a_failed_check() -> None:
    def refused() -> tuple[bool, str]:
        raise RuntimeError("[metal] no device")

    (check,) = doctor.run_checks((("product", refused),))
    assert not check.ok and "[metal] no device" in check.detail


def test_old_mlx_is_refused_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_versions", lambda: {"mlx": "0.31.2", "mlx-cpu": "0.31.2"})
    report = doctor.examine()
    assert not report.ok and report.device == "none" and report.gflops is None
    assert [check.name for check in report.checks if not check.ok] == ["mlx version"]
    assert "0.31.2" in report.checks[0].detail and "0.32" in report.checks[0].detail


def test_mlx_that_cannot_be_loaded_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its CUDA build does without the driver."""
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.setattr(doctor, "load_fast_blas", lambda: BlasChoice(None, None, None, "BLAS: none."))
    report = doctor.examine()
    assert not report.ok and [check.name for check in report.checks if not check.ok] == ["mlx import"]


def test_versions_compare_as_numbers() -> None:
    assert doctor.check_version({"mlx": "0.32.0.dev1"}).ok
    assert doctor.check_version({"mlx": "1.0"}).ok
    assert not doctor.check_version({"mlx": "0.9.99"}).ok
    assert not doctor.check_version({}).ok


def test_two_backends_in_one_place_are_refused() -> None:
    assert doctor.check_backend({"mlx-metal": "0.32.4"}).ok
    assert not doctor.check_backend({}).ok
    both = doctor.check_backend({"mlx-cpu": "0.32.4", "mlx-cuda-13": "0.32.4"})
    assert not both.ok and "mlx-cpu and mlx-cuda-13" in both.detail


def test_speed_is_measured() -> None:
    assert doctor.measure_gflops(side=256, seconds=0.01) > 0
