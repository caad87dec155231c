"""`python -m tests.schema`: at least 2,000 requests made up from /schema/openapi.json by schemathesis, valid and broken
ones, against a real server. Fails on a 5xx, on a reply that the schema does not describe, on too few requests, and
where too few of them were good ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rollout_server.demo
from tests.support import tiny_models
from tests.support.live_server import live_server
from trainer_client import RolloutClient

LEAST, LEAST_DONE = 2_000, 20
ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/rollouts",
    "/v1/embeddings",
    "/v1/logprobs",
    "/v1/replay",
    "/v1/probe",
    "/tokenize",
    "/detokenize",
    "/v1/abort",
    "/classify",
    "/pooling",
    "/score",
    "/rerank",
    "/v1/rewards",
    "/get_reward",
)
RUNS = {
    "all": ("--phases", "coverage,fuzzing", "--max-examples", "40"),
    "valid": ("--phases", "fuzzing", "--mode", "positive", "--include-method", "POST", "--max-examples", "100"),
}
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


def command(url: str, report: Path, arguments: Sequence[str]) -> list[str]:
    program = str(Path(sys.executable).with_name("schemathesis"))
    options = ["--checks", ",".join(CHECKS), "--seed", "1", "--continue-on-failure", "--request-timeout", "60"]
    # One of them would end the test of all others: nothing is sampled any more.
    options += ["--exclude-path-regex", r"/(pause|resume)$"]
    options += ["--suppress-health-check", "all", "--warnings", "off", "--report", "json"]
    return [program, "run", f"{url}/schema/openapi.json", *options, "--report-json-path", str(report), *arguments]


def reward_model(base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Tensors, adapter_config.json) as PEFT saves one for `SEQ_CLS`."""
    tensors, config = tiny_models.random_adapter(tiny_models.linear_layers(base), 4, 2)
    width = json.loads((base / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    tensors["base_model.model.score.weight"] = np.ones((1, width), np.float32) / width
    return tensors, {**config, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}


def main() -> int:
    demo = Path(rollout_server.demo.__file__).parent / "model"
    # No request can ask for more than the machine gives in a moment.
    bounds = ("--max-rows-per-request", "16", "--context-length", "256", "--max-upload", "2000000")
    made, failed = 0, False
    with live_server(None, *bounds) as server, tempfile.TemporaryDirectory() as directory:
        with RolloutClient(server.url) as trainer:
            trainer.push("policy", *tiny_models.random_adapter(tiny_models.linear_layers(demo), 4, 1))
            trainer.push("rm", *reward_model(demo))
        for name, arguments in RUNS.items():
            report = Path(directory) / f"{name}.json"
            hooks = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.schema.hooks"}
            run = subprocess.run(command(server.url, report, arguments), env=hooks, check=False)
            made += json.loads(report.read_text(encoding="utf-8"))["test_cases"]["generated"]
            failed |= run.returncode != 0
    done = Counter(found[1] for line in server.log if (found := re.search(r"POST (/\S+) 20[01] ", line)))
    lazy = [route for route in ROUTES if done[route] < LEAST_DONE]
    counts = ", ".join(f"{route} {done[route]}" for route in ROUTES)
    sys.stdout.write(f"{made} requests; of these succeeded: {counts}\n")
    return int(failed or made < LEAST or bool(lazy))


if __name__ == "__main__":
    sys.exit(main())
