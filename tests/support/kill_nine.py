"""Kill −9 at random moments while a trainer pushes: after each restart the live version is one that was acknowledged,
or was being acknowledged, and its weights are the ones that were pushed. Every third moment is that at which a record
has just been written: aliases have not moved then, which takes a fleet the longer the more replicas it has.

    python -m tests.support.kill_nine --kills 200 [--replicas 2]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import tiny_models
from tests.support.live_server import PATIENCE_S, LiveServer, live_server
from trainer_client import Retry, RolloutClient, TrainerClientError, adapter_digest
from trainer_client.adapter.tensors import host_tensors

NAME = "trained"
PROMPTS = [[5, 9, 33], [44]]


@dataclass
class Trainer:
    """Pushes one new adapter after another until the server dies; remembers what it was told."""

    model: Path
    step: int = 0
    digests: dict[str, int] = field(default_factory=dict)
    """Of everything that was ever sent, by step."""
    acknowledged: tuple[int, str] | None = None
    """Number and digest of the newest version a reply told of, or a restart served."""
    pushing: str | None = None
    """Digest of the push without a reply."""
    pushes: int = 0
    told: threading.Event = field(default_factory=threading.Event)
    """Set by every reply."""

    def adapter(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """LoRA and, every third time, DoRA, which takes longer to stage."""
        return tiny_models.random_adapter(tiny_models.linear_layers(self.model), 4, step, dora=step % 3 == 0)

    def push_until_death(self, url: str) -> None:
        with RolloutClient(url, retry=Retry(attempts=1)) as client:
            while True:
                self.step += 1
                tensors, config = self.adapter(self.step)
                digest = adapter_digest(host_tensors(tensors), config)
                if digest is None:
                    raise RuntimeError("the client computes no digest for a LoRA adapter")
                self.digests[digest], self.pushing = self.step, digest
                try:
                    version = client.push(NAME, tensors, config, label=f"step-{self.step}")
                except TrainerClientError:
                    return
                self.acknowledged, self.pushing = (version.version, version.digest), None
                self.pushes += 1
                self.told.set()


def run(model: Path, state: Path, kills: int, seed: int = 0, longest_s: float = 0.6, replicas: int = 1) -> Trainer:
    """Raises `AssertionError` with what was wrong after a restart. Returns what the trainer saw."""
    moments = random.Random(seed)
    options = ["--state-dir", str(state), "--keep-versions", "3"]
    options += ["--replicas", str(replicas)] if replicas > 1 else []
    trainer = Trainer(model)
    instances: set[str | None] = set()
    for kill in range(kills + 1):
        with live_server(model, *options) as server:
            if kill:
                instances.add(check(server, trainer))
            if kill == kills:
                break
            pusher = threading.Thread(target=trainer.push_until_death, args=(server.url,))
            trainer.told.clear()
            pusher.start()
            if kill % 2:  # However slow the machine is, some kills come after a push.
                trainer.told.wait(PATIENCE_S)
            if kill % 3 == 2:
                wait_for_record(state)
            else:
                time.sleep(moments.uniform(0.0, longest_s))
            server.process.kill()
            server.process.wait()
            pusher.join()
    if len(instances - {None}) > 1:
        raise AssertionError(f"the instance changed over restarts: {instances}")
    return trainer


def wait_for_record(state: Path) -> None:
    """Until the name's record is written once more."""

    def written() -> int:
        return max((path.stat().st_mtime_ns for path in state.glob("policies/*.json")), default=0)

    before, end = written(), time.monotonic() + PATIENCE_S
    while written() == before and time.monotonic() < end:
        pass


def check(server: LiveServer, trainer: Trainer) -> str | None:
    """What the server serves after it was killed, against what the trainer knows. Returns the instance."""
    log = "".join(server.log)
    if "torn or corrupted" in log or "is lost" in log:
        raise AssertionError(f"a file was torn:\n{log}")
    with RolloutClient(server.url) as client:
        lines = [line for line in client.weights() if line.name == NAME]
        if not lines:
            if trainer.acknowledged is not None:
                raise AssertionError(f"{trainer.acknowledged} was acknowledged, and the name is gone")
            return None
        (line,) = lines
        live = next((version for version in line.versions if version.version == line.live), None)
        if live is None:
            if trainer.acknowledged is not None:
                raise AssertionError(f"nothing is live, but {trainer.acknowledged} was acknowledged")
            return line.instance
        allowed = {digest for digest in (trainer.pushing, (trainer.acknowledged or (0, None))[1]) if digest}
        if live.digest not in allowed:
            raise AssertionError(f"{live} is live; acknowledged {trainer.acknowledged}, pushing {trainer.pushing}")
        if trainer.acknowledged is not None and live.version < trainer.acknowledged[0]:
            raise AssertionError(f"version {live.version} is live after {trainer.acknowledged} was acknowledged")
        for version in line.versions:
            step = trainer.digests[version.digest]
            if version.label != f"step-{step}":
                raise AssertionError(f"{version} was sent as step {step}")
            # What it exports, hashed here, and not only what it says of itself.
            exported = client.export(NAME, version.version)
            tensors, config = trainer.adapter(step)
            if exported.digest != adapter_digest(host_tensors(tensors), config):
                raise AssertionError(f"{version} exports {exported.digest}")
        # The weights as they are served: the same numbers as a fresh push of the same step.
        tensors, config = trainer.adapter(trainer.digests[live.digest])
        client.push("fresh", tensors, config)
        kept, fresh = (client.rollouts(PROMPTS, policy=name, max_tokens=4, seed=1) for name in (NAME, "fresh"))
        if kept.logprobs.tobytes() != fresh.logprobs.tobytes():
            raise AssertionError(f"{live} samples other numbers than a fresh push of it")
        # What a restart served stays, even if the next push dies before it is on disk.
        trainer.acknowledged = (live.version, live.digest)
        return line.instance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.build("qwen3", Path(folder) / "tiny")
        trainer = run(model, Path(folder) / "state", given.kills, given.seed, replicas=given.replicas)
    sys.stdout.write(f"{given.kills} kills, {trainer.pushes} acknowledged pushes, nothing lost, nothing torn\n")


if __name__ == "__main__":
    main()
