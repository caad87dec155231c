"""A small real tokenizer, a scripted engine, and the application over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from litestar import Litestar
from litestar.testing import TestClient
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rollout_server.config import ServerConfig
from tests.support.http.fake_engine import LAYERS, FakeEngine
from tests.support.http.shared_routes import make_app

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if shout %}!{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over every byte, with a few merges, some of them inside of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat, 你好世界 😀😁, 12+30=42 naïve été"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> FakeEngine:
    return FakeEngine(tokenizer)


@pytest.fixture(scope="session")
def config() -> ServerConfig:
    return ServerConfig(max_body=200_000, max_upload=100_000)


MakeApp = Callable[[ServerConfig, FakeEngine], Litestar]


@pytest.fixture
def made_app() -> MakeApp:
    """Makes applications at little cost, see tests/support/http/shared_routes.py."""
    return make_app


@pytest.fixture
def client(engine: FakeEngine, config: ServerConfig, made_app: MakeApp) -> Iterator[TestClient[Any]]:
    with TestClient(made_app(config, engine)) as client:
        yield client


@pytest.fixture
def problem() -> Callable[..., dict[str, Any]]:
    """Checks the shape that every error has, and returns what it says."""

    def check(response: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        assert {"message", "type", "param", "code", "retryable"} <= error.keys()
        assert error["code"] == code, error
        assert error["message"] and error["message"].strip() == error["message"]
        assert response.headers["x-should-retry"] == ("true" if error["retryable"] else "false")
        assert response.headers["content-type"] == "application/json"
        if param is not None:
            assert error["param"] == param, error
        return error

    return check


PEFT_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}


def adapter_tensors(seed: int = 0, rank: int = 2) -> dict[str, np.ndarray]:
    """A PEFT adapter of every layer of the fake base."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for path, (out, width) in LAYERS.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = generator.normal(size=(rank, width)).astype(np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = generator.normal(size=(out, rank)).astype(np.float32)
    return tensors


@pytest.fixture
def adapter() -> Callable[..., bytes]:
    def build(seed: int = 0, *, config: bool = False, **changes: Any) -> bytes:
        tensors = adapter_tensors(seed) | changes
        kept = {name: value for name, value in tensors.items() if value is not None}
        return save(kept, metadata={"adapter_config": json.dumps(PEFT_CONFIG)} if config else None)

    return build


@pytest.fixture
def push(client: TestClient[Any], adapter: Callable[..., bytes]) -> Callable[..., Any]:
    """Pushes a form; `weights` and `config` may be replaced, other keywords are fields."""

    def send(name: str = "policy", *, weights: bytes | None = None, config: Any = PEFT_CONFIG, **fields: Any) -> Any:
        files = {"weights": ("a.safetensors", adapter() if weights is None else weights)}
        if config is not None:
            raw = config if isinstance(config, (bytes, str)) else json.dumps(config)
            files["config"] = ("adapter_config.json", raw)
        headers = fields.pop("headers", {})
        return client.post("/v1/weights", data={"name": name, **fields}, files=files, headers=headers)

    return send
