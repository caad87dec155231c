"""Grammars whose text spells tokens of their own: the text that a reply shows keeps to the grammar all the same."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from rollout_server.engine.sampling.grammars import Grammars, MaskFiller
from rollout_server.engine.sampling.spelling import Spelling
from rollout_server.grammar import Grammar, GrammarKind
from rollout_server.rollout import FinishReason
from tests.engine.batch.test_row_prefix import cut
from tests.laws.grids import corners
from tests.support import tiny_models
from tests.support.engine.driver import Driver

ADDED = (
    AddedToken("<think>", special=False),
    AddedToken("</think>", special=False, normalized=True),
    AddedToken("[CALL]", special=False, lstrip=True),
    AddedToken("<trim>", special=False, lstrip=True, rstrip=True),
    AddedToken("<|mark|>", special=True, rstrip=True),
    AddedToken("two words", special=False),
    AddedToken("naïve", special=False),
)
NAMES = (*(token.content for token in ADDED), *tiny_models.SPECIAL_TOKENS)
SHOWN = {"<think>", "</think>", "[CALL]", "<trim>", "two words"}
"""What a reply shows of them: special tokens are left out, and a byte-level decoder garbles what is no ASCII."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    directory = tiny_models.build("qwen3", tmp_path_factory.mktemp("spelling") / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for token in ADDED:
        tokenizer.add_tokens([token], special_tokens=token.special)
    tokenizer.save_pretrained(directory)
    return Driver.start(directory)


@pytest.fixture(scope="module")
def grammars(driver: Driver) -> Grammars:
    info = driver.model.info
    return Grammars(driver.model.host_tokenizer, info.vocab_size, info.eos_token_ids)


def grammars_of(name: str) -> dict[str, tuple[str, str]]:
    """For each way to write a grammar: its kind, and itself, made of a name; the text matches `pattern_of`."""
    quoted, escaped = json.dumps(name, ensure_ascii=False), re.escape(name).replace("/", r"\/")
    named = {"type": "object", "properties": {name: {"const": name}}, "required": [name], "additionalProperties": False}
    return {
        "regex": ("regex", f"x?{escaped}[ab]{{1,2}}{escaped}"),
        "choice": ("choice", json.dumps([f"x{name}a{name}", f"{name}b{name}"])),
        "lark": ("grammar", f'start: "x"? {quoted} INSIDE {quoted}\nINSIDE: /[ab]{{1,2}}/'),
        "lark with options": (
            "grammar",
            f'%llguidance {{"no_forcing": false}}\nstart: "x"? {quoted} ("a" | "b") {quoted}',
        ),
        "gbnf": ("grammar", f'root ::= "x"? {quoted} [ab] {quoted}'),
        "lark with a schema": ("grammar", f'start: %json {{"const": {quoted}}}'),
        "schema": ("json", json.dumps({"enum": [f"x{name}", name]})),
        "schema of an object": ("json", json.dumps(named)),
        "schema with a pattern": ("json", json.dumps({"type": "string", "pattern": f"^{re.escape(name)}a$"})),
    }


def fits(way: str, name: str, text: str) -> bool:
    if "schema" not in way:
        return re.fullmatch(f"x?{re.escape(name)}[ab]{{1,2}}{re.escape(name)}", text) is not None
    value = json.loads(text)
    return value in (name, f"x{name}", f"{name}a", {name: name})


@pytest.mark.parametrize(("name", "way"), corners(list(NAMES), list(grammars_of(""))))
def test_any_way_through_a_grammar_leads_to_a_text_of_it(name: str, way: str, grammars: Grammars) -> None:
    kind, text = grammars_of(name)[way]
    compiled = grammars.compile(Grammar(GrammarKind(kind), text, "" if kind == "json" else None), "structured_outputs")
    tokenizer = grammars._hugging_face
    filler, used = MaskFiller(grammars._vocabulary), set()
    for seed in range(12):
        draw, follower, ids = random.Random(seed), compiled.follow(()), list[int]()
        while tokenizer.eos_token_id not in ids:
            (mask,) = filler.fill([follower])
            assert follower.fault is None and len(ids) < 200
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
            ids.append(draw.choice(allowed))
            if ids[-1] == tokenizer.eos_token_id:
                assert follower.may_end
            else:
                follower.advance(ids[-1])
        assert fits(way, name, tokenizer.decode(ids, skip_special_tokens=True)), (ids, name)
        assert compiled.accepted(ids[:-1]) == len(ids) - 1
        used.update(ids[:-1])
    own = tokenizer.convert_tokens_to_ids(name)
    # A token that a reply shows is one way to write its name among several.
    assert (own in used) <= (name in SHOWN)
    if name in SHOWN and way == "regex":
        assert own in used


def test_rows_are_sampled_drawn_again_and_continued(driver: Driver, grammars: Grammars) -> None:
    """What a reasoning trainer asks for first."""
    tokenizer, (end,) = driver.model.host_tokenizer, driver.model.info.eos_token_ids
    pattern = "<think>[a-z]{1,9}</think>[0-9]{1,3}"
    compiled = grammars.compile(Grammar(GrammarKind.REGEX, pattern), "structured_outputs.regex")
    think = tokenizer.convert_tokens_to_ids("<think>")
    bias = ((think, 4.0),)
    rows = driver.generate([[1, 2, 3]], n=16, seed=1, constraint=compiled, max_tokens=60, logit_bias=bias)
    for row in rows:
        assert row.finish_reason is FinishReason.STOP and row.stop_reason == end
        assert re.fullmatch(pattern, tokenizer.decode(row.token_ids, skip_special_tokens=True))
    assert {row.token_ids[0] for row in rows} >= {think}
    assert all(found.exact for found in driver.replay(rows))
    row = next(row for row in rows if row.token_ids[0] == think)
    (again,) = driver.generate(
        [[1, 2, 3]], seeds=[[row.seed]], constraint=compiled, max_tokens=60, logit_bias=bias, prefix=cut(row, 2)
    )
    assert again.token_ids == row.token_ids


def test_a_grammar_names_tokens_whether_they_have_text_or_not(grammars: Grammars) -> None:
    tokenizer = grammars._hugging_face
    text = '// not <think> here\nstart: <think> /<think>a\\/<trim>/ "\\"<think>" <|mark|> <[0]>'
    compiled = grammars.compile(Grammar(GrammarKind.GRAMMAR, text), "structured_outputs.grammar")
    spelt = [*tokenizer.encode("<"), *tokenizer.encode("t"), *tokenizer.encode("hink>")]
    mark = tokenizer.convert_tokens_to_ids("<|mark|>")
    ids = tokenizer.encode('<think><think>a/<trim>"')
    assert compiled.accepted([*ids, *spelt, mark, 0]) == len(ids) + len(spelt) + 2
    assert compiled.accepted([*spelt]) == 0
    spelling = Spelling.of(tokenizer, grammars._vocabulary, [tokenizer.eos_token_id])
    number = tokenizer.convert_tokens_to_ids("<think>")
    assert spelling.numbered(text) == text.replace(" <think> /", f" <[{number}]> /")


@pytest.mark.parametrize(
    ("kind", "text"),
    [("regex", "[^\n]*"), ("json", '{"type": "string"}'), ("grammar", "start: /(.|\\n)+/ <[0]>")],
)
def test_marks_are_no_text_where_a_grammar_spells_none(kind: str, text: str, grammars: Grammars) -> None:
    """In a string of JSON they would begin reasoning or end a call."""
    compiled = grammars.compile(Grammar(GrammarKind(kind), text), "structured_outputs")
    follower = compiled.follow(grammars._hugging_face.encode('"'))
    (mask,) = MaskFiller(grammars._vocabulary).fill([follower])
    allowed = set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())
    ids = {name: grammars._hugging_face.convert_tokens_to_ids(name) for name in NAMES}
    assert {name for name, id in ids.items() if id in allowed} - {"<|end|>"} == {"[CALL]", "two words"}


def test_a_row_that_ends_outside_of_its_grammar_is_no_stop(driver: Driver, grammars: Grammars) -> None:
    """Its end token came before the mark behind which the grammar begins."""
    (end,) = driver.model.info.eos_token_ids
    mark = (driver.model.host_tokenizer.convert_tokens_to_ids("</think>"),)
    late = grammars.compile(Grammar(GrammarKind.REGEX, "[0-9]{3}", after=mark), "structured_outputs.regex")
    # As likely as each other behind the prompt, and likelier than all else.
    scored = driver.score([[7, 7, end], [7, 7, *mark]], [2, 2])
    bias = tuple((token, 3.0 - found.logprobs[-1]) for token, found in zip((end, *mark), scored, strict=True))
    rows = driver.generate([[7, 7]], n=24, seed=4, max_tokens=40, constraint=late, logit_bias=bias)
    reasons = set()
    for row in rows:
        began = mark[0] in row.token_ids
        reasons.add(row.finish_reason)
        if row.finish_reason is FinishReason.STOP:
            assert began and re.fullmatch("[0-9]{3}", driver.model.host_tokenizer.decode(row.token_ids[-4:-1]))
        else:
            assert row.finish_reason is FinishReason.ERROR and not began and row.token_ids[-1] == end
            assert row.error is not None and row.error.code == "grammar_fault" and "before" in row.error.message
    assert reasons == {FinishReason.STOP, FinishReason.ERROR}
