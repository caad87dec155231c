"""What a push may say of itself: all of it comes as text, of a form or of a query."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rollout_server.schemas.weights import ActivateRequest, PinRequest, WeightsOptions


def fault(model: Any, **fields: Any) -> str:
    """The kind of its only fault."""
    with pytest.raises(ValidationError) as caught:
        model(**fields)
    (error,) = caught.value.errors()
    return str(error["type"])


def test_what_is_left_out_is_the_usual_way() -> None:
    options = WeightsOptions(name="policy")
    assert options.model_dump(exclude={"name"}) == {
        "model": None,
        "format": "auto",
        "activate": "true",
        "mode": None,
        "dequantize": "false",
        "label": None,
    }
    assert WeightsOptions.model_validate({"name": "policy", "mode": None, "activate": None}) == options


def test_yes_and_no_are_the_two_words() -> None:
    for value in (True, 1, "True", "1", "yes", ""):
        assert fault(WeightsOptions, name="p", activate=value) == "literal_error"
        assert fault(WeightsOptions, name="p", dequantize=value) == "literal_error"


def test_a_name_has_a_length_and_nothing_stands_in_for_it() -> None:
    assert WeightsOptions(name="p" * 64).name == "p" * 64
    assert fault(WeightsOptions, name="p" * 65) == "string_too_long"
    assert fault(WeightsOptions, name="") == "string_too_short"
    assert fault(WeightsOptions) == fault(WeightsOptions, name=None) == "missing"


@pytest.mark.parametrize("label", ["step 7", "é😀", "x" * 64, ""])
def test_a_label_is_text_on_one_line(label: str) -> None:
    assert WeightsOptions(name="p", label=label).label == label


@pytest.mark.parametrize("label", ["two\nlines", "tab\t", "\x1b[31m", "\u202e", "\u2028"])
def test_a_label_that_would_break_a_line_or_turn_it_round_is_refused(label: str) -> None:
    assert fault(WeightsOptions, name="p", label=label) == "label"


def test_a_field_that_is_not_known_is_never_passed_over() -> None:
    assert fault(WeightsOptions, name="p", actvate="false") == "extra_forbidden"
    assert fault(WeightsOptions, name="p", actvate=None) == "extra_forbidden"


def test_a_version_is_a_number_that_a_push_can_have_made() -> None:
    assert ActivateRequest(version=1).version == 1
    assert fault(ActivateRequest, version=0) == "greater_than_equal"
    assert fault(ActivateRequest, version="1") == fault(ActivateRequest, version=True) == "int_type"
    assert fault(PinRequest, pinned=1) == "bool_type"
