"""A GPU for each process, and a refusal by name where there are too few."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout_server.config import GpuSettings
from rollout_server.errors import InvalidField
from rollout_server.machine.gpus import gpus_for


def test_each_process_gets_a_gpu_of_its_own(tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:41:00.0", "0000:81:00.0"):
        (tmp_path / name).mkdir()
    assert gpus_for(3, None, tmp_path) == ("0", "1", "2")
    assert gpus_for(2, None, tmp_path) == ("0", "1")
    assert gpus_for(2, ("3", "GPU-5af", "7"), tmp_path) == ("3", "GPU-5af")
    with pytest.raises(InvalidField, match="each with a GPU to itself, and there are 3 GPUs"):
        gpus_for(4, None, tmp_path)
    with pytest.raises(InvalidField, match="there are 0 GPUs"):
        gpus_for(1, (), tmp_path)


def test_which_may_be_used_is_what_cudas_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert GpuSettings().names is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert GpuSettings().names == ("2", "5")
