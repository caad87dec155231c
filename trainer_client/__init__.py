"""The trainer's side of rollout-server: push adapter weights, get rollouts, check that both are of one version.

    from trainer_client import RolloutClient

    client = RolloutClient("http://127.0.0.1:8000")
    version = client.push("policy", tensors, config)
    batch = client.rollouts(prompts, policy="policy", n=8, max_tokens=256)
    batch.assert_synced(version)
    advantages = batch.advantages(rewards)

Needs numpy and httpx; nothing of the server, no MLX, no torch.
"""

from trainer_client.advantages import Denominator, group_advantages, truncated_importance_weights
from trainer_client.batch import RolloutBatch
from trainer_client.client import AsyncRolloutClient, RolloutClient
from trainer_client.continuing import continued, rejoined
from trainer_client.digest import adapter_digest
from trainer_client.errors import (
    BadReply,
    DigestMismatch,
    NotSynced,
    ServerError,
    ServerUnreachable,
    TrainerClientError,
)
from trainer_client.keeping import Deletion, ExportedAdapter
from trainer_client.parsing import Scored
from trainer_client.pausing import PauseState
from trainer_client.retry import Retry
from trainer_client.rollout import Rollout, RowFault, Span
from trainer_client.versions import KeptVersion, PolicyLine, PolicyRef, PublishedVersion, ServedModel

__all__ = [
    "AsyncRolloutClient",
    "BadReply",
    "Deletion",
    "Denominator",
    "DigestMismatch",
    "ExportedAdapter",
    "KeptVersion",
    "NotSynced",
    "PauseState",
    "PolicyLine",
    "PolicyRef",
    "PublishedVersion",
    "Retry",
    "Rollout",
    "RolloutBatch",
    "RolloutClient",
    "RowFault",
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
