"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from rollout_server.schemas.fields import PolicyText, Request


class LoadLoraRequest(Request):
    later: ClassVar = {"is_3d_lora_weight": (False,)}

    lora_name: PolicyText
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="An adapter's directory, under --adapter-dir: relative to it, or absolute and inside it."
    )
    load_inplace: bool = Field(default=False, description="A new version of a name that is there already.")


class UnloadLoraRequest(Request):
    lora_name: PolicyText
    lora_int_id: int | None = Field(default=None, description="Changes nothing: names are enough.")
