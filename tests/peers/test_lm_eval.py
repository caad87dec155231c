"""lm-eval over HTTP against its own transformers backend on the same weights: base and adapter, both tokenizers."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rollout_server.demo
from examples.lm_eval import make_tasks
from tests.support import tiny_models
from tests.support.live_server import LiveServer, live_server
from trainer_client import RolloutClient

ROOT = Path(__file__).parents[2]
DEMO = Path(rollout_server.demo.__file__).parent / "model"
TASKS = ("additions", "addition_text", "addition_answers")
WINDOW = 200
"""Tokens of a window of `long_text`: lm-eval cuts longer documents. Its API models count one or two differently."""
LONG_TEXT = """
task: long_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""
BACKENDS: dict[str, dict[str, Any]] = {
    "huggingface": {"tokenizer_backend": "huggingface", "tokenizer": str(DEMO), "batch_size": 8},
    "remote": {"tokenizer_backend": "remote", "num_concurrent": 4},
}


def long_text(directory: Path) -> Path:
    """A task of documents in several windows, in scripts that take up to four bytes, and so tokens, a character."""
    draw = random.Random(0)
    alphabet = "abc 0123+=\n" + "äéïøß" + "你好世界" + "😀👩‍🚀" + "नमस्ते"
    rows = [{"text": "".join(draw.choices(alphabet, k=length))} for length in (3, 90, 400)]
    data = directory / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (directory / "long_text.yaml").write_text(LONG_TEXT.format(data=data), encoding="utf-8")
    return directory


def runs(url: str, adapter: Path) -> Iterator[dict[str, Any]]:
    """Every run of `lm_eval_runs`, named (what computes, policy)."""
    completions = f"{url}/v1/completions"
    for policy in ("base", "policy"):
        loaded = {"pretrained": str(DEMO), "dtype": "float32", "device": "cpu", "max_length": WINDOW}
        if policy != "base":
            loaded["peft"] = str(adapter)
        tasks = [*TASKS, "long_text"]
        yield {"name": f"hf {policy}", "model": "hf", "model_args": loaded, "tasks": tasks, "batch_size": 8}
        for name, options in BACKENDS.items():
            # Two less: one token is kept for a sampled one, one for the context of a window.
            asked = {"model": policy, "base_url": completions, "max_length": WINDOW + 2, **options}
            yield {"name": f"{name} {policy}", "model": "local-completions", "model_args": asked, "tasks": tasks}
    # Text instead of ids: documents of `long_text` would be cut inside of characters, by lm-eval.
    asked = {"model": "base", "base_url": completions, **BACKENDS["huggingface"], "tokenized_requests": False}
    yield {"name": "text base", "model": "local-completions", "model_args": asked, "tasks": list(TASKS)}
    chat: dict[str, Any] = {"tasks": ["addition_answers"], "apply_chat_template": True}
    loaded = {"pretrained": str(DEMO), "dtype": "float32", "device": "cpu"}
    asked = {"model": "base", "base_url": f"{url}/v1/chat/completions", "num_concurrent": 4}
    yield {"name": "hf chat", "model": "hf", "model_args": loaded, **chat}
    yield {"name": "local chat", "model": "local-chat-completions", "model_args": asked, **chat}


def quiet(directory: Path) -> dict[str, str]:
    """Nothing is looked for on a hub, nothing is left in the user's caches, and waiting threads do not spin."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "cache"), "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **offline, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Path]]:
    """With `policy`, and the directory of its adapter."""
    tensors, config = tiny_models.random_adapter(tiny_models.linear_layers(DEMO), 4, seed=1, strength=0.2)
    adapter = tiny_models.save_adapter(tmp_path_factory.mktemp("adapter"), tensors, config)
    with live_server(None) as live:
        with RolloutClient(live.url) as trainer:
            trainer.push("policy", adapter)
        yield live, adapter


@pytest.fixture(scope="module")
def found(server: tuple[LiveServer, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    live, adapter = server
    directory = long_text(tmp_path_factory.mktemp("tasks"))
    command = [sys.executable, "-m", "tests.support.peers.lm_eval_runs", str(directory)]
    command += [json.dumps(run) for run in runs(live.url, adapter)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=quiet(directory))
    assert ran.returncode == 0, ran.stderr[-5000:]
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def numbers(run: dict[str, Any], task: str) -> np.ndarray:
    return np.array([leaf for sample in run["samples"][task] for leaf in sample], dtype=np.float64)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("policy", "sent"),
    [(policy, backend) for policy in ("base", "policy") for backend in BACKENDS] + [("base", "text")],
)
def test_it_finds_over_http_what_it_finds_on_transformers(found: dict[str, Any], policy: str, sent: str) -> None:
    ours, theirs = found[f"{sent} {policy}"], found[f"hf {policy}"]
    gaps = {}
    for task in ours["metrics"]:
        assert ours["metrics"][task] == pytest.approx(theirs["metrics"][task], rel=1e-5), task
        if task != "addition_answers":
            gaps[task] = float(np.abs(numbers(ours, task) - numbers(theirs, task)).max())
    assert len(gaps) == 3 - (sent == "text") and max(gaps.values()) < 1e-3
    assert ours["samples"]["addition_answers"] == theirs["samples"]["addition_answers"]
    accuracy = ours["metrics"]["additions"]["acc,none"]
    logging.getLogger(__name__).info("%s, %s: accuracy %.3f, largest differences %s", policy, sent, accuracy, gaps)


@pytest.mark.timeout(1000)
def test_the_adapter_counts_and_stops_cut(found: dict[str, Any]) -> None:
    """Else the comparison above would see neither."""
    base, policy = found["remote base"], found["remote policy"]
    assert np.abs(numbers(base, "additions") - numbers(policy, "additions")).max() > 0.1
    assert base["samples"]["addition_answers"] != policy["samples"]["addition_answers"]
    answers = [text for sample in base["samples"]["addition_answers"] for text in sample]
    assert {"the ", "back"} & set(answers) and not any("sum is" in text for text in answers)
    assert 0.1 < base["metrics"]["additions"]["acc,none"] < 0.9


@pytest.mark.timeout(1000)
def test_chat_answers_are_those_of_transformers(found: dict[str, Any]) -> None:
    assert found["local chat"]["samples"] == found["hf chat"]["samples"]


@pytest.mark.timeout(300)
def test_the_command_runs_as_it_is_written(server: tuple[LiveServer, Path], tmp_path: Path) -> None:
    written = (ROOT / "examples" / "lm_eval" / "make_tasks.py").read_text(encoding="utf-8")
    lines = re.search(r"    lm_eval (--model.*?)\n\n", written, flags=re.DOTALL)
    assert lines is not None
    command = lines[1].replace("\\\\\n", " ").replace("http://127.0.0.1:8000", server[0].url).split()
    ran = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command],
        cwd=ROOT, capture_output=True, text=True, timeout=250, env=quiet(tmp_path),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert set(re.findall(r"^\|(\w+) *\|", ran.stdout, flags=re.MULTILINE)) == set(TASKS), ran.stdout


def test_the_data_is_what_the_script_writes(tmp_path: Path) -> None:
    make_tasks.main(tmp_path)
    for name in ("sums.jsonl", "texts.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "examples" / "lm_eval" / name).read_bytes()
