"""In which form a chat template takes the content of a message: as one text, as a list of parts, or in either.

A template says nothing of it, so it is shown both. One that walks through parts makes nothing of a text, and one that
writes a text writes a list as Python prints it; neither fails.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
"""What rendering raises about the messages: a template is the model's own code."""
FIRST, SECOND = "qzfirst", "qzsecond"
PRINTED = re.compile(r"""["']type["']\s*:\s*["']text["']""")
CALL_ID = "qzcall001"
"""Nine letters or digits, which is what Mistral's templates want of an id."""


class ContentForm(Enum):
    TEXT = "text"
    PARTS = "parts"
    ONE_PART = "one part"
    """A list of which only the first part is read."""
    EITHER = "either"

    def of(self, content: Any) -> Any:
        """A message's content in this form; `content` is text, a list of parts, or None."""
        if self is ContentForm.EITHER or (content is None and self is ContentForm.TEXT):
            return content
        if self is ContentForm.TEXT:
            return _joined(content)
        if self is ContentForm.PARTS and isinstance(content, list):
            return content
        return [] if content is None else [_part(_joined(content))]


@lru_cache(maxsize=256)
def content_form(tokenizer: Any, template: str, role: str) -> ContentForm:
    """The form for messages of a role. `tokenizer` is transformers', `template` the source of its chat template."""
    text = _rendered(tokenizer, template, role, FIRST)
    parts = _rendered(tokenizer, template, role, [_part(FIRST), _part(SECOND)])
    printed = PRINTED.search(parts) is not None
    if FIRST in text:
        return ContentForm.EITHER if FIRST in parts and SECOND in parts and not printed else ContentForm.TEXT
    if FIRST not in parts or printed:
        return ContentForm.TEXT
    return ContentForm.PARTS if SECOND in parts else ContentForm.ONE_PART


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def holds_pictures(content: Any) -> bool:
    """True for a list of parts of which one is a picture."""
    return isinstance(content, list) and any(part.get("type") == "image" for part in content)


def _joined(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _rendered(tokenizer: Any, template: str, role: str, content: Any) -> str:
    """A conversation in which a message of this role has the content; empty where the template refuses all that are
    tried."""
    for conversation in _conversations(tokenizer, template, role, content):
        try:
            return str(tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False))
        except TEMPLATE_FAULTS:
            continue
    return ""


def _conversations(tokenizer: Any, template: str, role: str, content: Any) -> list[list[dict[str, Any]]]:
    """Templates are particular about who speaks after whom."""
    message = {"role": role, "content": content}
    if role == "user":
        return [[message]]
    asked = {"role": "user", "content": content_form(tokenizer, template, "user").of("qz")}
    call = {"id": CALL_ID, "type": "function", "function": {"name": "qz", "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = message | {"tool_call_id": CALL_ID, "name": "qz"}
    return [[asked, calling, answer], [asked, message], [message, asked], [asked, answer], [message]]
