"""`/v1/weights`: push a version, look at versions, move an alias."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from litestar import Controller, Request, Response, delete, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, JSONBody

from adapters.bundle import AdapterBundle, measured
from adapters.formats.read import read_tensors
from adapters.prepare import PreparedBundle, host_factors, prepare
from adapters.report import BundleReport, completed
from adapters.report import report as report_on
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.messages.versions import Activate, Publish, Published
from rollout_server.errors import InvalidField
from rollout_server.http.auth import may_administer, may_infer
from rollout_server.http.openapi import CONDITION, ActivateOperation, ModelOperation, UploadOperation, failures
from rollout_server.http.problems import renamed
from rollout_server.http.replies.json_entries import json_response, policy_entry
from rollout_server.http.requests.json_body import StrictJson, read_body
from rollout_server.http.requests.queries import asked_resident
from rollout_server.http.requests.uploads import Upload, read_upload
from rollout_server.http.residents import residents_of
from rollout_server.http.routes.versions import deletion
from rollout_server.http.service import Service, line_about
from rollout_server.quoting import quoted
from rollout_server.schemas.weights import (
    ActivateReply,
    ActivateRequest,
    DeleteReply,
    OnePolicyReply,
    PoliciesReply,
    PushReply,
)
from rollout_server.versions.publisher import timings_of

MATCH = re.compile(CONDITION)


class WeightsController(Controller):
    """Versions are immutable; a name is an alias that moves between two engine steps."""

    path = "/v1/weights"
    guards = (may_infer,)
    tags = ("weights",)

    @post(
        guards=[may_administer],
        status_code=201,
        operation_class=UploadOperation,
        summary="Push weights as a new version",
        description="201 for a new version, 200 where the name already has these weights.",
        responses={
            200: ResponseSpec(PushReply, description="Unchanged: these weights were already there."),
            201: ResponseSpec(PushReply, description="Every group admitted after this reply uses it or a later one."),
            **failures(),
        },
    )
    async def push(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        residents = residents_of(request)
        _ = residents.base.info  # before the upload: there is no use in one while the model is loading
        match = if_match(request)
        began = time.perf_counter()
        upload = await read_upload(request, residents.base.config.max_upload)
        received = time.perf_counter()
        options = upload.options
        service = residents.named(options.model)
        info = service.info
        service.publisher.check_name(options.name)
        line_about(request, options.name)
        prepared, report = await asyncio.to_thread(read, upload, info)
        bundle = prepared.bundle
        validated = time.perf_counter()
        publish = Publish(
            id=service.engine.new_id("publish"),
            name=options.name,
            bundle=bundle,
            activate=options.activate == "true",
            label=options.label,
            if_match=match,
            prepared=prepared,
            mode=prepared.mode,
            dequantize=options.dequantize == "true",
            before=(("receive", began, received), ("validate", received, validated)),
        )
        published = await service.publisher.publish(publish)
        line_about(request, options.name, published.version.number)
        reply = push_reply(published, bundle, completed(report, bundle, published.changes), service)
        reply["timings_ms"] = timings_of(publish, published)
        return json_response(reply, status_code=200 if published.unchanged else 201)

    @get(
        operation_class=ModelOperation,
        summary="All policies of a model and their kept versions",
        responses={200: ResponseSpec(PoliciesReply, description="Policies by name."), **failures()},
    )
    async def all(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        service = asked_resident(request)
        replicas = service.engine.status.replicas
        found = sorted(service.policies(), key=lambda policy: policy.name)
        policies = [policy_entry(policy, service.called(policy.name), replicas) for policy in found]
        return json_response({"policies": policies, "base": service.base, "instance": service.instance})

    @get(
        "/{name:str}",
        operation_class=ModelOperation,
        summary="One policy and its kept versions",
        responses={
            200: ResponseSpec(OnePolicyReply, description="The policy, its oldest version first."),
            **failures(),
        },
    )
    async def one(self, name: FromPath[str], request: Request[Any, Any, Any]) -> Response[bytes]:
        line_about(request, name)
        return json_response(one_policy(asked_resident(request), name))

    @delete(
        "/{name:str}",
        guards=[may_administer],
        status_code=200,
        operation_class=ModelOperation,
        summary="Delete a name and all its versions",
        description="Its versions are gone from then on; pushed again, the name goes on numbering where it was.",
        responses={200: ResponseSpec(DeleteReply, description="What was deleted."), **failures()},
    )
    async def delete(self, name: FromPath[str], request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_response(await deletion(request, name, None))


class AliasController(Controller):
    """Promote or roll back."""

    path = "/v1/weights/{name:str}/activate"
    guards = (may_administer,)
    tags = ("weights",)

    @post(
        before_request=read_body,
        dto=StrictJson[ActivateRequest],
        return_dto=None,
        status_code=200,
        operation_class=ActivateOperation,
        summary="Move the alias to a kept version",
        responses={200: ResponseSpec(ActivateReply, description="The version that is live now."), **failures()},
    )
    async def activate(
        self, name: FromPath[str], data: JSONBody[ActivateRequest], request: Request[Any, Any, Any]
    ) -> Response[bytes]:
        service = asked_resident(request)
        line_about(request, name, data.version)
        command = Activate(service.engine.new_id("activate"), name, data.version, if_match(request))
        # What the engine does not find is the version, if the name has any.
        known = any(policy.name == name for policy in service.policies())
        with renamed({"policy": "version" if known else "name"}):
            published = await service.publisher.activate(command)
        return json_response(activate_reply(published, service))


def if_match(request: Request[Any, Any, Any]) -> str | None:
    """`7` or `sha256:…` out of `If-Match: "7"`."""
    header = request.headers.get("if-match")
    if header is None:
        return None
    found = MATCH.fullmatch(header.strip())
    if found is None:
        raise InvalidField(
            f'If-Match is a quoted version or digest, "7" or "sha256:" and 8 hex digits or more, not {quoted(header)}.',
            param="If-Match",
        )
    return found[1] or found[2]


def read(upload: Upload, info: ModelInfo) -> tuple[PreparedBundle, BundleReport]:
    """Parses, converts, checks against the base, hashes, measures and casts; runs on a thread of its own, and casts on
    another beside the measuring. Raises `InvalidField` for options that do not go with what came."""
    options = upload.options
    spec, tensors = read_tensors(
        upload.weights.joined(),
        upload.config,
        format=options.format,
        layers=info.layers,
        parameters=info.weights,
        scoring=info.scoring,
    )
    mode = options.mode or spec.modes[0]
    if mode not in spec.modes:
        raise InvalidField(
            f"mode: kind {spec.kind} has no low-rank form: leave the mode out, or send 'merged'.", param="mode"
        )
    if options.dequantize == "true" and mode == "adapter" and not spec.dense:
        raise InvalidField(
            "dequantize: an adapter leaves the base's layers as they are; it belongs to mode 'merged'.",
            param="dequantize",
        )
    with ThreadPoolExecutor(1, "cast") as beside:
        casting = beside.submit(host_factors, spec, tensors, info.dtype, mode)
        bundle, grams = measured(spec, tensors)
        told = report_on(bundle, grams)
        factors = casting.result()
    return prepare(bundle, info.dtype, mode=mode, parameters=info.weights, factors=factors), told


def push_reply(published: Published, bundle: AdapterBundle, report: BundleReport, service: Service) -> dict[str, Any]:
    version = published.version
    return {
        "name": version.called,
        "version": version.number,
        "digest": version.digest,
        "label": version.label,
        "kind": bundle.spec.kind,
        "mode": published.mode,
        "rank": bundle.rank,
        "live": published.live,
        "unchanged": published.unchanged,
        "base": service.base,
        "bytes": bundle.nbytes,
        "instance": service.instance,
        "report": {
            "modules": report.modules,
            "dense": report.dense,
            "delta_norm": report.delta_norm,
            "effective_rank": report.effective_rank,
            "largest_modules": [asdict(module) for module in report.largest_modules],
            "zero_modules": report.zero_modules,
            "bytes": report.nbytes,
            "resident_bytes": published.resident_bytes,
        },
    }


def activate_reply(published: Published, service: Service) -> dict[str, Any]:
    version = published.version
    return {
        "name": version.called,
        "version": version.number,
        "digest": version.digest,
        "label": version.label,
        "live": published.live,
        "unchanged": published.unchanged,
        "base": service.base,
        "instance": service.instance,
        "timings_ms": {"activate": round(published.activate_ms, 3)},
    }


def one_policy(service: Service, name: str) -> dict[str, Any]:
    policy = policy_entry(service.policy(name), service.called(name), service.engine.status.replicas)
    return policy | {"base": service.base, "instance": service.instance}
