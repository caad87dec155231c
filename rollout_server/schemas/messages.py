"""Chat messages and what goes with them, the same on every route that renders a chat template."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rollout_server.quoting import quoted
from rollout_server.schemas.fields import MANY, ONE, Request, unsupported

OTHER_PARTS = frozenset(
    {
        "input_image",
        "image",
        "input_audio",
        "audio_url",
        "audio",
        "input_video",
        "video_url",
        "video",
        "file",
        "refusal",
        "thinking",
    }
)
PICTURE, TEXT = "<picture>", "<text>"
ImageUrls = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(
        min_length=1,
        description="A data: URL for each picture, in the order of its placeholders, of which the ids hold as many as "
        "the model reads for it: those that a reply's prompt_token_ids have.",
    ),
]
"""Pictures beside token ids."""


class TextPart(Request):
    """A content part. Where the chat template reads one text, parts are put together without anything between them."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _known_type(cls, data: Any) -> Any:
        # Before the fields that only parts of other types have are called unknown.
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind in OTHER_PARTS:
            raise unsupported("type", f"is {quoted(kind)}; this server reads parts of type 'text' and 'image_url'")
        return data


class ImageUrl(Request):
    # Pictures are always read as finely as the model's own limits allow.
    later: ClassVar = {"detail": ("auto", "high")}

    url: Annotated[str, Field(min_length=1)] = Field(description="data:image/png;base64,…")


class PicturePart(Request):
    """A picture, where the model has a tower for them."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _part_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return PICTURE if kind == "image_url" else TEXT


ContentPart = Annotated[
    Annotated[TextPart, Tag(TEXT)] | Annotated[PicturePart, Tag(PICTURE)], Discriminator(_part_kind)
]


def _content_form(value: Any) -> str | None:
    if isinstance(value, str):
        return ONE
    return MANY if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[list[ContentPart], Tag(MANY)],
    Discriminator(
        _content_form, custom_error_type="content_form", custom_error_message="must be text or a list of content parts"
    ),
]


class Message(Request):
    """One chat message, as the model's chat template reads it."""

    later: ClassVar = {"refusal": (), "audio": (), "function_call": (), "annotations": ([],)}

    role: Annotated[str, Field(min_length=1)]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def image_urls(self) -> list[str]:
        """The pictures of its content, in their order."""
        parts = self.content if isinstance(self.content, list) else ()
        return [part.image_url.url for part in parts if isinstance(part, PicturePart)]


Messages = Annotated[list[Message], Field(min_length=1)]


class Conversation(Request):
    """Messages, and how the chat template renders them."""

    messages: Messages
    tools: list[dict[str, Any]] | None = Field(default=None, description="Given to the chat template as they are.")
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Variables of the chat template.")
