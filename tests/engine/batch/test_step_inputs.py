"""What the rows of a step are computed with, of rows that are made here: no model, and no step."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from adapters.placement import Placement
from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.batch.step_inputs import GrammarMasks, StepInputs, TokenCounts, inputs_of, prepare_rows
from rollout_server.engine.sampling.grammars import Grammars
from rollout_server.errors import GrammarFault
from rollout_server.grammar import Grammar, GrammarKind
from rollout_server.rollout import PolicyAddress, PolicyVersion, RolloutRequest, SamplingParams, Wants
from tests.support.tiny_tokenizers import byte_level

VERSION = PolicyVersion("policy", 1, "sha256:1")
VOCABULARY = 8


def row_of(
    *prompt: int, sampled: tuple[int, ...] = (), seed: int = 0, slot: int = 0, wants: Wants | None = None, **params: Any
) -> Row:
    """A row that has sampled these tokens and waits for its next step."""
    sampling = SamplingParams(**({"max_tokens": 16} | params))
    request = RolloutRequest(
        "r", prompt, sampling, PolicyAddress("policy"), seeds=(seed,), wants=wants if wants is not None else Wants()
    )
    row = Row(Group(request), 0, seed, VERSION, Placement(slot=slot), None)
    for token in sampled:
        sample(row, token)
    return row


def sample(row: Row, token: int) -> None:
    row.stamp()
    row.record(token, (0.0, 0.0, 0.0, 0.0), None, frozenset())


def seen(counts: TokenCounts) -> list[list[int]]:
    """By row and token: twice how often it was sampled, and one more where it is in the prompt."""
    assert counts.seen is not None
    return [list(map(int, row)) for row in np.array(counts.seen)]


# ---- positions, columns, slots ------------------------------------------------------------------------------------


def test_places_that_take_no_part_have_no_column_and_some_row_s_slot() -> None:
    long, short = row_of(1, 2, 3, 4, sampled=(5, 6), seed=2**63 + 1, slot=3), row_of(7, seed=9, slot=1)
    inputs = StepInputs([(3, long), (1, short)], 5)
    assert inputs.offsets == [None, 0, None, 5, None]
    assert inputs.positions.tolist() == [0, 0, 0, 2, 0]
    assert inputs.seeds.tolist() == [0, 9, 0, 2**63 + 1, 0]
    assert inputs.slots() == [3, 1, 3, 3, 3]
    assert inputs.width == 6
    assert inputs.deltas is None and not inputs.masked


def test_a_slot_is_that_of_the_version_which_the_row_has_now() -> None:
    row = row_of(1, slot=2)
    inputs = StepInputs([(0, row)], 2)
    row.placement = Placement(slot=5)
    assert inputs.slots() == [5, 5]


def test_a_dispatched_step_moves_every_row_and_no_other_place() -> None:
    rows = row_of(1, 2), row_of(3, 4, 5, sampled=(6,))
    inputs = StepInputs(list(zip((2, 0), rows, strict=True)), 3)
    for step in (7, 8):
        inputs.advance(step)
        assert [row.last_step for row in rows] == [step, step]
    assert inputs.offsets == [5, None, 3] == [rows[1].offset, None, rows[0].offset]
    assert inputs.positions.tolist() == [3, 0, 2] == [rows[1].dispatched, 0, rows[0].dispatched]
    assert inputs.width == 6


def test_a_row_s_input_is_its_last_token_or_its_prompt_s() -> None:
    assert inputs_of({0: row_of(4, 5), 2: row_of(4, 5, sampled=(6, 7))}, 4).tolist() == [5, 0, 7, 0]


def test_a_batch_computes_what_any_of_its_rows_wants() -> None:
    rows = [row_of(1, wants=Wants(top_logprobs=3)), None, row_of(1, wants=Wants(entropy=True), temperature=0.0)]
    arrays = prepare_rows(rows, VOCABULARY, frozenset(), None)
    assert arrays.entropy and arrays.top_logprobs == 3 and not arrays.all_greedy
    plain = prepare_rows([row_of(1), None], VOCABULARY, frozenset(), None)
    assert not plain.entropy and plain.top_logprobs == 0 and plain.penalties is None


# ---- counts -------------------------------------------------------------------------------------------------------


def test_counts_are_of_the_penalised_rows_alone_and_grow_by_what_their_places_draw() -> None:
    plain, penalised = row_of(1), row_of(2, 2, 5, sampled=(5, 7), presence_penalty=1.0)
    counts = TokenCounts(VOCABULARY)
    counts.seat([plain, None, penalised])
    assert seen(counts) == [[0, 0, 1, 0, 0, 3, 0, 2]]
    counts.add(mx.array([4, 4, 5], dtype=mx.int32))
    assert seen(counts) == [[0, 0, 1, 0, 0, 5, 0, 2]]


def test_rows_that_move_and_meet_others_keep_counts_that_the_host_does_not_know_yet() -> None:
    first, second = (row_of(1, frequency_penalty=1.0) for _ in range(2))
    counts = TokenCounts(VOCABULARY)
    counts.seat([first, second])
    for row in (first, second):
        row.stamp()  # in flight: no token is recorded
    counts.add(mx.array([3, 6], dtype=mx.int32))
    third = row_of(4, sampled=(4,), repetition_penalty=2.0)
    counts.seat([None, third, second])
    assert seen(counts) == [[0, 0, 0, 0, 3, 0, 0, 0], [0, 1, 0, 0, 0, 0, 2, 0]]
    counts.add(mx.array([0, 1, 2], dtype=mx.int32))
    assert seen(counts) == [[0, 2, 0, 0, 3, 0, 0, 0], [0, 1, 2, 0, 0, 0, 2, 0]]


def test_a_row_that_sampled_elsewhere_meanwhile_is_counted_anew() -> None:
    row = row_of(1, presence_penalty=1.0)
    counts = TokenCounts(VOCABULARY)
    counts.seat([row])
    sample(row, 6)  # of which these counts were not told
    counts.seat([row])
    assert seen(counts) == [[0, 1, 0, 0, 0, 0, 2, 0]]


def test_a_row_is_not_counted_while_its_token_is_in_flight() -> None:
    row = row_of(1, presence_penalty=1.0)
    row.stamp()
    with pytest.raises(RuntimeError, match="in flight"):
        TokenCounts(VOCABULARY).seat([row])


def test_nothing_is_held_where_nobody_is_penalised_any_more() -> None:
    counts = TokenCounts(VOCABULARY)
    counts.seat([row_of(1, presence_penalty=1.0)])
    counts.seat([row_of(1), None])
    counts.add(mx.array([1, 1], dtype=mx.int32))
    assert counts.seen is None


# ---- masks --------------------------------------------------------------------------------------------------------


def test_masks_are_of_running_rows_with_a_grammar_in_the_order_of_their_places() -> None:
    tokenizer = byte_level()
    size, eos = len(tokenizer), 1
    grammars = Grammars(tokenizer, size, [eos])
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    options = [
        grammars.compile(Grammar(GrammarKind.CHOICE, json.dumps(texts)), "structured_outputs")
        for texts in (["a"], ["", "b"], ["", "b"])
    ]
    first, free, patient = (row_of(3, constraint=each, min_tokens=at // 2) for at, each in enumerate(options))
    over = row_of(3, constraint=options[0])
    over.fail(GrammarFault("over"))
    masks = GrammarMasks(size, frozenset({eos}))
    subset, failed = masks.of([(4, patient), (0, row_of(3)), (3, free), (1, over), (2, first)], 5)
    assert subset is not None and not failed
    words = np.array(subset.values)
    allowed = [{token for token in range(size) if mask[token // 32] >> (token % 32) & 1} for mask in words.tolist()]
    assert subset.rows is not None and subset.rows.tolist() == [2, 3, 4]
    # Only `patient` holds the end back, until it has the one token that min_tokens asks for.
    assert allowed == [{a}, {b, eos}, {b}]


def test_without_a_grammar_there_are_no_masks() -> None:
    assert GrammarMasks(VOCABULARY, frozenset()).of([(0, row_of(1))], 1) == (None, [])
