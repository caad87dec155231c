"""How a model marks reasoning and tool calls in what it writes, as mlx-lm reads it off the tokenizer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from rollout_server.text.detokenize import special_ids

ParseToolCall = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """Marks of reasoning and tool calls; `None` where the model has none."""

    think_start: str | None = None
    think_end: str | None = None
    think_start_ids: tuple[int, ...] = ()
    think_end_ids: tuple[int, ...] = ()
    tool_start: str | None = None
    tool_end: str | None = None
    """The mark that ends a tool call; empty where a call goes on to the end of the reply."""
    tool_style: str | None = None
    """mlx-lm's name for how calls are written."""
    parse_tool_call: ParseToolCall | None = None
    """(text between the marks, tools) → a call or several, `{"name", "arguments", "id"?}`; raises on what is none."""
    special: frozenset[int] = frozenset()
    """Ids of special tokens that a reply may contain: marks, and what stands inside of tool calls."""

    @classmethod
    def of(cls, tokenizer: Any, ends: Collection[int]) -> ReplyFormat:
        """`tokenizer` is transformers'; `ends` are the ids that end a reply."""
        # Imported here: the engine's thread is the one that imports mlx-lm first.
        from mlx_lm.tokenizer_utils import TokenizerWrapper

        marks = TokenizerWrapper(tokenizer)
        module = _parser_module(tokenizer)
        named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        return cls(
            think_start=marks.think_start,
            think_end=marks.think_end,
            think_start_ids=tuple(marks.think_start_tokens or ()),
            think_end_ids=tuple(marks.think_end_tokens or ()),
            tool_start=module.tool_call_start if module else None,
            tool_end=module.tool_call_end if module else None,
            tool_style=module.__name__.rpartition(".")[2] if module else None,
            parse_tool_call=module.parse_tool_call if module else None,
            special=special_ids(tokenizer) - named - set(ends),
        )

    @property
    def has_thinking(self) -> bool:
        return self.think_start is not None

    def shown(self, *, tools: bool) -> frozenset[int]:
        """Special tokens that a reply's text must keep, or its parts could not be told from each other. Inside of tool
        calls any may stand; without tools only the marks of reasoning count."""
        if tools and self.tool_start is not None:
            return self.special
        return self.special & {*self.think_start_ids, *self.think_end_ids}


def _parser_module(tokenizer: Any) -> Any:
    """The module of mlx-lm that reads this model's tool calls: the one its files name, if there is such a one, or the
    one that the chat template looks like. None if it has none."""
    # Private there: its public `load` chooses in the same way, but reads the tokenizer's files a second time.
    from mlx_lm.tokenizer_utils import _infer_tool_parser as infer_tool_parser

    named = tokenizer.init_kwargs.get("tool_parser_type")
    for name in (named, infer_tool_parser(tokenizer)):
        if isinstance(name, str) and name.isidentifier() and find_spec(f"mlx_lm.tool_parsers.{name}") is not None:
            return importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return None
