from __future__ import annotations

from typing import Any

import pytest

from tests.trainer_client import contract
from trainer_client.data.batch import RolloutBatch
from trainer_client.data.versions import PolicyRef, PublishedVersion
from trainer_client.errors import NotSynced
from trainer_client.wire.parsing import parse_published, parse_reply

VERSION = parse_published(contract.reply(contract.published()), None)


def batch(*rows: dict[str, Any], **fields: Any) -> RolloutBatch:
    return parse_reply(contract.reply(contract.rollouts(*rows, **fields)))


def row_of(*spans: dict[str, Any], **fields: Any) -> dict[str, Any]:
    tokens = tuple(range(3, 3 + spans[-1]["end"]))
    return contract.row(2, 1, tokens, versions=list(spans), **fields)


OLDER = row_of(contract.span(5, 0, 1, contract.OTHER_DIGEST), contract.span(7, 1, 3))


@pytest.mark.parametrize("expected", [VERSION, contract.DIGEST, PolicyRef("policy", 7, contract.DIGEST)])
def test_rows_of_the_version_pass(expected: PublishedVersion | PolicyRef | str) -> None:
    batch(contract.row(), contract.row(0, 1), contract.row(0, 2, ())).assert_synced(expected)


def test_equal_weights_under_another_number_or_instance_are_the_same_weights() -> None:
    batch(row_of(contract.span(3, 0, 2, policy="copy")), instance="another").assert_synced(VERSION)


@pytest.mark.parametrize("expected", [VERSION, contract.DIGEST])
def test_one_foreign_span_is_found_and_its_row_named(expected: PublishedVersion | str) -> None:
    with pytest.raises(NotSynced, match=r"Row 1 \(prompt 2, sample 1\), tokens 0–1: sampled by policy@5") as caught:
        batch(contract.row(), OLDER).assert_synced(expected)
    assert caught.value.row == 1


def test_the_same_number_with_another_digest_is_found() -> None:
    with pytest.raises(NotSynced):
        batch(row_of(contract.span(7, 0, 2, contract.OTHER_DIGEST))).assert_synced(VERSION)


def test_an_empty_batch_proves_nothing() -> None:
    with pytest.raises(NotSynced, match="empty"):
        batch().assert_synced(VERSION)
    with pytest.raises(NotSynced, match="None of the 2 rows has a token"):
        batch(contract.row(0, 0, ()), contract.row(0, 1, ())).assert_synced(VERSION)


def test_staleness_is_counted_in_versions_of_one_name_and_instance() -> None:
    given = batch(OLDER)
    given.assert_synced(VERSION, max_staleness=2)
    with pytest.raises(NotSynced, match="2 versions behind, allowed are 0 to 1"):
        given.assert_synced(VERSION, max_staleness=1)
    with pytest.raises(NotSynced, match="different server instances"):
        batch(OLDER, instance="another").assert_synced(VERSION, max_staleness=2)
    with pytest.raises(NotSynced, match="different server instances"):
        RolloutBatch.of(given).assert_synced(VERSION, max_staleness=2)
    with pytest.raises(NotSynced, match="another policy"):
        batch(row_of(contract.span(6, 0, 2, contract.OTHER_DIGEST, policy="other"))).assert_synced(
            VERSION, max_staleness=2
        )
    with pytest.raises(NotSynced, match="needs version numbers"):
        given.assert_synced(VERSION.digest, max_staleness=2)
    with pytest.raises(ValueError, match="max_staleness"):
        given.assert_synced(VERSION, max_staleness=-1)


def test_tokens_newer_than_the_version_are_not_synced() -> None:
    newer = batch(row_of(contract.span(8, 0, 2, contract.OTHER_DIGEST)))
    with pytest.raises(NotSynced, match="-1 versions behind"):
        newer.assert_synced(VERSION, max_staleness=4)


def test_given_text_needs_no_version_unless_a_loss_is_taken_from_it() -> None:
    given = contract.span(7, 0, 1) | {"policy": None, "version": None, "digest": None}
    spans = (given, contract.span(7, 1, 3))
    batch(row_of(*spans, loss_mask=[0, 1, 1])).assert_synced(VERSION)
    for staleness in (0, 3):
        with pytest.raises(NotSynced, match="no known version"):
            batch(row_of(*spans, loss_mask=[1, 1, 1])).assert_synced(VERSION, max_staleness=staleness)
