"""Text as clients of a real server get it, with tokenizers that trim, and with bytes that are no characters."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

import rollout_server.demo
from rollout_server.text.token_texts import REPLACEMENT
from tests.laws.grids import some_long
from tests.support import tiny_tokenizers
from tests.support.live_server import server_here
from tests.support.tiny_tokenizers import BYTES

DEMO = Path(rollout_server.demo.__file__).parent / "model"
KINDS = ("byte_level", "spaces", "metaspace")
WITH_GRAMMARS = ("byte_level", "spaces")
ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
)


class Served:
    """A server of one kind of tokenizer, and what it says."""

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=60)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self._http.post(path, json=body).raise_for_status()

    def whole(self, route: str = "completions", **asked: Any) -> list[dict[str, Any]]:
        return list(self.post(f"/v1/{route}", model="base", **asked).json()["choices"])

    def streamed(self, **asked: Any) -> list[dict[str, Any]]:
        """The choices that a completion's events add up to."""
        found: dict[int, dict[str, Any]] = {}
        for event in self.post("/v1/completions", model="base", stream=True, **asked).text.split("\n\n")[:-2]:
            for part in json.loads(event.removeprefix("data: "))["choices"]:
                before = found.get(part["index"])
                found[part["index"]] = part if before is None else joined(before, part)
        return [found[index] for index in sorted(found)]

    def rollouts(self, prompt: dict[str, Any], **sampling: Any) -> list[dict[str, Any]]:
        asked = {"policy": "base", "prompts": [prompt], "return": ["text"], "sampling": sampling}
        return list(self.post("/v1/rollouts", **asked).json()["rollouts"])

    def decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def joined(before: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    whole = part | {"text": before["text"] + part["text"], "prompt_token_ids": before["prompt_token_ids"]}
    whole["token_ids"] = before["token_ids"] + part["token_ids"]
    if part["logprobs"] is not None:
        whole["logprobs"] = {name: before["logprobs"][name] + part["logprobs"][name] for name in ARRAYS}
    return whole


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    with ExitStack() as stack:
        found = {}
        for kind in KINDS:
            tokenizer = tiny_tokenizers.KINDS[kind]()
            tokenizer.chat_template = TEMPLATE
            model = tmp_path_factory.mktemp("text") / kind
            shutil.copytree(DEMO, model)
            live = stack.enter_context(server_here(tiny_tokenizers.give(tokenizer, model)))
            found[kind] = Served(live.url, tokenizer)
        yield found


@pytest.fixture(params=KINDS)
def served(request: pytest.FixtureRequest, servers: dict[str, Served]) -> Served:
    return servers[request.param]


@pytest.fixture(params=some_long(WITH_GRAMMARS, "spaces"))
def guided(request: pytest.FixtureRequest, servers: dict[str, Served]) -> Served:
    return servers[request.param]


CHOICE: dict[str, Any] = {"structured_outputs": {"choice": [" # one"]}, "max_tokens": 20, "seed": 1}
"""One text, in any of its tokenizations: the seed says which."""


def test_the_first_space_is_part_of_the_text(guided: Served) -> None:
    """The grammar has one text; prompt and text together are what the model read and wrote."""
    (choice,) = guided.whole(prompt="x = 1", **CHOICE, return_token_ids=True)
    assert (choice["text"], choice["finish_reason"]) == (" # one", "stop")
    ids = choice["prompt_token_ids"] + choice["token_ids"][:-1]
    assert guided.decoded(ids) == guided.decoded(choice["prompt_token_ids"]) + choice["text"]
    (by_ids,) = guided.whole(prompt=choice["prompt_token_ids"], **CHOICE)
    (row,) = guided.rollouts({"text": "x = 1"}, **CHOICE)
    assert by_ids["text"] == row["text"] == " # one"
    (row,) = guided.rollouts({"messages": [{"role": "user", "content": "x"}]}, **CHOICE)
    (said,) = guided.whole("chat/completions", messages=[{"role": "user", "content": "x"}], **CHOICE)
    assert said["message"]["content"] == row["text"] == " # one"


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_echo_joins_prompt_and_text(guided: Served, logprobs: int | None) -> None:
    asked = {"prompt": "x = 1", "echo": True, "return_token_ids": True, "logprobs": logprobs, **CHOICE}
    (choice,) = guided.whole(**asked)
    assert guided.streamed(**asked) == [choice]
    assert choice["text"] == "x = 1 # one"
    if logprobs is None:
        return
    report = choice["logprobs"]
    count = len(choice["prompt_token_ids"]) + len(choice["token_ids"])
    assert [len(report[name]) for name in ARRAYS] == [count] * 4
    # All but a start token and a space that the tokenizer put in front, and the end token, stand where they begin.
    for token, offset in zip(report["tokens"][2:-1], report["text_offset"][2:-1], strict=True):
        assert choice["text"].startswith(token, offset)
    assert report["text_offset"][-1] == len(choice["text"])
    assert "".join(report["tokens"][:-1]).endswith(choice["text"])


@pytest.mark.parametrize("stop", [" #", " ", "# o"])
def test_a_stop_string_may_begin_with_the_first_space(guided: Served, stop: str) -> None:
    grammar = {"structured_outputs": {"regex": " # one.*"}, "max_tokens": 20}
    for kept in (False, True):
        asked = {"prompt": "x = 1", "stop": stop, "include_stop_str_in_output": kept, "return_token_ids": True}
        (choice,) = guided.whole(**asked, **grammar)
        before = " # one".partition(stop)[0]
        assert (choice["text"], choice["stop_reason"]) == (before + (stop if kept else ""), stop)
        assert guided.streamed(**asked, **grammar)[0]["text"] == choice["text"]
    (row,) = guided.rollouts({"text": "x = 1"}, stop=[stop], **grammar)
    assert (row["text"], row["stop_reason"]) == (before, stop)


@pytest.mark.parametrize("prompt", ["the cat", "the cat ", [2], [3, 4, 5]], ids=repr)
def test_a_word_keeps_its_space_behind_any_prompt(served: Served, prompt: Any) -> None:
    """Without a grammar: one token, by its bias."""
    word = served.tokenizer.convert_tokens_to_ids("Ġthe" if served.tokenizer.bos_token is None else "▁the")
    if word in (None, served.tokenizer.unk_token_id):
        word = served.tokenizer.convert_tokens_to_ids("▁the")
    asked = {"prompt": prompt, "logit_bias": {str(word): 100}, "temperature": 0, "max_tokens": 2, "seed": 0}
    assert [choice["text"] for choice in served.whole(**asked)] == [" the the"]
    (echoed,) = served.whole(**asked, echo=True, logprobs=0)
    assert echoed["text"].endswith(" the the")
    assert [echoed["text"][at:][:4] for at in echoed["logprobs"]["text_offset"][-2:]] == [" the", " the"]


def test_a_turn_begins_without_the_tokenizer_s_space_and_a_continued_message_with_it(
    servers: dict[str, Served],
) -> None:
    """As the tokenizer trims it, and as the chat template writes it back."""
    served = servers["spaces"]
    space = served.tokenizer.convert_tokens_to_ids("▁")
    asked: dict[str, Any] = {"logit_bias": {str(space): 100, str(space + 2): 90}, "frequency_penalty": 2}
    asked |= {"max_tokens": 1, "temperature": 0, "return_token_ids": True}
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}
    for messages, goes_on, expected in (([user], False, ""), ([user, assistant], True, " ")):
        fields = {"messages": messages, "add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        (choice,) = served.whole("chat/completions", **fields, **asked)
        assert (choice["token_ids"], choice["message"]["content"]) == ([space], expected)
        (row,) = served.rollouts(fields, logit_bias=asked["logit_bias"], max_tokens=1, temperature=0)
        assert (row["token_ids"], row["text"]) == ([space], expected)


@pytest.mark.parametrize("trials", some_long([range(5), range(5, 14)], range(5)), ids=["some", "more"])
def test_random_streams_add_up_to_their_replies(served: Served, servers: dict[str, Served], trials: range) -> None:
    """Nearly uniform over the vocabulary: bytes that are no characters, stops among them, prompts that end anywhere."""
    generator = random.Random(trials.start)
    broken = 0
    for trial in trials:
        ids = [generator.randrange(len(served.tokenizer)) for _ in range(generator.randrange(1, 9))]
        prompt = generator.choice([ids, "x = ", "é", "the cat"])
        asked = {"prompt": prompt, "temperature": 50.0, "n": 3, "seed": trial, "max_tokens": generator.randrange(1, 20)}
        asked |= {"echo": generator.random() < 0.5, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
        asked |= {
            "stop": generator.sample([REPLACEMENT, " ", "a", f"b{REPLACEMENT}", "\n", "é"], k=generator.randrange(4))
        }
        choices = served.whole(**asked)
        assert served.streamed(**asked) == choices
        for choice in choices:
            check_arrays(choice, echo=asked["echo"])
            if not asked["echo"] and choice["finish_reason"] == "length":
                assert not any(stop in choice["text"] for stop in asked["stop"])
            broken += REPLACEMENT in choice["text"]
    assert broken > 1 or served is servers["metaspace"]


def check_arrays(choice: dict[str, Any], *, echo: bool) -> None:
    report, given = choice["logprobs"], len(choice["prompt_token_ids"]) if echo else 0
    assert [len(report[name]) for name in ARRAYS] == [given + len(choice["token_ids"])] * 4
    assert report["text_offset"] == sorted(report["text_offset"]) and report["text_offset"][-1] <= len(choice["text"])


@pytest.mark.parametrize(
    ("rest", "limit"),
    some_long([("", 3), ("", 20), ('"then"', 20)], ("", 3), ('"then"', 20)),
    ids=["max_tokens comes inside of it", "the model ends inside of it", "other text follows"],
)
def test_a_stop_string_of_a_broken_character_ends_the_row_before_it(guided: Served, rest: str, limit: int) -> None:
    half = guided.tokenizer.convert_tokens_to_ids("<0xC3>" if guided.tokenizer.bos_token else "Ã")
    asked = {"max_tokens": limit, "structured_outputs": {"grammar": f'start: "ok" <[{half}]> {rest}'}, "seed": 1}
    (free,) = guided.whole(prompt="x", **asked)
    assert free["text"] == "ok" + REPLACEMENT + rest.strip('"')
    for stop in (REPLACEMENT, f"k{REPLACEMENT}", f"ok{REPLACEMENT}"):
        for kept in (False, True):
            fields = {"stop": stop, "include_stop_str_in_output": kept, "return_token_ids": True, **asked}
            (choice,) = guided.whole(prompt="x", **fields)
            assert guided.streamed(prompt="x", **fields) == [choice]
            assert choice["text"] == ("ok" + REPLACEMENT if kept else ("ok" + REPLACEMENT).removesuffix(stop))
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        (row,) = guided.rollouts({"text": "x"}, stop=[stop], **asked)
        assert (row["text"], row["stop_reason"]) == (("ok" + REPLACEMENT).removesuffix(stop), stop)


def test_a_whole_character_is_no_broken_one(guided: Served) -> None:
    for text in ("oké!", "ok"):
        asked = {"prompt": "x", "stop": REPLACEMENT, "structured_outputs": {"choice": [text]}, "max_tokens": 20}
        (choice,) = guided.whole(**asked)
        assert (choice["text"], choice["stop_reason"]) == (text, guided.tokenizer.eos_token_id)


@pytest.mark.parametrize("echo", [False, True])
def test_the_token_behind_an_incomplete_character_begins_behind_it(servers: dict[str, Served], echo: bool) -> None:
    served = servers["spaces"]
    lone, tail = BYTES + 0xE4, [BYTES + 0xBD, BYTES + 0xA0]
    written = "".join(f" <[{id}]>" for id in tail)
    for prompt, grammar, text, offsets in (
        ("x", f'start: <[{lone}]> " l"', f"{REPLACEMENT} l", [0, 1, 2]),
        ("x", f'start: <[{lone}]> <[{lone}]> " l"', f"{REPLACEMENT * 2} l", [0, 1, 2, 3]),
        ("x", f'start: <[{lone}]> <[{tail[0]}]> "l"', f"{REPLACEMENT * 2}l", [0, 1, 2]),
        ("x", f'start: <[{lone}]> {written} "l"', "你l", [0, 0, 0, 1]),
        # Begun in the prompt: completed, or not.
        ([4, 300, lone], f'start: {written} "l"', "你l", [0, 0, 1]),
        ([4, 300, lone, tail[0]], 'start: "l"', f"{REPLACEMENT * 2}l", [2]),
        ([4, 300, lone], 'start: " l"', f"{REPLACEMENT} l", [1, 2]),
    ):
        asked = {"prompt": prompt, "structured_outputs": {"grammar": grammar}, "max_tokens": 9, "logprobs": 0}
        asked |= {"echo": echo, "return_token_ids": True, "seed": 1}
        (choice,) = served.whole(**asked)
        assert served.streamed(**asked) == [choice]
        check_arrays(choice, echo=echo)
        assert choice["text"].endswith(text) and (echo or choice["text"] == text)
        # The end token has no text.
        shift = len(choice["text"]) - len(text)
        found = choice["logprobs"]["text_offset"][-len(offsets) - 1 :]
        assert found == [shift + at for at in [*offsets, len(text)]]


def test_an_echo_alone_shows_what_its_prompt_leaves_incomplete(servers: dict[str, Served]) -> None:
    served = servers["spaces"]
    ids = [BYTES + ord("k"), BYTES + 0xE4, BYTES + 0xBD]
    asked = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0, "return_token_ids": True}
    (choice,) = served.whole(**asked)
    assert served.streamed(**asked) == [choice]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == (f"k{REPLACEMENT * 2}", [0, 1, 2])
    assert choice["token_ids"] == [] and choice["finish_reason"] == "length"
