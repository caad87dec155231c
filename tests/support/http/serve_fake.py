"""`python -m tests.support.http.serve_fake`: the real server process over the scripted engine. A prompt of one token
hangs."""

from __future__ import annotations

from rollout_server import logs
from rollout_server.config import ServerConfig
from rollout_server.http.app import create_app
from rollout_server.http.server import announce, serve_app
from rollout_server.rollout import RolloutRequest
from tests.support.http.fake_engine import FakeEngine, Row
from tests.support.http.fixtures import byte_level_tokenizer


def script(request: RolloutRequest, sample: int) -> Row:
    return Row([60, 61], hangs=len(request.prompt_ids) == 1)


if __name__ == "__main__":
    logs.configure("json")
    config = ServerConfig(port=0)
    engine = FakeEngine(byte_level_tokenizer(), script)
    serve_app(lambda: create_app(config, engine), config, announce)  # type: ignore[arg-type]
