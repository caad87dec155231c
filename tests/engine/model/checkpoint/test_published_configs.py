"""Published checkpoints are not refused by mistake, and those that mlx-lm computes otherwise beyond some length are
bounded there. Only the module is made, narrow and without weights."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from mlx_lm.utils import MODEL_REMAPPING

from rollout_server.engine.model.checkpoint.corrections.turning import turn_as_said
from rollout_server.engine.model.checkpoint.plan import Plan, plan_of
from rollout_server.engine.model.checkpoint.windows import window_bounds
from tests.engine.model.checkpoint.published_configs import PUBLISHED

NARROW = {"num_hidden_layers": 4, "vocab_size": 64, "intermediate_size": 32, "moe_intermediate_size": 16}
NARROW |= {"num_experts": 4, "n_routed_experts": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
NARROW |= {"q_lora_rank": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1}


def made(plan: Plan, config: dict[str, Any]) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{plan.family.module}")
    return module.Model(module.ModelArgs.from_dict({**config, **plan.overrides}))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_published_checkpoint_is_served_as_far_as_it_is_right(name: str) -> None:
    config, exact = PUBLISHED[name]
    assert not plan_of(config, MODEL_REMAPPING).refusals
    narrow = {field: value for field, value in NARROW.items() if config.get(field) is not None}
    small = {**config, **narrow}
    if isinstance(small.get("no_rope_layers"), list):
        small |= {"no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4}
    plan = plan_of(small, MODEL_REMAPPING)
    module = made(plan, small)
    bounds = [bound.tokens for bound in (*plan.bounds, *window_bounds(module, plan.said, plan.family))]
    longest = config["max_position_embeddings"]
    assert min([*bounds, longest]) == min(exact or longest, longest)
    turned = turn_as_said(module, plan.said.get("rope_parameters"), plan.said.get("layer_types"), 0, longest)
    assert turned.checked > 0
