"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters from a folder that trainer and server share.

Only under `--adapter-dir`, and from nowhere else: a path that a client names is resolved, links and all, and refused
unless it ends inside. What is loaded is a version of a policy like any that was pushed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from litestar import Controller, MediaType, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from adapters.prepare import PreparedBundle
from rollout_server.engine.messages.versions import Delete, Publish
from rollout_server.errors import BodyTooLarge, InvalidField, NotFound
from rollout_server.http.auth import may_administer
from rollout_server.http.openapi import failures
from rollout_server.http.problems import renamed
from rollout_server.http.requests.json_body import StrictJson, read_json
from rollout_server.http.residents import residents_of
from rollout_server.http.service import Service, line_about
from rollout_server.quoting import quoted
from rollout_server.schemas.vllm.adapters import LoadLoraRequest, UnloadLoraRequest
from rollout_server.versions.adapter_directory import CONFIG_NAME, WEIGHT_NAMES, read_adapter_directory

LORA_WORDS: Mapping[str, str] = MappingProxyType(
    {"name": "lora_name", "policy": "lora_name", "adapter": "lora_path", "weights": "lora_path", "config": "lora_path"}
)
"""Names of fields elsewhere → these routes'."""
SAID = "vLLM's words for it."


class LoraDoorsController(Controller):
    """Loads and unloads adapters, for trainers that were written for vLLM."""

    path = "/v1"
    guards = (may_administer,)
    tags = ("vllm",)

    @post(
        "/load_lora_adapter",
        before_request=read_json,
        dto=StrictJson[LoadLoraRequest],
        return_dto=None,
        status_code=200,
        media_type=MediaType.TEXT,
        summary="Publish an adapter directory under --adapter-dir",
        description="A new version, live at once. 404 on a server without --adapter-dir.",
        responses={
            200: ResponseSpec(str, description=SAID, media_type=MediaType.TEXT, generate_examples=False),
            **failures(),
        },
    )
    async def load(self, data: JSONBody[LoadLoraRequest], request: Request[Any, Any, Any]) -> Response[str]:
        service = residents_of(request).of(data.lora_name)
        folder, name = adapter_folder(service), service.own_part(data.lora_name, "lora_name")
        with renamed(LORA_WORDS):
            service.publisher.check_name(name)
            line_about(request, name)
            if not data.load_inplace and has_versions(service, name):
                raise InvalidField(
                    f"The lora adapter {quoted(data.lora_name)} has already been loaded. If you want to load the "
                    "adapter in place, set 'load_inplace' to True.",
                    param="lora_name",
                )
            began = time.perf_counter()
            prepared = await asyncio.to_thread(read_inside, folder, data.lora_path, service)
            validated = time.perf_counter()
            publish = Publish(
                service.engine.new_id("publish"),
                name,
                prepared.bundle,
                prepared=prepared,
                mode=prepared.mode,
                before=(("validate", began, validated),),
            )
            published = await service.publisher.publish(publish)
            line_about(request, name, published.version.number)
        return Response(
            f"Success: LoRA adapter '{data.lora_name}' added successfully.", status_code=200, media_type=MediaType.TEXT
        )

    @post(
        "/unload_lora_adapter",
        before_request=read_json,
        dto=StrictJson[UnloadLoraRequest],
        return_dto=None,
        status_code=200,
        media_type=MediaType.TEXT,
        summary="Delete a name and all its versions",
        description="Rows that use them run on. 404 on a server without --adapter-dir.",
        responses={
            200: ResponseSpec(str, description=SAID, media_type=MediaType.TEXT, generate_examples=False),
            **failures(),
        },
    )
    async def unload(self, data: JSONBody[UnloadLoraRequest], request: Request[Any, Any, Any]) -> Response[str]:
        service = residents_of(request).of(data.lora_name)
        adapter_folder(service)
        name = service.own_part(data.lora_name, "lora_name")
        line_about(request, name)
        if not has_versions(service, name):
            raise NotFound(f"The lora adapter {quoted(data.lora_name)} cannot be found.", param="lora_name")
        with renamed(LORA_WORDS):
            await service.publisher.delete(Delete(service.engine.new_id("delete"), name, None))
        return Response(
            f"Success: LoRA adapter '{data.lora_name}' removed successfully.",
            status_code=200,
            media_type=MediaType.TEXT,
        )


def adapter_folder(service: Service) -> Path:
    """The resolved folder of `--adapter-dir`."""
    folder = service.config.adapter_dir
    if folder is None:
        raise NotFound(
            "This server loads adapters from no folder: start it with --adapter-dir DIR, or push them to /v1/weights."
        )
    return folder.expanduser().resolve()


def has_versions(service: Service, name: str) -> bool:
    return any(policy.name == name and policy.versions for policy in service.policies())


def read_inside(folder: Path, asked: str, service: Service) -> PreparedBundle:
    """The adapter in a directory that a client named, if it and its files lie in the folder. Runs on a thread of its
    own. Raises `InvalidField`, `NotFound`, `BodyTooLarge`, `AdapterInvalid` and its kin."""
    try:
        directory = inside(folder, folder / asked, asked)
        if not directory.is_dir():
            raise NotFound(f"There is no adapter directory {quoted(asked)} under --adapter-dir.", param="lora_path")
        for name in (CONFIG_NAME, *WEIGHT_NAMES):
            file = inside(folder, directory / name, f"{asked}/{name}")
            if file.is_file() and file.stat().st_size > service.config.max_upload:
                raise BodyTooLarge(
                    f"{quoted(asked)} holds a file of more than {service.config.max_upload} bytes (--max-upload).",
                    param="lora_path",
                )
    except (OSError, RuntimeError, ValueError) as error:
        # A loop of links, a name that no file system takes, a folder that may not be read.
        raise InvalidField(f"lora_path {quoted(asked)} cannot be followed: {error}.", param="lora_path") from error
    return read_adapter_directory(directory, service.info)


def inside(folder: Path, path: Path, asked: str) -> Path:
    """The path with every link followed. Whether something is there is not said of what lies outside."""
    found = path.resolve()
    if not found.is_relative_to(folder):
        raise InvalidField(f"lora_path {quoted(asked)} leads out of --adapter-dir.", param="lora_path")
    return found
