"""Pairs of texts as encoders of several families read them, over HTTP, against ids that are put together here: each
family's tokenizer has a template of its own, and not all tell the texts apart by types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer

from rollout_server.engine.model.encoders.load import read_encoder
from rollout_server.engine.model.encoders.passages import Passage
from rollout_server.engine.model.encoders.reading import read
from tests.support.golden_encoders import one_label, with_roberta_template, with_template
from tests.support.live_server import server_here, uncut
from tests.support.numbers.bounds import Network, assert_near

pytestmark = uncut("encoders")
NETWORK = Network(3, 24, 3)
TEXTS = ["the cat sat", "a dog", "he and the other one went on in the rain"]
QUERY = "who sat"
LONG = "the word " * 40
CONTEXT = 46
"""Positions of RoBERTa begin behind the pad token's id."""


@dataclass(frozen=True)
class Template:
    """How a family joins a pair: so many end tokens between the texts, and whether the second has another type."""

    family: str
    write: Callable[[Path], Path]
    between: int
    typed: bool


TEMPLATES = (
    Template("roberta", with_roberta_template, 2, False),
    Template("modernbert", with_template, 1, False),
    Template("deberta-v2", with_template, 1, True),
)


@dataclass(frozen=True)
class Served:
    url: str
    directory: Path
    template: Template

    def ask(self, path: str, **body: Any) -> Any:
        reply = httpx.post(f"{self.url}{path}", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def ids(self, text: str) -> list[int]:
        found: list[int] = AutoTokenizer.from_pretrained(self.directory).encode(text, add_special_tokens=False)
        return found

    def of_ids(self, one: Sequence[int], other: Sequence[int]) -> np.ndarray:
        """[1]: what the model gives for a pair by itself, joined by hand."""
        ((begin,), (end,)) = self.ids("<|user|>"), self.ids("<|end|>")
        first = (begin, *one, *[end] * self.template.between)
        second = (*other, end)
        types = (0,) * len(first) + (1,) * len(second) if self.template.typed else ()
        return read(read_encoder(self.directory), [Passage((*first, *second), types)], 1000)[0]


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda template: template.family)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    template: Template = request.param
    directory = template.write(one_label(tmp_path_factory.mktemp("pairs") / template.family, template.family))
    with server_here(directory) as live:
        yield Served(live.url, directory, template)


def test_a_pair_is_joined_as_its_family_joins_it(served: Served) -> None:
    query = served.ids(QUERY)
    wanted = [served.of_ids(query, served.ids(text)) for text in TEXTS]
    raw = served.ask("/score", text_1=QUERY, text_2=TEXTS, use_activation=False)
    for entry, values in zip(raw["data"], wanted, strict=True):
        assert_near([entry["score"]], values, NETWORK.of_logits(values, CONTEXT))
    special = 2 + served.template.between
    assert raw["usage"]["prompt_tokens"] == sum(len(query) + len(served.ids(text)) + special for text in TEXTS)
    results = served.ask("/rerank", query=QUERY, documents=TEXTS, use_activation=False)["results"]
    assert [entry["index"] for entry in results] == sorted(range(3), key=lambda at: -float(wanted[at][0]))
    swapped = [served.of_ids(served.ids(text), query) for text in TEXTS]
    assert np.abs(np.array(swapped) - np.array(wanted)).max() > 0.01, "the order of the texts is part of what is read"


@pytest.mark.parametrize("query_is_longer", [False, True])
def test_of_a_pair_that_is_too_long_the_longer_text_loses_its_beginning(served: Served, query_is_longer: bool) -> None:
    keep = 24
    short, long = served.ids(QUERY), served.ids(LONG)
    left = long[-(keep - len(short) - 2 - served.template.between) :]
    one, other = (left, short) if query_is_longer else (short, left)
    body = {"text_1": LONG, "text_2": [QUERY]} if query_is_longer else {"text_1": QUERY, "text_2": [LONG]}
    found = served.ask("/score", **body, truncate_prompt_tokens=keep, use_activation=False)
    assert found["usage"]["prompt_tokens"] == keep
    values = served.of_ids(one, other)
    assert_near([found["data"][0]["score"]], values, NETWORK.of_logits(values, CONTEXT))
