"""How many rollouts that see pictures are drawn again token for token.

`python -m benchmarks.studies.pictures.replayed [--seeds 2] [--families qwen3_vl gemma3] [--json]`: of the vision models
of tests/golden, 200 rows for each seed at temperature 1.1 and top-p 0.95, which are 50 samples of each of four
conversations: with no picture, one, two, and one in mid-conversation. A row that is not drawn again is a tie if the
uniform number of the draw fell nearer to the edge between two tokens than float32 tells them apart.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

from tests.support.engine.driver import recorded  # noqa: E402
from tests.support.pictures.seeing import Seeing, opened  # noqa: E402

SAMPLES, TOKENS = 50, 40
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3")
"""One of each kind: three axes, deepstack with them, both ways, placeholders that do not stand together."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.pictures.replayed")
    parser.add_argument("--seeds", type=int, default=2, help="runs of 200 rows for each family")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = {}
    for family in options.families:
        with opened(family) as seeing:
            runs = [run(seeing, seed) for seed in range(options.seeds)]
        found[family] = {key: sum(each[key] for each in runs) for key in runs[0]}
    every = list(found.values())
    found["all"] = {key: sum(each[key] for each in every) for key in every[0]}
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for family, counted in found.items():
        print(f"{family}: {counted['exact']} of {counted['rows']} rows exact, {counted['ties']} ties")


def run(seeing: Seeing, seed: int) -> dict[str, Any]:
    driver, conversations = seeing.start(), list(seeing.conversations.values())
    rows = driver.generate(
        [each.ids for each in conversations],
        pictures=[each.pictures for each in conversations],
        n=SAMPLES, max_tokens=TOKENS, seed=seed, temperature=1.1, top_p=0.95,
    )  # fmt: skip
    sent_back = [recorded(row, pictures=conversations[row.prompt_index].pictures) for row in rows]
    again = list(zip(rows, driver.replay(sent_back), strict=True))
    ties = [
        found.margin is not None and found.margin <= conversations[row.prompt_index].within
        for row, found in again
        if not found.exact
    ]
    return {"rows": len(rows), "exact": sum(found.exact for _, found in again), "ties": sum(ties)}


if __name__ == "__main__":
    main()
