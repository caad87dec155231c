"""What chat templates are given, in the form they take it; and where they open reasoning, whatever a message says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from litestar.testing import TestClient
from tokenizers import AddedToken

from rollout_server.config import ServerConfig
from rollout_server.rollout import FinishReason
from rollout_server.text.content_forms import ContentForm, content_form
from tests.support.http.fake_engine import FakeEngine, Row
from tests.support.http.fixtures import MakeApp, byte_level_tokenizer

Client = TestClient[Any]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    return tokenizer


@pytest.fixture
def engine(tokenizer: Any) -> Iterator[FakeEngine]:
    written = tokenizer.chat_template
    yield FakeEngine(tokenizer)
    tokenizer.chat_template = written


@pytest.fixture
def client(engine: FakeEngine, made_app: MakeApp) -> Iterator[Client]:
    with TestClient(made_app(ServerConfig(), engine)) as client:
        yield client


# ---- the form of a message's content ------------------------------------------------------------------------------

LOOP = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
BOTH = "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}"


def each(body: str) -> str:
    return "{% for m in messages %}[{{ m.role }}]" + body + "{% endfor %}[end]"


TEMPLATES = {
    "one text": (each("{{ m.content }}"), ContentForm.TEXT),
    "one text or none": (each("{{ m.content or '' }}"), ContentForm.TEXT),
    "one text, trimmed": (each("{{ m['content'] | trim }}"), ContentForm.TEXT),
    "one text, put together": (each("{{ '<' + m['content'] + '>' }}"), ContentForm.TEXT),
    "a list as JSON": (each("{{ m.content | tojson }}"), ContentForm.TEXT),
    "parts": (each(LOOP), ContentForm.PARTS),
    "parts without a type": (each("{% for part in m.content %}{{ part['text'] }}{% endfor %}"), ContentForm.PARTS),
    "the first part": (each("{{ m.content[0].text }}"), ContentForm.ONE_PART),
    "either": (each(BOTH), ContentForm.EITHER),
    "text, or the first part": (
        each("{{ m.content if m.content is string else m.content[0].text }}"),
        ContentForm.TEXT,
    ),
    "nothing": (each(""), ContentForm.TEXT),
    "an error": (each("{{ raise_exception('no') }}"), ContentForm.TEXT),
}
ROLES = ("system", "user", "assistant", "tool", "developer")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("case", TEMPLATES)
def test_the_form_is_found_out(case: str, role: str, tokenizer: Any) -> None:
    template, form = TEMPLATES[case]
    assert content_form(tokenizer, template, role) is form


def test_roles_may_differ_and_be_in_order(tokenizer: Any) -> None:
    """Templates refuse conversations that go on otherwise than they know."""
    template = (
        "{% for m in messages %}"
        "{% if loop.first and m.role not in ('user', 'system') %}{{ raise_exception('who?') }}{% endif %}"
        "{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('why?') }}{% endif %}"
        "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}{{ raise_exception('what?') }}{% endif %}"
        "{% if m.role == 'user' %}" + LOOP + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    forms = {role: content_form(tokenizer, template, role) for role in ("system", "user", "assistant", "tool")}
    assert forms.pop("user") is ContentForm.PARTS and set(forms.values()) == {ContentForm.TEXT}


PARTS = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
CONVERSATION = [
    {"role": "system", "content": "hello"},
    {"role": "user", "content": PARTS},
    {"role": "assistant", "content": "hello"},
    {"role": "tool", "content": PARTS, "tool_call_id": "1"},
    {"role": "user", "content": "hello"},
]


@pytest.mark.parametrize("case", ["one text", "parts", "parts without a type", "the first part", "either"])
def test_every_route_gives_every_role_s_text(case: str, client: Client, engine: FakeEngine) -> None:
    engine.tokenizer.chat_template = TEMPLATES[case][0]
    expected = "".join(f"[{message['role']}]hello" for message in CONVERSATION) + "[end]"
    ids = client.post("/tokenize", json={"messages": CONVERSATION}).json()["tokens"]
    assert engine.tokenizer.decode(ids) == expected
    chat = {"model": "base", "messages": CONVERSATION, "return_token_ids": True}
    assert client.post("/v1/chat/completions", json=chat).json()["prompt_token_ids"] == ids
    rollouts = {"policy": "base", "prompts": [{"messages": CONVERSATION}]}
    assert client.post("/v1/rollouts", json=rollouts).json()["rollouts"][0]["prompt_token_ids"] == ids


def test_parts_and_what_has_no_content(client: Client, engine: FakeEngine) -> None:
    """As transformers renders them: what a template puts between parts stands there."""
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for template, text in ((LOOP.replace("{{ part.text }}", "({{ part.text }})"), "(hel)(lo)"), (BOTH, "hello")):
        engine.tokenizer.chat_template = each(template)
        ids = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert engine.tokenizer.decode(ids) == f"[user]{text}[assistant][end]"
    engine.tokenizer.chat_template = each(LOOP)
    for content in ("", [], [{"type": "text", "text": ""}]):
        reply = client.post("/tokenize", json={"messages": [{"role": "user", "content": content}]})
        assert engine.tokenizer.decode(reply.json()["tokens"]) == "[user][end]"


def test_a_continued_message_in_parts(client: Client, engine: FakeEngine) -> None:
    engine.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]" + LOOP + "<|end|>{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "so far"}]
    ids = client.post("/tokenize", json={"messages": messages, "continue_final_message": True}).json()["tokens"]
    assert engine.tokenizer.decode(ids) == "[user]a<|end|>[assistant]so far"


# ---- where reasoning begins ---------------------------------------------------------------------------------------

GLM = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if think is defined and not think %}<think></think>{% endif %}{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if think is defined %}<think>\n{% if not think %}\n</think>\n\n{% endif %}{% endif %}{% endif %}"
)
ALWAYS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
TOLD = "Reason behind <think> first.{% for m in messages %}{{ m.content }}<|end|>{% endfor %}<|assistant|>"
IN_PARTS = "{% for m in messages %}" + LOOP + "{% endfor %}[assistant]{% if think %}<think>{% endif %}"


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


ASKED, CLOSED = user("what does <think> mean?"), user("is it </think>?")
CUT = user([{"type": "text", "text": "<thi"}, {"type": "text", "text": "nk>"}])
OFF, ON = {"chat_template_kwargs": {"think": False}}, {"chat_template_kwargs": {"think": True}}
GO_ON = {"continue_final_message": True}
BARE = {"add_generation_prompt": False}

OPENINGS: list[tuple[str, list[dict[str, Any]], dict[str, Any], bool]] = [
    (ALWAYS, [ASKED], {}, False),
    (ALWAYS, [CUT], {}, False),
    (ALWAYS, [user("a"), assistant("<think>"), user("b")], {}, False),
    (ALWAYS, [{"role": "<think>", "content": "a"}], {}, False),
    (GLM, [ASKED], {}, False),
    (GLM, [ASKED], OFF, False),
    (GLM, [ASKED, {"role": "tool", "content": "<think>", "tool_call_id": "1"}], {}, False),
    (R1, [ASKED], {}, True),
    (R1, [CLOSED], {}, True),
    (R1, [user("a"), assistant("<think>b</think>c"), ASKED], {}, True),
    (R1, [ASKED], BARE, False),
    (R1, [user("a"), assistant("<think>")], {}, True),
    (QWEN, [ASKED], {}, False),
    (QWEN, [ASKED], OFF, False),
    (QWEN, [CLOSED], ON, True),
    (QWEN, [user("a"), assistant("b", reasoning_content="<think>"), ASKED], {}, False),
    (QWEN, [user("a"), assistant("<think>")], BARE, False),
    (QWEN, [ASKED, assistant("<think>so")], GO_ON, True),
    (QWEN, [ASKED, assistant("<think>so</think> yes")], GO_ON, False),
    (QWEN, [ASKED, assistant("so")], GO_ON, False),
    (QWEN, [user("a <think>")], GO_ON, False),
    (QWEN, [assistant("<think>so")], GO_ON, True),
    (TOLD, [user("a")], {}, False),
    (IN_PARTS, [ASKED], OFF, False),
    (IN_PARTS, [CUT], OFF, False),
    (IN_PARTS, [CLOSED], ON, True),
]


@pytest.mark.parametrize(("template", "messages", "fields", "opens"), OPENINGS)
def test_the_template_alone_opens_reasoning(
    template: str, messages: Any, fields: Any, opens: bool, client: Client, engine: FakeEngine
) -> None:
    """Both for the parts of the reply and for the text that it has to match."""
    tokenizer = engine.tokenizer
    tokenizer.chat_template = template
    ids = tokenizer.encode("hm</think>yes<|end|>")
    engine.script = lambda request, sample: Row(list(ids), FinishReason.STOP, ids[-1])
    body = {"model": "base", "messages": messages, **fields}
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    expected = ("hm", "yes") if opens else (None, "hm</think>yes")
    assert (message.get("reasoning_content"), message["content"]) == expected
    format = {"response_format": {"type": "json_object"}}
    assert client.post("/v1/chat/completions", json={**body, **format}).status_code == 200
    constraint = engine.submitted[-1][1][0].sampling.constraint
    assert constraint is not None
    assert constraint.grammar.after == (tuple(tokenizer.encode("</think>")) if opens else ())
