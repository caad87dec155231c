"""How many files a reader opens to follow one request: counted, not guessed.

`python -m benchmarks.studies.trips` serves the embedded model in this process, follows every call of our own code on
the event loop's and the engine's threads, and prints files, rooms, functions and calls of one `POST /v1/rollouts` (two
samples of eight tokens), one `POST /v1/weights` (LoRA), one turn of the loop that only decodes, and the step in it. Of
a request it says besides how many files it enters that such a turn does not, and how many only for metrics and the
page, which somebody who follows the request passes by. `--files` lists them all, with the functions that run in each.
Each request finds the engine at rest: what was left to do for the one before it is none of its own.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from litestar.testing import TestClient
from safetensors.numpy import save

import rollout_server
from rollout_server.config import ServerConfig
from rollout_server.machine.blas import load_fast_blas

OURS = Path(rollout_server.__file__).parent.parent
PACKAGES = ("rollout_server", "adapters")
TURN, STEP = ("loop.py", "turn"), ("batch.py", "step")
WATCHING = ("rollout_server/http/observing/", "rollout_server/http/metrics.py")
"""What is told of a request for metrics and the page alone."""
REST, TAKEN = ("loop.py", "_rest"), ("loop.py", "_apply")
"""What a turn calls that finds nothing to do, and what it calls when it was given something meanwhile."""
POLL_S, PATIENCE_S = 0.05, 120.0


@dataclass
class Trip:
    """Calls of our functions, by file and function."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.calls}

    @property
    def listed(self) -> str:
        """Each file with its lines, and the functions that ran in it."""
        lines = []
        for file in sorted(self.files):
            names = sorted({name for entered, name in self.calls if entered == file})
            length = len((OURS / file).read_text(encoding="utf-8").splitlines())
            lines.append(f"    {file} ({length} lines; {len(names)}: {', '.join(names)})")
        return "\n".join(lines)

    def __str__(self) -> str:
        rooms = {str(Path(file).parent) for file in self.files}
        return f"{len(self.files)} files in {len(rooms)} rooms, {len(self.calls)} functions, {self.calls.total()} calls"


@dataclass
class Follower:
    """A profiler's hook. `whole` takes every call; `turns` and `steps` those below one call of `TURN` and `STEP`."""

    whole: Trip | None = None
    turns: list[Trip] = field(default_factory=list)
    steps: list[Trip] = field(default_factory=list)
    inside: dict[tuple[str, str], FrameType] = field(default_factory=dict)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "return":
            for door in [door for door, begun in self.inside.items() if begun is frame]:
                del self.inside[door]
            return
        if event != "call" or not code.co_filename.startswith(str(OURS)):
            return
        file = str(Path(code.co_filename).relative_to(OURS))
        if not file.startswith(PACKAGES):
            return
        for door, trips in ((TURN, self.turns), (STEP, self.steps)):
            if (Path(file).name, code.co_name) == door and door not in self.inside:
                self.inside[door] = frame
                trips.append(Trip())
            if door in self.inside:
                trips[-1].calls[file, code.co_qualname] += 1
        if self.whole is not None:
            self.whole.calls[file, code.co_qualname] += 1

    def rest(self, client: TestClient[Any]) -> None:
        """Waits until the engine has found nothing more to do and nothing has come since, and the event loop has done
        what it was left. Raises `TimeoutError`."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            called = {(Path(file).name, name.rpartition(".")[2]) for file, name in list(self.turns[-1].calls)}
            if REST in called and TAKEN not in called:
                client.get("/v1/models").raise_for_status()  # Its turn is behind theirs.
                return
            time.sleep(POLL_S)
        raise TimeoutError("the engine does not come to rest")

    @contextmanager
    def following(self) -> Iterator[Trip]:
        self.whole = trip = Trip()
        try:
            yield trip
        finally:
            self.whole = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", action="store_true", help="list the files of each trip, and what runs in them")
    listing = parser.parse_args().files
    load_fast_blas()
    follower = Follower()
    threading.setprofile(follower)
    # The engine's side is imported on its own thread, which the hook has to see begin.
    from rollout_server.http.app import create_app

    with TestClient(create_app(ServerConfig())) as client:
        body = {
            "policy": "base",
            "prompts": [{"text": "12+13="}],
            "n": 2,
            "sampling": {"max_tokens": 8, "ignore_eos": True},
        }
        while client.get("/ready").status_code != 200:
            time.sleep(0.1)
        client.post("/v1/rollouts", json=body).raise_for_status()  # Lazy imports and first uses.
        follower.rest(client)
        with follower.following() as rollout:
            client.post("/v1/rollouts", json=body).raise_for_status()
        begun = len(follower.turns), len(follower.steps)
        client.post("/v1/rollouts", json=body | {"sampling": {"max_tokens": 60, "ignore_eos": True}}).raise_for_status()
        # Nobody joins and nobody leaves, and no clock says that it is time for something.
        turns, steps = follower.turns[begun[0] :], follower.steps[begun[1] :]
        turn, step = commonest(turns), commonest(steps)
        tensors, config = adapter()
        follower.rest(client)
        upload = {"config": ("adapter_config.json", json.dumps(config)), "weights": ("weights", save(tensors))}
        with follower.following() as push:
            client.post("/v1/weights", data={"name": "policy"}, files=upload).raise_for_status()
    threading.setprofile(None)  # type: ignore[arg-type]
    for name, trip in (
        ("POST /v1/rollouts", rollout),
        ("POST /v1/weights", push),
        ("a turn", turn),
        ("its step", step),
    ):
        watching = sum(file.startswith(WATCHING) for file in trip.files)
        # The loop turns for whatever runs: a reader who knows it opens the others.
        beside = f"; {len(trip.files - turn.files)} files beside a turn's, {watching} only for metrics and the page"
        print(f"{name:18} {trip}{beside if trip in (rollout, push) else ''}")
        if listing:
            print(trip.listed)


def commonest(trips: list[Trip]) -> Trip:
    """One that enters what most of them enter."""
    (files, _), *_ = Counter(frozenset(trip.files) for trip in trips).most_common()
    return next(trip for trip in trips if trip.files == files)


def adapter() -> tuple[dict[str, Any], dict[str, Any]]:
    """A LoRA of rank 4 on the queries of the embedded model's first layer: tensors and configuration."""
    model = json.loads((OURS / "rollout_server" / "demo" / "model" / "config.json").read_text())
    width, heads = model["hidden_size"], model["num_attention_heads"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    down = np.ones((4, width), np.float32)
    up = np.ones((heads * model.get("head_dim", width // heads), 4), np.float32)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, config


if __name__ == "__main__":
    main()
