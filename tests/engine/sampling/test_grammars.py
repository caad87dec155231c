"""Rows with a grammar: what they may sample, from what distribution, beside whom, and whether it can be drawn again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from rollout_server.engine.sampling.grammars import MOST_TEXT, CompiledGrammar, Grammars, hold_back
from rollout_server.errors import InvalidField, UnsupportedField
from rollout_server.grammar import Grammar, GrammarKind
from rollout_server.rollout import FinishReason, Rollout, SamplingParams, Wants
from tests.engine.batch.test_row_prefix import cut, prefix_of
from tests.support import tiny_models
from tests.support.engine.driver import Driver, prompts_of, recorded
from tests.support.numbers.bounds import TINY, assert_near

CHOICES = ["the", "this", "to", "in", "ing", "é€😀", "", 'q"\\\n']
REGEX = r"[a-f]{4,9}(=[0-9]{1,3}\.[0-9]{2})?"


@pytest.fixture(scope="module")
def grammars(bare_model: Any) -> Grammars:
    model = bare_model("qwen3")
    return Grammars(model.host_tokenizer, model.info.vocab_size, model.info.eos_token_ids)


def ready(grammars: Grammars, kind: str, text: str, whitespace: str | None = None) -> CompiledGrammar:
    return grammars.compile(Grammar(GrammarKind(kind), text, whitespace), "structured_outputs")


@pytest.fixture
def choice(grammars: Grammars) -> CompiledGrammar:
    return ready(grammars, "choice", json.dumps(CHOICES))


@pytest.fixture
def regex(grammars: Grammars) -> CompiledGrammar:
    return ready(grammars, "regex", REGEX)


def written_by(driver: Driver, row: Rollout) -> bytes:
    """What a row wrote, its end token left out; byte by byte, because a token may hold part of a character."""
    return b"".join(
        token_bytes(driver)[token] for token in row.token_ids if token not in driver.model.info.eos_token_ids
    )


def token_bytes(driver: Driver) -> dict[int, bytes]:
    """What each token of the byte-level tokenizer writes, from its own table; special ones write nothing here."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(hidden)}
    tokenizer = driver.model.tokenizer
    plain = {token: id for token, id in tokenizer.get_vocab().items() if id not in tokenizer.all_special_ids}
    return {id: bytes(table[char] for char in token) for token, id in plain.items()}


def logits_of(driver: Driver, row: Rollout) -> np.ndarray:
    """float64 [T, V] of a plain forward over prompt and tokens, at the positions whose tokens were sampled."""
    ids = mx.array([row.prompt_ids + row.token_ids[:-1]], dtype=mx.int32)
    logits = driver.model.forward(ids, driver.model.make_caches())[0].astype(mx.float32)
    return np.array(logits, dtype=np.float64)[len(row.prompt_ids) - 1 :]


def test_a_choice_is_sampled_from_the_masked_softmax(base: Driver, choice: CompiledGrammar) -> None:
    """The slow obvious path: every token of the vocabulary is tried against every choice."""
    table, (end,) = token_bytes(base), base.model.info.eos_token_ids
    wanted = [text.encode() for text in CHOICES]
    rows = base.generate(prompts_of([5, 9, 3, 12, 4], 286), n=16, seed=3, constraint=choice, temperature=1.6)
    for row in rows:
        assert row.finish_reason is FinishReason.STOP and row.stop_reason == end and row.token_ids[-1] == end
        so_far = b""
        for logits, token, sampling, kept, raw in zip(
            logits_of(base, row), row.token_ids, row.sampling_logprobs, row.log_kept_mass, row.logprobs, strict=True
        ):
            allowed = [t for t, part in table.items() if any(text.startswith(so_far + part) for text in wanted)]
            allowed += [end] if so_far in wanted else []
            left = np.full(len(logits), -np.inf)
            left[allowed] = logits[allowed] / 1.6
            assert token in allowed and kept == 0.0
            assert sampling == pytest.approx(left[token] - np.logaddexp.reduce(left), abs=TINY.of_row(row))
            assert raw == pytest.approx(logits[token] - np.logaddexp.reduce(logits), abs=TINY.of_row(row))
            if len(allowed) == 1:
                assert sampling == 0.0
            so_far += table.get(token, b"")
        assert so_far in wanted
    assert {written_by(base, row).decode() for row in rows} == set(CHOICES)


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", REGEX, REGEX),
        (
            "grammar",
            'start: "a" list "."\nlist: ITEM ("," ITEM){0,3}\nITEM: /[0-9]{1,3}/',
            r"a\d{1,3}(,\d{1,3}){0,3}\.",
        ),
        ("grammar", 'root ::= "x" pair{1,3}\npair ::= "(" [a-c] ")"', r"x(\([a-c]\)){1,3}"),
        ("json", '{"type": "integer", "minimum": -20, "maximum": 300}', r"-?\d{1,3}"),
    ],
)
def test_every_kind_of_grammar_is_kept_to(kind: str, text: str, pattern: str, base: Driver, grammars: Grammars) -> None:
    rows = base.generate(
        [[1, 2, 3]], n=16, seed=1, constraint=ready(grammars, kind, text), max_tokens=60, temperature=4.0
    )
    for row in rows:
        assert re.fullmatch(pattern, written_by(base, row).decode()), row
        assert row.finish_reason is FinishReason.STOP
    assert len({row.token_ids for row in rows}) > 2


def test_greedy_and_filtered_rows_keep_to_it(base: Driver, choice: CompiledGrammar) -> None:
    for sampling in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.3}, {"min_p": 0.9}):
        for row in base.generate(prompts_of([4, 6], 286), constraint=choice, **sampling):
            assert written_by(base, row).decode() in CHOICES
            if sampling == {"temperature": 0.0}:
                assert set(row.sampling_logprobs) == {0.0}


def test_neighbours_are_what_they_are_without(base: Driver, regex: CompiledGrammar) -> None:
    """Rows join and leave at other moments, with and without neighbours that have a grammar."""
    prompts = prompts_of([4, 9, 15, 6], 286)
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "min_tokens": 9, "logit_bias": ((5, 2.0),)},
    ]
    options: list[dict[str, Any]] = [{"max_tokens": 30, "seed": 9 + at, **way} for at, way in enumerate(ways)]
    wants = Wants(entropy=True, top_logprobs=3)
    alone = [base.submit([prompt], wants=wants, **given) for prompt, given in zip(prompts, options, strict=True)]
    base.finish(*alone)
    busy = [base.submit([prompts[0]], n=3, constraint=regex, max_tokens=20)]
    together = []
    for prompt, given in zip(prompts, options, strict=True):
        together.append(base.submit([prompt], wants=wants, **given))
        base.turn()
        busy.append(base.submit([prompt], constraint=regex, max_tokens=12))
    base.finish(*together, *busy)
    for before, after in zip(alone, together, strict=True):
        (lonely,), (beside,) = base.rollouts(before), base.rollouts(after)
        assert beside.token_ids == lonely.token_ids and beside.finish_reason == lonely.finish_reason
        for name in ("logprobs", "sampling_logprobs", "entropy"):
            times = 10 if name == "entropy" else 1
            assert_near(getattr(beside, name), getattr(lonely, name), times * TINY.of_row(lonely), name)
    for id in busy:
        for row in base.rollouts(id):
            assert row.finish_reason is FinishReason.LENGTH or re.fullmatch(REGEX.encode(), written_by(base, row))


def test_min_tokens_holds_back_the_end_until_nothing_else_can_come(base: Driver, grammars: Grammars) -> None:
    letters = ready(grammars, "regex", "[a-z]*")
    for row in base.generate([[1, 2]], n=8, constraint=letters, min_tokens=9, max_tokens=40, seed=2):
        assert len(row.token_ids) >= 10 or row.finish_reason is FinishReason.LENGTH
    short = ready(grammars, "regex", "[a-z]{2}")
    for row in base.generate([[1, 2]], n=8, constraint=short, min_tokens=9, max_tokens=40, seed=2):
        assert len(written_by(base, row)) == 2 and row.finish_reason is FinishReason.STOP
    words = np.array([0b0110, 0b0001], dtype=np.uint32)
    hold_back(words, [2, 32])
    assert words.tolist() == [0b0010, 0]
    hold_back(words, [1])
    assert words.tolist() == [0b0010, 0]


def test_stops_length_and_abort_end_a_row_as_ever(base: Driver, regex: CompiledGrammar, grammars: Grammars) -> None:
    endless = ready(grammars, "regex", "[a-d]*c[a-d]*")
    stopped, bounded, endured = (
        base.submit([[5, 6]], n=4, constraint=endless, stop=("c",), max_tokens=60, seed=1, temperature=2.0),
        base.submit([[5, 6]], n=4, constraint=regex, max_tokens=3, seed=1),
        base.submit([[5, 6]], n=2, constraint=endless, max_tokens=2000, min_tokens=1900),
    )
    base.finish(stopped, bounded)
    base.abort(endured)
    base.finish(endured)
    assert any(row.stop_reason == "c" for row in base.rollouts(stopped))
    assert all(len(row.token_ids) == 3 for row in base.rollouts(bounded))
    assert {row.finish_reason for row in base.rollouts(endured)} == {FinishReason.ABORTED}


def test_a_prefix_leads_into_the_grammar(base: Driver, regex: CompiledGrammar) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "seeds": [[77]], "constraint": regex}
    (whole,) = base.generate([[9, 8, 7]], **options)
    for at in (1, 3, len(whole.token_ids) - 1):
        (row,) = base.generate([[9, 8, 7]], prefix=cut(whole, at), **options)
        assert row.token_ids == whole.token_ids
    (row,) = base.generate([[9, 8, 7]], prefix=prefix_of(base.model.tokenizer.encode("abcd=")), **options)
    assert re.fullmatch(REGEX.encode(), written_by(base, row)) and b"=" in written_by(base, row)


def test_accepted_counts_the_tokens_that_fit(base: Driver, regex: CompiledGrammar) -> None:
    encode = base.model.tokenizer.encode
    assert regex.accepted(encode("abcd")) == len(encode("abcd"))
    assert regex.accepted([*encode("ab"), *encode("x"), *encode("ab")]) == len(encode("ab"))
    assert regex.accepted([]) == 0


def test_rows_follow_a_name_with_their_grammar(driver: Driver) -> None:
    model = driver.model
    grammars = Grammars(model.host_tokenizer, model.info.vocab_size, model.info.eos_token_ids)
    wide = ready(grammars, "regex", "([a-f]{3}[0-9]){8,}")
    driver.push("tuned", driver.bundle(1))
    id = driver.submit([[3, 4]], n=3, policy="tuned", on_update="switch", constraint=wide, max_tokens=48, min_tokens=40)
    driver.turn(8)
    driver.push("tuned", driver.bundle(2))
    driver.finish(id)
    for row in driver.rollouts(id):
        assert [span.version.number for span in row.spans] == [1, 2]
        assert re.match(b"([a-f]{3}[0-9])*[a-f]{0,3}$", written_by(driver, row))
    assert all(found.exact for found in driver.replay(driver.rollouts(id)))


def test_rows_are_drawn_again_under_their_masks(base: Driver, choice: CompiledGrammar, regex: CompiledGrammar) -> None:
    given: list[dict[str, Any]] = [
        {"constraint": choice},
        {"constraint": regex, "temperature": 0.8, "top_p": 0.9},
        {"constraint": regex, "temperature": 0.0, "min_tokens": 7},
        {"constraint": regex, "presence_penalty": 1.0, "repetition_penalty": 1.2},
        {},
    ]
    ids = [base.submit(prompts_of([6, 11], 286), n=3, seed=at, max_tokens=25, **each) for at, each in enumerate(given)]
    base.finish(*ids)
    rows = [row for id in ids for row in base.rollouts(id)]
    assert all(found.exact for found in base.replay(rows))
    # Without its grammar a row is another one, and a token that the grammar forbids could not have come.
    row = next(row for row in rows if row.sampling.constraint is regex and len(row.token_ids) > 8)
    (bare,) = base.replay([recorded(row, sampling=replace(row.sampling, constraint=None))])
    assert bare.first_difference is not None
    (wrong,) = base.replay([replace(row, token_ids=(*row.token_ids[:4], 5, *row.token_ids[5:]))])
    assert wrong.first_difference == 4 and wrong.margin is None


def test_a_grammar_that_meets_a_limit_fails_its_row_alone(base: Driver, regex: CompiledGrammar) -> None:
    """No grammar small enough for a test meets one: a row whose follower was led astray stands for it."""
    id = base.submit([[1, 2], [3, 4]], constraint=regex, max_tokens=12, min_tokens=8)
    base.until(lambda: base.status.running == 2 and base.status.steps >= 2)
    lost = next(row for row in base.batches.rows if row.group.request.prompt_index == 0)
    assert lost.follower is not None
    lost.follower.advance(5)
    base.finish(id)
    first, second = base.rollouts(id)
    assert first.error is not None and first.error.code == "grammar_fault" and "beyond token" in first.error.message
    assert first.finish_reason is FinishReason.ERROR and len(first.token_ids) >= 1
    assert second.error is None and second.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def byte_fallback_model(directory: Path) -> Path:
    """A tiny model whose tokenizer is as sentencepiece's: ▁ for spaces, characters it does not know as bytes."""
    special = ("<unk>", "<s>", "</s>")
    pieces = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdyesx[],",
        "ye",
        "yes",
        "▁y",
        "▁ye",
        "▁yes",
    ]
    merges = [("y", "e"), ("ye", "s"), ("▁", "y"), ("▁y", "e"), ("▁ye", "s")]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tiny_models.build("llama", directory, eos_token_id=2)
    made.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_tokenizers_with_byte_fallback_and_padded_logits(tmp_path: Path) -> None:
    driver = Driver.start(byte_fallback_model(tmp_path / "tiny"))
    tokenizer, info = driver.model.host_tokenizer, driver.model.info
    assert len(tokenizer) < info.vocab_size and info.eos_token_ids == (2,)
    pattern = r"[ab]é{1,2}( yes|x){2,4}😀"
    grammars = Grammars(tokenizer, info.vocab_size, info.eos_token_ids)
    rows = driver.generate([[5, 6]], n=16, constraint=ready(grammars, "regex", pattern), max_tokens=60, temperature=2.0)
    for row in rows:
        assert re.fullmatch(pattern, tokenizer.decode(row.token_ids, skip_special_tokens=True))
        assert row.stop_reason == 2
    assert all(found.exact for found in driver.replay(rows))
    with pytest.raises(UnsupportedField, match="vocab size"):
        ready(Grammars(tokenizer, 100, (2,)), "regex", "a")


def test_a_grammar_that_begins_behind_a_mark(base: Driver, grammars: Grammars) -> None:
    """As behind reasoning: everything before is as it would be without, but for the end tokens of `min_tokens`."""
    (end,) = base.model.info.eos_token_ids
    mark = tuple(base.model.tokenizer.encode("th"))
    late = grammars.compile(Grammar(GrammarKind.REGEX, "[0-9]{3}", after=mark), "structured_outputs.regex")
    bias = ((mark[0], 4.0),)
    free = base.generate([[7, 7, 7]], n=12, seed=6, max_tokens=60, logit_bias=bias)
    rows = base.generate([[7, 7, 7]], n=12, seed=6, max_tokens=60, logit_bias=bias, constraint=late)
    reached = 0
    for row, without in zip(rows, free, strict=True):
        at = row.token_ids.index(mark[0]) + 1 if mark[0] in row.token_ids else len(row.token_ids)
        assert row.token_ids[:at] == without.token_ids[:at]
        if at + 3 < len(row.token_ids):
            reached += 1
            assert re.fullmatch(rb"[0-9]{3}", written_by(base, replace(row, token_ids=row.token_ids[at:])))
            assert row.token_ids[-1] == end
    assert reached > 3 and all(found.exact for found in base.replay(rows))
    assert late.accepted([1, 2, *mark, *base.model.tokenizer.encode("12x")]) == 5


# ---- compiling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "a(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("json", '{"type": "frob"}', "Invalid type: frob"),
        ("json", '{"not": {}}', "Unimplemented keys"),
        ("json", '{"type": "array", "minItems": 2, "maxItems": 1}', "Unsatisfiable"),
        ("json", '{"$ref": "http://example.org/schema"}', "not present in a registry"),
        ("json", '{"$ref": "#"}', "NoExtension"),
        ("json", "[]", "object schema"),
        ("grammar", 'start: "a" unknown', "unknown name"),
        ("grammar", "start: start", "NoExtension"),
        ("grammar", "nothing here", "GBNF"),
        ("regex", "a" * (MOST_TEXT + 1), "at most"),
    ],
)
def test_what_cannot_be_compiled_is_named(kind: str, text: str, words: str, grammars: Grammars) -> None:
    with pytest.raises(InvalidField) as raised:
        ready(grammars, kind, text)
    error = raised.value
    assert error.param == "structured_outputs" and error.message.startswith("structured_outputs")
    assert words in error.message and "\n" not in error.message and len(error.message) < 400


def test_compiled_grammars_are_kept(grammars: Grammars) -> None:
    first = ready(grammars, "regex", "kept?")
    assert ready(grammars, "regex", "kept?") is first
    assert ready(grammars, "regex", "other") != first
    for at in range(300):
        ready(grammars, "choice", json.dumps([f"word {at}"]))
    again = ready(grammars, "regex", "kept?")
    assert again is not first and again == first and hash(again) == hash(first)


def test_models_without_an_end_and_other_tokenizers_are_refused(bare_model: Any) -> None:
    tokenizer = bare_model("qwen3").host_tokenizer
    for grammars in (Grammars(tokenizer, 320, ()), Grammars(object(), 320, (1,))):
        with pytest.raises(UnsupportedField, match=r"an end token|tokenizer"):
            ready(grammars, "regex", "a")


def test_ignore_eos_contradicts_a_grammar(choice: CompiledGrammar) -> None:
    with pytest.raises(InvalidField) as raised:
        SamplingParams(max_tokens=3, ignore_eos=True, constraint=choice)
    assert raised.value.param == "ignore_eos"
