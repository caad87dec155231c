"""By how much tokens stay, against the definition of the filters; what is told of a vocabulary's first tokens alone."""

from __future__ import annotations

import numpy as np
import pytest

from rollout_server.engine.sampling.margins import margins
from rollout_server.rollout import SamplingParams
from tests.engine.sampling.test_filters import MIXED, limits, logits_of


@pytest.mark.parametrize("kind", ["flat", "wide", "peaked", "equal", "few values"])
@pytest.mark.parametrize("setting", MIXED, ids=str)
def test_what_has_a_margin_of_zero_or_more_stays(kind: str, setting: dict[str, float]) -> None:
    params = SamplingParams(max_tokens=1, **setting)
    logits = logits_of(kind, 301, 1)[0].astype(np.float64)
    weights = np.sort(np.exp(logits - logits.max()))[::-1]
    margin = margins(weights, params)
    # Sums of 301 weights in another order: an edge that lies closer than their rounding may go either way.
    rounding = len(weights) * np.finfo(np.float64).eps
    least, most = limits(weights, params, -rounding), limits(weights, params, rounding)
    if not params.filtered and params.temperature > 0:
        assert np.isinf(margin).all() and (margin > 0).all()
    # Of equal tokens top-p lets in those that the sum reaches; the sampler keeps them together.
    stays = weights >= weights[margin >= 0][-1]
    assert (stays >= least).all() and (stays <= most).all()
    assert margin[0] >= 0


def test_the_first_tokens_alone_have_the_margins_that_need_no_others() -> None:
    logits = np.sort(logits_of("wide", 301, 1)[0].astype(np.float64))[::-1]
    weights = np.exp(logits - logits.max())
    for params in (SamplingParams(max_tokens=1, top_k=5), SamplingParams(max_tokens=1, min_p=0.1)):
        first = margins(weights[:40], params, whole=False)
        assert np.array_equal(first, margins(weights, params)[:40])
    assert np.isinf(margins(weights[:40], SamplingParams(max_tokens=1, top_p=0.1), whole=False)).all()
