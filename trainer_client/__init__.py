"""The trainer's side of rollout-server: push adapter weights, get rollouts, check that both are of one version.

    from trainer_client import RolloutClient

    client = RolloutClient("http://127.0.0.1:8000")
    version = client.push("policy", tensors, config)
    batch = client.rollouts(prompts, policy="policy", n=8, max_tokens=256)
    batch.assert_synced(version)
    advantages = batch.advantages(rewards)

Needs numpy and httpx; nothing of the server, no MLX, no torch.
"""

from trainer_client.adapter.digest import adapter_digest
from trainer_client.client import AsyncRolloutClient, RolloutClient
from trainer_client.data.advantages import Denominator, group_advantages, truncated_importance_weights
from trainer_client.data.batch import RolloutBatch
from trainer_client.data.continuing import continued, rejoined
from trainer_client.data.rollout import Rollout, RowFault, RowReward, Span
from trainer_client.data.versions import KeptVersion, PolicyLine, PolicyRef, PublishedVersion, ServedModel
from trainer_client.errors import (
    BadReply,
    DigestMismatch,
    NotSynced,
    ServerError,
    ServerUnreachable,
    TrainerClientError,
)
from trainer_client.retry import Retry
from trainer_client.verbs.classes import Classes, Ranked, Rewards
from trainer_client.verbs.control import PauseState
from trainer_client.verbs.publishing import Deletion, ExportedAdapter
from trainer_client.verbs.scoring import Divergence, Probed, Replayed
from trainer_client.wire.parsing import Scored

__all__ = [
    "AsyncRolloutClient",
    "BadReply",
    "Classes",
    "Deletion",
    "Denominator",
    "DigestMismatch",
    "Divergence",
    "ExportedAdapter",
    "KeptVersion",
    "NotSynced",
    "PauseState",
    "PolicyLine",
    "PolicyRef",
    "Probed",
    "PublishedVersion",
    "Ranked",
    "Replayed",
    "Retry",
    "Rewards",
    "Rollout",
    "RolloutBatch",
    "RolloutClient",
    "RowFault",
    "RowReward",
    "Scored",
    "ServedModel",
    "ServerError",
    "ServerUnreachable",
    "Span",
    "TrainerClientError",
    "adapter_digest",
    "continued",
    "group_advantages",
    "rejoined",
    "truncated_importance_weights",
]
