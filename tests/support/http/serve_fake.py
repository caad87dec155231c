"""`python -m tests.support.http.serve_fake`: the real server process over the scripted engine. A prompt of one token
hangs."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_server import logs
from rollout_server.config import ServerConfig
from rollout_server.http.app import create_app
from rollout_server.http.server import announce, serve_app
from rollout_server.rollout import RolloutRequest
from tests.support.http.fake_engine import FakeEngine, Row


@dataclass(frozen=True)
class WithoutTexts:
    """As much of a tokenizer as ids need: to import transformers for one takes longer than to start the server."""

    eos_token_id: int = 1
    pad_token_id: int = 0

    def encode(self, text: str) -> list[int]:
        """What a server asks for at its start."""
        return []


def script(request: RolloutRequest, sample: int) -> Row:
    return Row([60, 61], hangs=len(request.prompt_ids) == 1)


if __name__ == "__main__":
    logs.configure("json")
    config = ServerConfig(port=0)
    engine = FakeEngine(WithoutTexts(), script)
    serve_app(lambda: create_app(config, engine), config, announce)  # type: ignore[arg-type]
