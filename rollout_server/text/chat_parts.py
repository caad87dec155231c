"""A chat reply's text → reasoning, content and tool calls, while it is being written."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rollout_server.text.chat_format import ReplyFormat
from rollout_server.text.tool_calls import read_calls


class Part(Enum):
    CONTENT = "content"
    REASONING = "reasoning"
    TOOL = "tool"


@dataclass(slots=True)
class Gain:
    """What some more text added."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """OpenAI's tool calls, complete."""

    def __add__(self, other: Gain) -> Gain:
        return Gain(self.content + other.content, self.reasoning + other.reasoning, self.calls + other.calls)


class ReplyParts:
    """Follows one reply. Nothing leaves that may still turn out to be a mark; a tool call leaves when it is whole. What
    stands in the place of a call and is none stays what is around it, with its marks."""

    def __init__(
        self,
        format: ReplyFormat,
        *,
        thinking: bool,
        tools: list[dict[str, Any]] | None,
        literal: bool = False,
    ) -> None:
        """`thinking`: it begins inside of reasoning. `literal`: behind that all is content, whatever it spells."""
        self._format = format
        self._tools = None if literal else tools
        self._literal = literal
        self._part = Part.REASONING if thinking else Part.CONTENT
        # Around a tool call: reasoning ends at its own mark only.
        self._around = self._part
        self._held = ""
        # Line breaks between two calls and after the last belong to the format.
        self._blank: str | None = None
        self._ids: set[str] = set()
        self.read = 0
        """How many characters have a known part."""
        self.reasoned: list[tuple[int, int]] = []
        """Where reasoning stands in the text, from and to, its marks included."""
        self._began = 0

    @property
    def calls(self) -> int:
        """Tool calls so far."""
        return len(self._ids)

    def push(self, text: str) -> Gain:
        """Takes more text of the reply."""
        self._held += text
        gain = Gain()
        while (found := self._next_mark()) is not None:
            at, mark, following = found
            inner = self._take(at + len(mark))[:at]
            self._leave(gain, inner, mark, following)
        if self._part is not Part.TOOL:
            self._give(gain, self._take(len(self._held) - self._in_doubt()))
        return gain

    def finish(self, text: str, *, cut: bool) -> Gain:
        """Takes the rest of the text; nothing follows. `cut`: the model had not ended it."""
        gain = self.push(text)
        rest = self._take(len(self._held))
        if self._part is Part.TOOL:
            start = self._format.tool_start or ""
            # Some calls have no end mark, and some models end their turn without it.
            self._close_call(gain, rest, start + rest, whole=not cut)
        else:
            self._give(gain, rest)
        if self._part is Part.REASONING:
            self.reasoned.append((self._began, self.read))
        return gain

    # ---- marks ----------------------------------------------------------------------------------------------------

    def _marks(self) -> list[tuple[str, Part]]:
        format = self._format
        tool = format.tool_start if self._tools else None
        if self._part is Part.TOOL:
            pairs = [(format.tool_end, self._around)]
            if self._around is Part.REASONING:
                # A call that was begun in reasoning and not ended goes no further.
                pairs.append((format.think_end, Part.CONTENT))
        elif self._part is Part.REASONING:
            pairs = [(format.think_end, Part.CONTENT), (tool, Part.TOOL)]
        else:
            pairs = [] if self._literal else [(format.think_start, Part.REASONING), (tool, Part.TOOL)]
        return [(mark, part) for mark, part in pairs if mark]

    def _next_mark(self) -> tuple[int, str, Part] | None:
        found = [(self._held.find(mark), mark, part) for mark, part in self._marks()]
        return min((entry for entry in found if entry[0] >= 0), key=lambda entry: entry[0], default=None)

    def _in_doubt(self) -> int:
        """How many characters at the end may be the beginning of a mark."""
        longest = 0
        for mark, _ in self._marks():
            for length in range(min(len(mark) - 1, len(self._held)), longest, -1):
                if self._held.endswith(mark[:length]):
                    longest = length
                    break
        return longest

    # ---- what leaves ----------------------------------------------------------------------------------------------

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self.read += count
        return taken

    def _give(self, gain: Gain, text: str) -> None:
        if self._blank is not None:
            self._blank += text
            if not self._blank.strip():
                return
            text, self._blank = self._blank, None
        if self._part is Part.REASONING:
            gain.reasoning += text
        else:
            gain.content += text

    def _leave(self, gain: Gain, inner: str, mark: str, following: Part) -> None:
        if self._part is Part.TOOL:
            ended = mark == self._format.tool_end
            self._close_call(gain, inner, f"{self._format.tool_start}{inner}{mark if ended else ''}", whole=True)
        else:
            self._give(gain, inner)
        # From here on the part is what is around the call, if there was one.
        if following is Part.TOOL:
            self._around = self._part
        elif following is not self._part:
            self._blank = None
            if following is Part.REASONING:
                self._began = self.read - len(mark)
            else:
                self.reasoned.append((self._began, self.read))
        self._part = following

    def _close_call(self, gain: Gain, inner: str, raw: str, *, whole: bool) -> None:
        calls = read_calls(self._format, inner, self._tools, self._ids) if whole else None
        self._part = self._around
        if calls is None:
            self._give(gain, raw)
            return
        gain.calls += [call | {"index": self.calls + at} for at, call in enumerate(calls)]
        self._ids.update(call["id"] for call in calls)
        self._blank = self._blank or ""
