"""`/v1/weights/{name}/{version}`: pin, delete, export one kept version."""

from __future__ import annotations

import asyncio
from typing import Any

from litestar import Controller, Request, Response, delete, get, patch
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, JSONBody

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterUnsupported
from adapters.formats import peft, whole_tensors
from adapters.formats.read import FORMATS
from adapters.spec import DENSE_KINDS
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.messages.versions import Delete, Deleted, Export, Pin
from rollout_server.errors import Conflict, InvalidField, UnsupportedField
from rollout_server.http.auth import may_administer, may_infer
from rollout_server.http.openapi import ExportOperation, ModelOperation, failures
from rollout_server.http.replies.json_entries import json_response, version_status
from rollout_server.http.requests.json_body import SAFETENSORS, StrictJson, read_body
from rollout_server.http.requests.queries import asked_resident, read_query
from rollout_server.http.residents import residents_of
from rollout_server.http.service import Service, line_about
from rollout_server.rollout import PolicyVersion
from rollout_server.schemas.weights import DeleteReply, PinReply, PinRequest

FILE_NAMES = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors", "dense": "adapters.safetensors"}
"""What each format's own library calls the file."""


class VersionController(Controller):
    """One immutable version. A freed one is answered 409, whatever is asked of it."""

    path = "/v1/weights/{name:str}/{version:int}"
    tags = ("weights",)

    @patch(
        guards=[may_administer],
        before_request=read_body,
        dto=StrictJson[PinRequest],
        return_dto=None,
        operation_class=ModelOperation,
        summary="Keep a version whatever its age, or no longer",
        responses={200: ResponseSpec(PinReply, description="The version as it is now."), **failures()},
    )
    async def pin(
        self, name: FromPath[str], version: FromPath[int], data: JSONBody[PinRequest], request: Request[Any, Any, Any]
    ) -> Response[bytes]:
        line_about(request, name, version)
        service = asked_resident(request)
        unconditional(request)
        pinned = await service.publisher.pin(Pin(service.engine.new_id("pin"), name, version, data.pinned))
        about = {"base": service.base, "instance": service.instance}
        return json_response({"name": service.called(name), **version_status(pinned.status), **about})

    @delete(
        guards=[may_administer],
        status_code=200,
        operation_class=ModelOperation,
        summary="Delete a version that is not live",
        description="Its rows run on; the memory is given back when the last of them ends. Never waits.",
        responses={200: ResponseSpec(DeleteReply, description="What was deleted."), **failures()},
    )
    async def delete(
        self, name: FromPath[str], version: FromPath[int], request: Request[Any, Any, Any]
    ) -> Response[bytes]:
        return json_response(await deletion(request, name, version))

    @get(
        "/export",
        guards=[may_infer],
        operation_class=ExportOperation,
        summary="A version as a file of PEFT or mlx-lm",
        description="`format` is `peft` (default for low-rank versions) or `mlx`; dense versions have a form of their "
        "own, without one, and those of kind `full` also that of mlx-lm. The configuration is in the metadata under "
        "`adapter_config`. Pushed again, in the same mode, the file gives the same digest.",
        media_type=SAFETENSORS,
        responses={
            200: ResponseSpec(
                bytes, description="A safetensors file.", media_type=SAFETENSORS, generate_examples=False
            ),
            **failures(),
        },
    )
    async def export(
        self, name: FromPath[str], version: FromPath[int], request: Request[Any, Any, Any]
    ) -> Response[bytes]:
        line_about(request, name, version)
        service, format = asked_export(request)
        service.require_restored()
        exported = await service.engine.export(Export(service.engine.new_id("export"), name, version))
        format = format or ("dense" if exported.bundle.spec.kind in DENSE_KINDS else "peft")
        body = await asyncio.to_thread(write, exported.bundle, format, service.info)
        return Response(body, headers=file_headers(exported.version, format), media_type=SAFETENSORS)


async def deletion(request: Request[Any, Any, Any], name: str, number: int | None) -> dict[str, Any]:
    line_about(request, name, number)
    service = asked_resident(request)
    unconditional(request)
    deleted = await service.publisher.delete(Delete(service.engine.new_id("delete"), name, number))
    return delete_reply(deleted, service)


def delete_reply(deleted: Deleted, service: Service) -> dict[str, Any]:
    return {
        "name": service.called(deleted.name),
        "deleted": deleted.numbers,
        "rows_in_use": deleted.rows_in_use,
        "base": service.base,
        "instance": service.instance,
    }


def unconditional(request: Request[Any, Any, Any]) -> None:
    """Raises for a condition that would not be looked at: it must not look as if it held."""
    if "if-match" in request.headers:
        raise UnsupportedField(
            "If-Match is for a push and for activate; this route does not look at it.", param="If-Match"
        )


def asked_export(request: Request[Any, Any, Any]) -> tuple[Service, str | None]:
    """The model and the format that the query asks for; None for the one that goes with the version's kind."""
    fields = read_query(request, ("format", "model"))
    format = fields.get("format")
    if format is not None and format not in FORMATS:
        raise InvalidField(f"format: 'peft' or 'mlx', not {ascii(format)[:60]}.", param="format")
    return residents_of(request).named(fields.get("model")), format


def write(bundle: AdapterBundle, format: str, base: ModelInfo) -> bytes:
    """The file of a bundle; runs on a thread of its own. Raises `Conflict` for what the format cannot say."""
    try:
        if format == "mlx" and bundle.spec.kind in DENSE_KINDS:
            return whole_tensors.write_mlx(bundle, base.weights, base.layers)
        if format == "peft":
            return peft.write(bundle, base.scoring, base.weights)[0]
        body: bytes = (whole_tensors if format == "dense" else FORMATS[format]).write(bundle)[0]
        return body
    except AdapterUnsupported as error:
        raise Conflict(error.message, param="format") from error


def file_headers(version: PolicyVersion, format: str) -> dict[str, str]:
    return {
        "x-policy": str(version),
        "x-policy-digest": version.digest,
        "content-disposition": f'attachment; filename="{FILE_NAMES[format]}"',
    }
