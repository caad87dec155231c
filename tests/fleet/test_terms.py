"""What replicas have to have in common, and what is said where they have not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.errors import Conflict
from rollout_server.fleet.terms import Terms, with_least_room
from rollout_server.fleet.wire import libraries

INFO = ModelInfo("tiny", "sha256:1", "qwen3", 320, 2048, "float32", None, (1,), 1000, {}, 96, 2**24, "slots", 8, "cpu")


def terms(base: str | None = None, **options: object) -> Terms:
    made = Terms(EngineOptions("nowhere", "tiny", **options))  # type: ignore[arg-type]
    made.base = base
    return made


def test_the_first_replica_says_what_the_controller_was_not_told() -> None:
    fleet = terms()
    fleet.check("one", INFO, libraries())
    fleet.check("two", replace(INFO, device="gpu", max_batch=64, kv_memory=2**30), libraries())


@pytest.mark.parametrize(
    ("unlike", "said"),
    [
        ({"digest": "sha256:2"}, "its base is sha256:2, and the fleet's is sha256:1"),
        ({"dtype": "bfloat16"}, "its dtype is bfloat16, and the fleet's is float32"),
        ({"kv_bits": 8}, "its kv_bits is 8, and the fleet's is None"),
        ({"max_model_len": 1024}, "its context is 1024, and the fleet's is 2048"),
    ],
)
def test_a_model_that_is_unlike_the_first_is_refused(unlike: dict[str, object], said: str) -> None:
    fleet = terms()
    fleet.check("one", INFO, libraries())
    with pytest.raises(Conflict, match=said) as refused:
        fleet.check("two", replace(INFO, **unlike), libraries())  # type: ignore[arg-type]
    assert not refused.value.retryable and "Replica two is not taken" in refused.value.message
    fleet.check("three", INFO, libraries())


@pytest.mark.parametrize("library", ["mlx", "mlx-lm", "rollout-server"])
def test_libraries_of_other_versions_are_refused(library: str) -> None:
    with pytest.raises(Conflict, match=f"its {library} is 0.0.1, and the fleet's is {libraries()[library]}"):
        terms().check("one", INFO, libraries() | {library: "0.0.1"})
    with pytest.raises(Conflict, match=f"its {library} is not there"):
        terms().check("one", INFO, {name: version for name, version in libraries().items() if name != library})


def test_the_first_that_joins_is_compared_with_what_the_controller_has() -> None:
    with pytest.raises(Conflict, match="its base is sha256:1, and the fleet's is sha256:2"):
        terms("sha256:2").check("one", INFO, libraries())
    with pytest.raises(Conflict, match="its context is 2048, and the fleet's is 512"):
        terms("sha256:1", context_length=512).check("one", INFO, libraries())
    with pytest.raises(Conflict, match="its kv_bits is None, and the fleet's is 8"):
        terms("sha256:1", kv_bits=8).check("one", INFO, libraries())


def test_whoever_is_refused_for_its_context_is_told_how_to_go_on() -> None:
    """The first replica may have gone since: prompts were measured by its context, so that it holds all the same."""
    fleet = terms("sha256:1")
    fleet.check("one", INFO, libraries())
    with pytest.raises(Conflict, match="its context is 512, and the fleet's is 2048") as refused:
        fleet.check("two", replace(INFO, max_model_len=512), libraries())
    assert refused.value.message.endswith(
        "The first replica said that context, and it holds until the controller ends: start this one with "
        "--context-length 2048, or the controller anew with the --context-length that all shall have."
    )
    told = terms("sha256:1", context_length=2048)
    with pytest.raises(Conflict) as refused:
        told.check("two", replace(INFO, max_model_len=512), libraries())
    assert "The first replica" not in refused.value.message


def test_what_a_row_may_take_is_what_has_room_wherever_it_goes() -> None:
    """More memory holds fewer tokens where each takes more."""
    wide = replace(INFO, kv_memory=2 * INFO.kv_memory, kv_bytes_per_token=4 * INFO.kv_bytes_per_token)
    for first, second in ((INFO, wide), (wide, INFO)):
        told = with_least_room(replace(first, id="served"), second)
        assert told == replace(first, id="served", kv_memory=wide.kv_memory, kv_bytes_per_token=wide.kv_bytes_per_token)
    assert with_least_room(INFO, replace(INFO, kv_memory=2**30)) == INFO
