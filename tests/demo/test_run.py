"""`rollout-server demo` as a whole, and what a third party can check afterwards."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from rollout_server.cli import app
from rollout_server.demo.run import DemoFailed, model_directory, run_demo, run_trainer, stop, wait_ready, what_next
from rollout_server.demo.trainer.report import GAP_LIMIT, draw
from rollout_server.demo.trainer.task import Problem, Style

KEYS = {
    "base_accuracy",
    "final_accuracy",
    "problems",
    "steps",
    "seconds",
    "max_abs_logprob_gap",
    "mean_abs_ratio_minus_one",
    "push_ms_p50",
    "push_ms_p95",
    "tokens_per_s",
    "final_version",
    "lenient_accuracy",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("demo") / "out"
    return output, run_demo(output, steps=2, seed=4, json_output=True)


@pytest.mark.long
def test_the_result_is_whole(finished: tuple[Path, dict[str, Any]]) -> None:
    output, result = finished
    assert json.loads((output / "result.json").read_text()) == result
    assert set(result) >= KEYS
    assert result["steps"] == 2
    assert result["final_version"] == 3
    assert result["problems"] >= 200
    assert result["max_abs_logprob_gap"] <= GAP_LIMIT
    assert result["mean_abs_ratio_minus_one"] <= GAP_LIMIT
    assert len((output / "steps.jsonl").read_text().splitlines()) == 2
    assert (output / "reward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_third_party_can_recompute_the_gap(finished: tuple[Path, dict[str, Any]]) -> None:
    """From the kept files alone, with mlx-lm's own loader: no code of the server or the trainer."""
    output, _ = finished
    model = mlx_lm.load(str(model_directory()), adapter_path=str(output / "adapter"))[0]
    model.set_dtype(mx.float32)
    kept = load_file(output / "rollouts.safetensors")
    prompts = [kept["prompt_token_ids"][a:b] for a, b in pairwise(kept["prompt_offsets"])]
    assert len(kept["token_ids"]) == len(kept["logprobs"]) == kept["offsets"][-1] > 0
    for row, (start, end) in list(enumerate(pairwise(kept["offsets"])))[::8]:
        prompt, completion = prompts[kept["prompt_index"][row]], kept["token_ids"][start:end]
        logits = model(mx.array(np.concatenate([prompt, completion]))[None])[0]
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[len(prompt) - 1 : -1]
        gap = logprobs[np.arange(end - start), completion] - kept["logprobs"][start:end]
        assert np.abs(gap).max() <= GAP_LIMIT


@pytest.mark.long
def test_a_third_party_can_recompute_the_accuracy(finished: tuple[Path, dict[str, Any]]) -> None:
    output, result = finished
    entries = [json.loads(line) for line in (output / "held_out.jsonl").read_text().splitlines()]
    assert len({entry["prompt"] for entry in entries}) == result["problems"]
    for name, key in (("base", "base_accuracy"), ("final", "final_accuracy")):
        right = [entry[name]["ended"] and entry[name]["text"] == entry["answer"] for entry in entries]
        assert sum(right) / len(right) == result[key]
    for entry in entries:
        problem = Problem(*map(int, entry["prompt"].removesuffix("=").split("+")))
        assert problem.held_out
        assert problem.answer(Style.DIGITS) == entry["answer"]


def test_a_server_that_does_not_start_is_reported_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("no room on this machine\n")
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(DemoFailed, match=r"status 3(.|\n)*no room on this machine"):
        wait_ready(ended, "http://127.0.0.1:9", log)


@pytest.mark.long
def test_a_trainer_that_fails_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url, model = "http://127.0.0.1:9", tmp_path / "nothing"
    with pytest.raises(DemoFailed, match="status"):
        run_trainer(["--url", url, "--model", str(model), "--output", str(tmp_path)])
    assert str(model) in capfd.readouterr().err


def test_a_process_that_does_not_listen_is_stopped() -> None:
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    deaf = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert deaf.stdout is not None
    deaf.stdout.readline()
    stop(deaf, patience_s=0.2)
    assert deaf.returncode == -9
    deaf.stdout.close()


def test_without_matplotlib_the_picture_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw(tmp_path / "reward.png", []) is False
    assert not (tmp_path / "reward.png").exists()


@pytest.mark.long
def test_a_demo_that_is_told_to_stop_takes_its_server_along(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from rollout_server.demo.run import ending_in_order, serving\n"
        "with ending_in_order(), serving(Path(sys.argv[1])) as url:\n    print(url, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "server.log")]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert demo.stdout is not None
        url = demo.stdout.readline().strip()
        assert httpx.get(f"{url}/ready").status_code == 200
        demo.terminate()
        assert demo.wait(30) == 128 + signal.SIGTERM
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/ready")
        demo.stdout.close()
    finally:
        demo.kill()


def test_the_end_says_where_the_plot_is_and_what_to_do_next(tmp_path: Path) -> None:
    output = tmp_path / "with a space"
    (output / "adapter").mkdir(parents=True)
    assert not any("reward.png" in line for line in what_next(output)), "what was not drawn is not shown"
    (output / "reward.png").touch()
    plot, rest, _, *commands, loop = what_next(output)
    assert plot.endswith(f" {(output / 'reward.png').as_uri()}") and rest.endswith(str(output))
    adapter = f"policy={output / 'adapter'}"
    for line, options in zip(commands, (["serve", "--adapter", adapter], ["generate", "12+13="]), strict=True):
        program, *words = shlex.split(line)[1:]
        assert program == "rollout-server" and words[: len(options)] == options
        assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0, line
    (example,) = re.findall(r"examples/\w+\.py", loop)
    assert (Path(__file__).parents[2] / example).is_file()
