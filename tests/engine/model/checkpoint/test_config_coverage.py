"""No field of config.json is passed over unseen, in any family that transformers and mlx-lm both know."""

from __future__ import annotations

import pytest
from mlx_lm.utils import MODEL_REMAPPING

from rollout_server.engine.model.checkpoint.plan import plan_of
from tests.engine.model.checkpoint.config_coverage import as_saved, both, dropped


@pytest.mark.parametrize("kind", list(both()))
def test_every_field_is_read_mapped_checked_or_of_no_effect(kind: str) -> None:
    assert not dropped(plan_of(as_saved(kind), MODEL_REMAPPING))
