"""Where RoBERTa's positions begin, and what each family's activations are."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.bert import BertArgs, BertEmbeddings
from tests.support.numbers.bounds import relative


def arguments(kind: str, pad: int | None = 1) -> BertArgs:
    return BertArgs(kind, 40, 16, 1, 2, 24, "gelu", 64, 1, 1e-5, pad)


def test_roberta_counts_from_behind_the_pad_id_and_pads_have_its_position() -> None:
    embeddings = BertEmbeddings(arguments("roberta", pad=3))
    ids = mx.array([[9, 3, 8, 7, 3, 3], [5, 6, 7, 8, 9, 10]])
    assert embeddings._positions(ids).tolist() == [[4, 3, 5, 6, 3, 3], [4, 5, 6, 7, 8, 9]]


def test_bert_counts_from_zero_whatever_the_tokens() -> None:
    assert BertEmbeddings(arguments("bert"))._positions(mx.array([[1, 1, 1]])).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("kind", "longest"), [("bert", 64), ("roberta", 62), ("xlm-roberta", 62)])
def test_how_many_tokens_have_a_position(kind: str, longest: int) -> None:
    assert arguments(kind).max_tokens == longest


def test_activations_are_what_their_names_mean() -> None:
    x = np.linspace(-6, 6, 241)
    by_tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    exact = 0.5 * x * (1 + np.array([math.erf(each / math.sqrt(2)) for each in x]))
    sigmoid = 1 / (1 + np.exp(-x))
    wanted = {
        "gelu": exact,
        "gelu_python": exact,
        "gelu_new": by_tanh,
        "gelu_fast": by_tanh,
        "gelu_accurate": by_tanh,
        "gelu_pytorch_tanh": by_tanh,
        "gelu_python_tanh": by_tanh,
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
        "relu": np.maximum(x, 0),
        "silu": x * sigmoid,
        "swish": x * sigmoid,
        "mish": x * np.tanh(np.log1p(np.exp(x))),
        "tanh": np.tanh(x),
        "sigmoid": sigmoid,
    }
    assert wanted.keys() == ACTIVATIONS.keys()
    for name, values in wanted.items():
        found = np.array(ACTIVATIONS[name](mx.array(x.astype(np.float32))))
        np.testing.assert_allclose(found, values, atol=6 * relative(16), rtol=0, err_msg=name)
