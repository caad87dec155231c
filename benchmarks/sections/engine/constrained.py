"""What grammars cost: tokens per second of 32 rows, none, 8 and all of them writing JSON by a schema.

`python -m benchmarks.sections.engine.constrained [--rounds 5] [--rows 32] [--json]`. The engine is driven turn by turn
in this process, the sides in turns. The model's random tokenizer has as many tokens as its logits, so that masks are as
large as real ones. `masks` is the time of the masks of one step alone, which runs beside the forward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import string
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.record import Measured, Scale, Section, ratio
from rollout_server.machine.blas import load_fast_blas

if TYPE_CHECKING:
    from rollout_server.engine.sampling.grammars import CompiledGrammar
    from rollout_server.grammar import Follower
    from tests.support.engine.driver import Driver

CONSTRAINED = 8
ASKED = 0.8
PROMPT = 100
STEPS, BLOCK = 32, 8
WARM = 6
NAME, VALUE = {"type": "string", "maxLength": 40}, {"type": "integer", "minimum": -1000, "maximum": 10**6}
ENTRY = {
    "type": "object",
    "properties": {"name": NAME, "value": VALUE, "tags": {"type": "array", "items": NAME, "maxItems": 4}},
    "required": ["name", "value", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ENTRY, "minItems": 500}
"""Far more than the timed steps can write."""
WHAT = (
    "Three engines on one model, driven turn by turn in this process, some turns of each after some of the others: "
    "none, 8 and all of 32 rows write JSON by a schema of nested objects, strings and numbers."
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sections.engine.constrained", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, taken in turns")
    parser.add_argument("--rows", type=int, default=32, help="rows of the batch, 8 of them with a grammar")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    if options.rounds < 1 or options.rows < CONSTRAINED:
        parser.error(f"--rounds must be at least 1 and --rows at least {CONSTRAINED}")
    print(load_fast_blas(), file=sys.stderr)  # Before anything imports mlx, hence the imports inside the functions.
    report = compare(options.rounds, options.rows)
    print(
        json.dumps(report, indent=2)
        if options.json
        else "\n".join(f"{name:<26} {value}" for name, value in report.items())
    )
    return 0


def section(scale: Scale) -> Section:
    """For `python -m benchmarks`."""
    sides, masks = measure(scale.rounds, 32)
    none, some = (Measured(label(count), "tok/s", tuple(sides[count].rates)) for count in (0, CONSTRAINED))
    every = Measured(label(32), "tok/s", tuple(sides[32].rates))
    return Section(
        "constrained",
        "Rows with a grammar",
        WHAT,
        (none, some, every, Measured("masks of 8 rows", "ms", tuple(masks))),
        (ratio("8 of 32 rows with a grammar / none", some, none, ASKED),),
        facts={"steps": STEPS, "prompt tokens": PROMPT, "vocabulary": 16384},
    )


def label(count: int) -> str:
    return f"{count} rows with a grammar" if count else "no row with a grammar"


def compare(rounds: int, rows: int) -> dict[str, Any]:
    """Medians; ratios within each round, of elapsed time and, for a busy machine, of the process's CPU time."""
    sides, masks = measure(rounds, rows)
    none, report = sides[0], {"rows": rows, "rounds": rounds, "masks_ms": round(statistics.median(masks), 3)}
    for count, side in sides.items():
        found: dict[str, Any] = {"tokens_per_s": round(statistics.median(side.rates), 1)}
        if count:
            within = [one / other for one, other in zip(side.rates, none.rates, strict=True)]
            of_cpu = [other / one for one, other in zip(side.cpu_s, none.cpu_s, strict=True)]
            found |= {"ratio": round(statistics.median(within), 3), "rounds": [round(each, 3) for each in within]}
            found |= {"cpu_ratio": round(statistics.median(of_cpu), 3)}
        report[label(count)] = found
    return report


@dataclass(slots=True)
class Side:
    """An engine of its own on the shared model. What a round took, tokens a second and seconds of the CPU's."""

    driver: Driver
    constrained: int
    rates: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def begin(self, compiled: CompiledGrammar, rows: int) -> None:
        """Seats the rows, the first of them under the grammar, and decodes until all is warm."""
        from tests.support.engine.driver import prompts_of

        prompts, count = prompts_of([PROMPT] * rows, 16384), self.constrained
        asked = {"max_tokens": STEPS + 2 * WARM + 4}
        self.ids = [self.driver.submit(prompts[count:], ignore_eos=True, **asked)] if count < rows else []
        self.ids += [self.driver.submit(prompts[:count], constraint=compiled, **asked)] if count else []
        self.driver.until(lambda: len(self.driver.batches.rows) == rows)
        self.driver.turn(WARM)

    @property
    def followers(self) -> list[Follower]:
        return [row.follower for row in self.driver.batches.rows if row.follower is not None]

    def end(self, rows: int) -> None:
        if len(self.driver.batches.rows) != rows or len(self.followers) != self.constrained:
            raise RuntimeError("Rows ended within the timed turns.")
        self.driver.finish(*self.ids)
        self.driver.until(lambda: not self.driver.batches.active)
        self.driver.events.clear()


def measure(rounds: int, rows: int) -> tuple[dict[int, Side], list[float]]:
    """The sides by how many of their rows have a grammar, and milliseconds of the masks of `CONSTRAINED` rows."""
    from benchmarks.model import VOCAB_SIZE, write_model
    from rollout_server.engine.sampling.grammars import Grammars, MaskFiller
    from rollout_server.grammar import Grammar, GrammarKind
    from tests.support.engine.driver import Driver

    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "qwen3-33m")
        fill_tokenizer(path / "tokenizer.json", VOCAB_SIZE)
        first = Driver.start(path, max_batch=rows, prefill_tokens=rows * PROMPT)
        others = [Driver.start(path, first.model, max_batch=rows, prefill_tokens=rows * PROMPT) for _ in range(2)]
    counts = (0, CONSTRAINED, rows)
    sides = {count: Side(driver, count) for count, driver in zip(counts, (first, *others), strict=True)}
    grammars = Grammars(first.model.host_tokenizer, VOCAB_SIZE, first.model.info.eos_token_ids)
    compiled = grammars.compile(Grammar(GrammarKind.JSON, json.dumps(SCHEMA)), "structured_outputs.json")
    filler, masks = MaskFiller(VOCAB_SIZE), []
    for number in range(rounds + 1):
        for side in sides.values():
            side.begin(compiled, rows)
        taken = time_blocks(list(sides.values()))
        began = time.perf_counter()
        filler.fill(sides[CONSTRAINED].followers)
        of_masks = 1e3 * (time.perf_counter() - began)
        for side, (seconds, cpu) in zip(sides.values(), taken, strict=True):
            side.end(rows)
            if number:
                side.rates.append(rows * STEPS / seconds)
                side.cpu_s.append(cpu)
        masks += [of_masks] if number else []
    return sides, masks


def time_blocks(sides: list[Side]) -> list[tuple[float, float]]:
    """Elapsed and CPU seconds of `STEPS` turns of each side, `BLOCK` of them in turn."""
    import mlx.core as mx

    taken = [(0.0, 0.0)] * len(sides)
    for _ in range(STEPS // BLOCK):
        for at, side in enumerate(sides):
            began, cpu = time.perf_counter(), time.process_time()
            side.driver.turn(BLOCK)
            mx.synchronize()
            taken[at] = (taken[at][0] + time.perf_counter() - began, taken[at][1] + time.process_time() - cpu)
    return taken


def fill_tokenizer(path: Path, vocabulary: int) -> None:
    """Adds tokens of two and three letters until there are as many as logits; ids of the others stay."""
    known = json.loads(path.read_text())
    vocab, merges = known["model"]["vocab"], known["model"]["merges"]
    taken = {*vocab.values(), *(token["id"] for token in known["added_tokens"])}
    free = iter(sorted(set(range(vocabulary)) - taken))
    for length in (2, 3):
        for letters in map("".join, product(string.ascii_lowercase, repeat=length)):
            id = next(free, None)
            if id is None:
                break
            if letters not in vocab:
                vocab[letters] = id
                merges.append([letters[:-1], letters[-1]])
    path.write_text(json.dumps(known))


if __name__ == "__main__":
    sys.exit(main())
