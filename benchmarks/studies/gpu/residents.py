"""Two models in one process, against each in a process of its own: whether their numbers are the same, and what each
costs the other.

`python -m benchmarks.studies.gpu.residents [--base SHAPE] [--beside SHAPE] [--rows 64] [--tokens 128] [--rounds 3]`. A
shape is tiny, as it is where none is named, 0.6B or 4B. The models are random ones of Qwen3's shapes in bfloat16, so
that both are of one family. First the same requests are sent to each model alone, beside the other one at rest, and
while the other one works: ids have to be equal, and log-probabilities but for the chunks that prompts were read in.
Then rows are sampled by each alone and by both at once, in turns; rates are of sampled tokens, prefill and HTTP
included. Prompts are in the prefix cache whenever it counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

import numpy as np  # noqa: E402

from benchmarks.studies.gpu.shapes import SHAPES, write_model  # noqa: E402
from rollout_server.config import ServerConfig  # noqa: E402
from rollout_server.http.server import served  # noqa: E402
from trainer_client import RolloutBatch, RolloutClient  # noqa: E402

BASE, BESIDE = "base", "beside"
PROMPT_TOKENS = 200


class Asking:
    """`names` are addresses of the models by what they are called here."""

    def __init__(self, client: RolloutClient, options: argparse.Namespace, names: dict[str, str]) -> None:
        self._client, self._options, self._names = client, options, names
        draw = np.random.default_rng(3)
        self._prompts = draw.integers(10, 4000, (options.rows, PROMPT_TOKENS)).tolist()

    def rows(self, model: str) -> RolloutBatch:
        tokens = self._options.tokens
        return self._client.rollouts(
            self._prompts, policy=self._names[model], max_tokens=tokens, ignore_eos=True, seed=7
        )

    def both(self) -> dict[str, RolloutBatch]:
        with ThreadPoolExecutor(2) as pool:
            return dict(zip((BASE, BESIDE), pool.map(self.rows, (BASE, BESIDE)), strict=True))

    def rates(self) -> dict[str, float]:
        """Sampled tokens a second of each alone, and of both together."""
        found = {}
        for name, work, models in (
            (BASE, lambda: self.rows(BASE), 1),
            (BESIDE, lambda: self.rows(BESIDE), 1),
            ("both at once", self.both, 2),
        ):
            began = time.perf_counter()
            work()
            found[name] = models * self._options.rows * self._options.tokens / (time.perf_counter() - began)
        return found


@contextmanager
def asking(options: argparse.Namespace, config: ServerConfig, names: dict[str, str]) -> Iterator[Asking]:
    with served(config) as url, RolloutClient(url) as client:
        yield Asking(client, options, names)


def same(one: RolloutBatch, other: RolloutBatch) -> str:
    """A sentence."""
    if not np.array_equal(one.token_ids, other.token_ids):
        return f"DIFFERENT at {int(np.argmax(one.token_ids != other.token_ids))} of {len(one.token_ids)} tokens"
    return f"equal, largest gap of log-probabilities {float(np.abs(one.logprobs - other.logprobs).max()):g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.gpu.residents", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--base", choices=SHAPES, default="tiny")
    parser.add_argument("--beside", choices=SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        paths = {name: write_model(Path(place) / name, getattr(options, name)) for name in (BASE, BESIDE)}
        alone = {}
        for name, path in paths.items():
            with asking(options, ServerConfig(model=str(path), port=0), {name: "base"}) as one:
                one.rows(name)
                alone[name] = one.rows(name)
        several = ServerConfig(model=str(paths[BASE]), also=((BESIDE, str(paths[BESIDE])),), port=0)
        with asking(options, several, {BASE: BASE, BESIDE: BESIDE}) as two:
            two.both()
            quiet, busy = {name: two.rows(name) for name in paths}, two.both()
            for name in paths:
                print(f"{name} beside the other at rest, against alone: {same(quiet[name], alone[name])}")
                print(f"{name} while the other works, against alone: {same(busy[name], alone[name])}")
            rounds = [two.rates() for _ in range(options.rounds + 1)][1:]
    for name in rounds[0]:
        print(f"{name:14} {statistics.median(found[name] for found in rounds):,.0f} tok/s")


if __name__ == "__main__":
    main()
