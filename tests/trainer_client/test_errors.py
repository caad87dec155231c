from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

import rollout_server.errors as server
import trainer_client.errors as client


def subclasses(cls: type[Exception]) -> Iterator[type[Exception]]:
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


SERVER_ERRORS = [cls for cls in subclasses(server.RolloutError) if cls is not server.EngineEnded]
"""Without the one that to a client is its parent."""


@pytest.mark.parametrize("theirs", SERVER_ERRORS, ids=lambda cls: cls.__name__)
def test_every_server_code_has_a_class_in_the_same_place_of_the_tree(theirs: type[server.RolloutError]) -> None:
    ours = client.error_class(theirs.code)
    assert ours.code == theirs.code
    assert ours.__name__ == theirs.__name__
    parents = [cls.code for cls in theirs.__mro__ if issubclass(cls, server.RolloutError)]
    assert [cls.code for cls in ours.__mro__ if issubclass(cls, client.ServerError)] == parents


def test_no_class_of_the_client_is_without_a_server_code() -> None:
    ours = {cls.code for cls in subclasses(client.ServerError) if issubclass(cls, client.ServerError)}
    assert ours == {cls.code for cls in SERVER_ERRORS if issubclass(cls, server.RolloutError)}


def test_an_unknown_code_is_a_plain_server_error_that_keeps_it() -> None:
    cls = client.error_class("from_the_future")
    assert cls is client.ServerError
    assert cls("m", code="from_the_future").code == "from_the_future"


def test_errors_survive_pickling() -> None:
    error = client.AdapterMismatch("Two faults.", status=422, param="weights", faults=("a", "b"), retry_after_s=1.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is client.AdapterMismatch
    assert (str(copy), copy.status, copy.param, copy.faults, copy.retry_after_s) == (
        "Two faults.", 422, "weights", ("a", "b"), 1.5
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(client.NotSynced("m", row=3))).row == 3
    assert pickle.loads(pickle.dumps(client.ServerUnreachable("m", sent=True))).sent is True
