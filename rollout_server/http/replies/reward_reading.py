"""What a reward model reads of a row: its ids, its text tokenized anew, or the conversation that it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from rollout_server.errors import InvalidField, RolloutError
from rollout_server.http.replies.json_entries import rollout_text
from rollout_server.http.requests.tokens.prompts import encode
from rollout_server.http.requests.tokens.rendering import render
from rollout_server.rollout import Rollout, RolloutRequest
from rollout_server.schemas.messages import ContentPart, Message, TextPart
from rollout_server.schemas.rollouts import Prompt
from rollout_server.text.long_texts import Bound
from rollout_server.text.pictures.picture import Picture
from rollout_server.text.pictures.reader import PictureReader


@dataclass(frozen=True, slots=True)
class RowReader:
    """`prompts` and `groups` are those of the request, in its order."""

    reads: Literal["messages", "text", "token_ids"]
    prompts: Sequence[Prompt]
    groups: Sequence[RolloutRequest]
    tokenizer: Any
    """The policy's, by which rows become text."""
    own_tokenizer: Any
    """The reward model's, by which it reads."""
    same_ids: bool
    """True where ids mean the same to both."""
    bound: Bound
    """What fits the reward model."""
    pictures_of: PictureReader | None = None
    """What gives pictures their placeholders where the reward model reads them as the policy does; None elsewhere."""
    _beginnings: dict[int, Sequence[int]] = field(default_factory=dict)
    """What a prompt is without any reply, by its place; it is tokenized once for all of its rows."""

    def ids(self, rollout: Rollout) -> Sequence[int]:
        """Raises `InvalidField` where the chat template refuses, and `ContextExceeded` for what is too long."""
        if self.reads == "token_ids":
            return rollout.prompt_ids + rollout.token_ids
        prompt, group = self.prompts[rollout.prompt_index], self.groups[rollout.prompt_index]
        text = rollout_text(rollout, self.tokenizer, group)
        place = f"prompts[{rollout.prompt_index}]"
        if self.reads == "text":
            return self._of_text(prompt, rollout, text, place)
        return self._rendered(conversation(prompt, text), group, place)

    def _rendered(self, prompt: Prompt, group: RolloutRequest, place: str) -> list[int]:
        expand = None
        if group.pictures and self.pictures_of is not None:
            expand = partial(_expanded, self.pictures_of, group.pictures, place)
        return render(prompt, self.own_tokenizer, param=place, bound=self.bound, expand=expand)

    def pictures(self, rollout: Rollout) -> tuple[Picture, ...]:
        """What a row's prompt showed; a text tokenized anew says nothing of it, and another model's processor would
        have made other pixels."""
        if self.reads == "text" or self.pictures_of is None:
            return ()
        return self.groups[rollout.prompt_index].pictures

    def shared(self, rollout: Rollout, ids: Sequence[int]) -> int:
        """How many of a row's `ids` are of its prompt, which other rows have as well."""
        if self.reads == "token_ids":
            return len(rollout.prompt_ids)
        index = rollout.prompt_index
        if index not in self._beginnings:
            self._beginnings[index] = self._beginning(rollout)
        return common(self._beginnings[index], ids)

    def _beginning(self, rollout: Rollout) -> Sequence[int]:
        prompt, place = self.prompts[rollout.prompt_index], f"prompts[{rollout.prompt_index}]"
        try:
            if self.reads == "text":
                return self._of_text(prompt, rollout, "", place)
            return self._rendered(prompt, self.groups[rollout.prompt_index], place)
        except RolloutError:
            # A template may want a reply: then the prompt is read with each row.
            return ()

    def _of_text(self, prompt: Prompt, rollout: Rollout, text: str, place: str) -> list[int]:
        """A prompt that came as ids or messages is read with its special tokens, and gets no others; a reward model of
        another tokenizer reads it without them, and with its own."""
        given, special, other = prompt.text, prompt.add_special_tokens, not self.same_ids
        if given is None:
            ids = list(rollout.prompt_ids)
            given = self.tokenizer.decode(ids, skip_special_tokens=other, clean_up_tokenization_spaces=False)
            special = other
        return encode(
            self.own_tokenizer, given + text, add_special_tokens=special, param=place, bound=self.bound, place=place
        )


def _expanded(reader: PictureReader, pictures: Sequence[Picture], place: str, text: str) -> str:
    try:
        return reader.expand(text, pictures)
    except ValueError as error:
        raise InvalidField(f"{place} and the row do not fit the pictures: {error}.", param=place) from error


def conversation(prompt: Prompt, text: str) -> Prompt:
    """The messages of a prompt with a row's text as the assistant's turn, or as the end of the turn that it continues;
    no generation prompt follows."""
    messages = list(prompt.messages or ())
    if prompt.continue_final_message and messages:
        last = messages.pop()
        reply = last.model_copy(update={"content": _continued(last.content, text)})
    else:
        reply = Message(role="assistant", content=text)
    changes = {"messages": [*messages, reply], "add_generation_prompt": False, "continue_final_message": False}
    return prompt.model_copy(update=changes)


def common(beginning: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(beginning, ids, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(beginning), len(ids)))


def _continued(content: str | list[ContentPart] | None, text: str) -> str | list[ContentPart]:
    if isinstance(content, list):
        return [*content, TextPart(type="text", text=text)]
    return (content or "") + text
