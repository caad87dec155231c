"""A model and a server for each family, and the table of differences that the run ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters

from rollout_server.engine.model.load import read_model
from tests.support import tiny_models
from tests.support.live_server import live_server
from tests.support.peers import families, reference
from trainer_client import RolloutClient

DIFFERENCES = pytest.StashKey[dict[str, dict[str, float]]]()
TOLERANCE = 1e-4
LENGTHS = (37, 16, 2)


@dataclass(frozen=True)
class Peer:
    """One family: its model on disk, and our server over it."""

    family: str
    directory: Path
    url: str
    client: RolloutClient
    prompts: list[list[int]]
    note: Callable[[str, str, float], None]

    def differences(self, model: reference.PeftModel, policy: str) -> tuple[float, float]:
        """Largest |Δ log-probability| against PEFT: (on prompts, on tokens sampled by the server)."""
        scored = self.client.logprobs(self.prompts, policy=policy)
        ours = np.split(scored.logprobs, scored.offsets[1:-1])
        theirs = reference.logprobs(model, self.prompts)
        on_prompts = max(float(np.max(np.abs(a[1:] - b))) for a, b in zip(ours, theirs, strict=True))
        rows = self.client.rollouts(self.prompts, policy=policy, n=2, max_tokens=24, seed=5, ignore_eos=True)
        on_samples = 0.0
        for row in rows:
            prompt, sampled = list(row.prompt_token_ids), list(row.token_ids)
            (every,) = reference.logprobs(model, [prompt + sampled])
            on_samples = max(on_samples, float(np.max(np.abs(every[len(prompt) - 1 :] - row.logprobs))))
        return on_prompts, on_samples

    def export(self, policy: str, format: str) -> bytes:
        """The newest version of a policy as a file."""
        number = self.client.policy(policy).live
        path = f"{self.url}/v1/weights/{policy}/{number}/export"
        return httpx.get(path, params={"format": format}).raise_for_status().content

    def hold(self, model: reference.PeftModel, policy: str, column: str) -> None:
        """Both differences are within the tolerance; they are noted for the table."""
        found = max(self.differences(model, policy))
        self.note(self.family, column, found)
        assert found <= TOLERANCE, f"{self.family}, {column}: max |Δlogprob| = {found:.1e}"

    def hold_embeddings(self, model: reference.torch.nn.Module, policy: str) -> None:
        """Last hidden states of length 1 are within the tolerance."""
        body = {"model": policy, "input": self.prompts}
        reply = httpx.post(f"{self.url}/v1/embeddings", json=body).raise_for_status().json()
        expected = reference.embeddings(model, self.prompts)["last"]
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        found = float(np.abs([entry["embedding"] for entry in reply["data"]] - expected).max())
        self.note(self.family, f"embeddings of {policy}", found)
        assert found <= TOLERANCE, f"{self.family}, embeddings of {policy}: max |Δ| = {found:.1e}"

    def hold_mlx_lm(self, model: reference.PeftModel, adapter: Path, column: str) -> None:
        """mlx-lm gives PEFT's numbers with the directory of an adapter exported for it, on a base that is right."""
        module = load_adapters(read_model(self.directory).module, str(adapter))
        module.eval()
        found = 0.0
        for ids, expected in zip(self.prompts, reference.logprobs(model, self.prompts), strict=True):
            logits = np.array(module(mx.array([ids]))[0, :-1], np.float64)
            every = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            found = max(found, float(np.abs(every[np.arange(len(ids) - 1), ids[1:]] - expected).max()))
        self.note(self.family, column, found)
        assert found <= TOLERANCE, f"{self.family}, {column}: max |Δlogprob| = {found:.1e}"


def noting(config: pytest.Config) -> Callable[[str, str, float], None]:
    """What puts a difference into the table that the run ends with: the largest of its family and column stays."""
    table = config.stash.setdefault(DIFFERENCES, {})

    def note(family: str, column: str, value: float) -> None:
        # A module that ran before may have put the table there, for other families.
        row = table.setdefault(family, {})
        row[column] = max(value, row.get(column, 0.0))

    return note


class Hold(Protocol):
    def __call__(
        self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], family: str, column: str
    ) -> None: ...


@pytest.fixture
def hold(request: pytest.FixtureRequest) -> Hold:
    """Notes how far numbers are from those that are right, passage by passage, and holds it against the tolerance."""
    note = noting(request.config)

    def within(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], family: str, column: str) -> None:
        gap = max(float(np.abs(own - other).max()) for own, other in zip(found, expected, strict=True))
        note(family, column, gap)
        assert gap <= TOLERANCE, f"{family}, {column}: max |Δ| = {gap:.1e}"

    return within


@pytest.fixture(scope="module")
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    family: str = request.param
    directory = families.build(family, tmp_path_factory.mktemp(family))
    generator = np.random.default_rng(3)
    prompts = [generator.integers(0, tiny_models.VOCAB_SIZE, size=length).tolist() for length in LENGTHS]
    with live_server(directory, "--keep-versions", "64") as live, RolloutClient(live.url) as client:
        yield Peer(family, directory, live.url, client, prompts, noting(request.config))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(DIFFERENCES, {})
    if not table:
        return
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    terminalreporter.section("the largest differences from transformers and PEFT")
    terminalreporter.write_line("| family | " + " | ".join(columns) + " |")
    terminalreporter.write_line("|---" * (len(columns) + 1) + "|")
    for family, row in table.items():
        cells = (f"{row[column]:.1e}" if column in row else "" for column in columns)
        terminalreporter.write_line(f"| {family} | " + " | ".join(cells) + " |")
