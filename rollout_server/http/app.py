"""The application: routes, errors, and the life of the engine behind them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from litestar import Controller, Litestar
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme
from litestar.routes import HTTPRoute
from litestar.types import Message, Send
from pydantic import ValidationError

from rollout_server import __version__
from rollout_server.config import ServerConfig
from rollout_server.engine.handle import EngineHandle
from rollout_server.errors import RolloutError
from rollout_server.fleet.joining.door import Door
from rollout_server.http.metrics import Metrics
from rollout_server.http.middleware import closing, courteous, in_origin_form, is_last, refusal, refusing
from rollout_server.http.observing.observer import Observer
from rollout_server.http.observing.tracing import tracing
from rollout_server.http.openapi import ExactJsonPlugin
from rollout_server.http.page.frames import FRAMES_KEY, Frames
from rollout_server.http.problems import to_response
from rollout_server.http.requests.json_body import WholeRequest
from rollout_server.http.residents import RESIDENTS_KEY, Residents
from rollout_server.http.routes.logprobs import LogprobsController
from rollout_server.http.routes.openai.chat import ChatController
from rollout_server.http.routes.openai.completions import CompletionsController
from rollout_server.http.routes.openai.embeddings import EmbeddingsController
from rollout_server.http.routes.operating.control import ControlController, PrefixesController
from rollout_server.http.routes.operating.explorer import explorer_router
from rollout_server.http.routes.operating.fleet import FleetController
from rollout_server.http.routes.operating.page import PageController
from rollout_server.http.routes.operating.pause import PauseController, PauseDoorsController
from rollout_server.http.routes.pooling.classes import ClassesController
from rollout_server.http.routes.pooling.pairs import PairsController
from rollout_server.http.routes.pooling.rewards import RewardsController
from rollout_server.http.routes.replay_and_probe import RecordedController
from rollout_server.http.routes.rollouts import RolloutsController
from rollout_server.http.routes.system import HealthController, MetricsController, ModelsController
from rollout_server.http.routes.versions import VersionController
from rollout_server.http.routes.vllm.adapters import LoraDoorsController
from rollout_server.http.routes.vllm.tokenizer import TokensController
from rollout_server.http.routes.weights import AliasController, WeightsController
from rollout_server.http.service import STATE_KEY, Service
from rollout_server.http.sockets.connection import DOOR_KEY
from rollout_server.rollout import BASE
from rollout_server.versions.publisher import Publisher
from rollout_server.versions.startup import Startup, door_of, engines, handle_of, open_state


class Application(Litestar):
    """Litestar's middleware sees matched routes only; this wraps whatever is answered."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        service: Service = self.state[STATE_KEY]
        scope = in_origin_form(scope)
        fault = refusal(scope, service.config)
        app = super().__call__ if fault is None else refusing(fault)
        told = self._naming_methods(scope, send) if scope["method"] == "OPTIONS" else send
        told = closing(told) if is_last(scope) else told
        await courteous(app, scope, receive, told, service.metrics.request, service.stopping.is_set)

    def _naming_methods(self, scope: Any, send: Send) -> Send:
        """Litestar's answer to OPTIONS names the first method that a path was registered with, and no other."""

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 204:
                routes = [route for route in self.routes if isinstance(route, HTTPRoute)]
                template = scope.get("path_template")
                methods = {str(method) for route in routes if route.path_format == template for method in route.methods}
                # HEAD is answered wherever GET is.
                methods |= {"HEAD"} if "GET" in methods else set()
                others = [header for header in message["headers"] if header[0].lower() != b"allow"]
                message["headers"] = [*others, (b"allow", ", ".join(sorted(methods)).encode())]
            await send(message)

        return tell


CONTROLLERS = (
    RolloutsController,
    CompletionsController,
    ChatController,
    EmbeddingsController,
    ClassesController,
    PairsController,
    RewardsController,
    TokensController,
    ControlController,
    PrefixesController,
    PauseController,
    PauseDoorsController,
    LoraDoorsController,
    LogprobsController,
    RecordedController,
    WeightsController,
    AliasController,
    VersionController,
    FleetController,
    ModelsController,
    HealthController,
    MetricsController,
)


def routes_of(config: ServerConfig) -> tuple[type[Controller], ...]:
    """What is answered under `config`, beside the document of it."""
    return (*CONTROLLERS, PageController) if config.page == "on" else CONTROLLERS


def create_app(config: ServerConfig, engine: EngineHandle | None = None) -> Litestar:
    """The application for `config`. Its lifespan starts the engine and closes it; one that is passed in must not have
    been started. Without one, the model is looked up now, which may download it."""
    door = door_of(config) if engine is None else None
    residents = residents_for(config, engine, door)

    def lifespan(_: Litestar) -> AbstractAsyncContextManager[None]:
        return running(residents)

    return Application(
        route_handlers=routes_of(config),
        state=State(
            {
                STATE_KEY: residents.base,
                RESIDENTS_KEY: residents,
                FRAMES_KEY: {service.name: Frames(service) for service in residents.every},
                DOOR_KEY: door,
            },
            deep_copy=False,
        ),
        lifespan=[lifespan],
        exception_handlers={
            RolloutError: to_response,
            ValidationError: to_response,
            HTTPException: to_response,
            Exception: to_response,
        },
        request_class=WholeRequest,
        request_max_body_size=None,  # `WholeRequest` and the uploads count for themselves
        openapi_config=document(config),
        plugins=tracing(on=config.otel == "on"),
        logging_config=None,
    )


def residents_for(config: ServerConfig, engine: EngineHandle | None, door: Door | None = None) -> Residents:
    """What routes work with, for every model of the configuration; `door` is where replicas join its fleet."""
    base, *others = [handle_of(config, options, door) for options in engines(config)] if engine is None else [engine]
    handles = {BASE: base} | {name: other for (name, _), other in zip(config.also, others, strict=True)}
    names = tuple(name for name in handles if name != BASE)
    metrics, stopping, created = Metrics(handles), asyncio.Event(), int(time.time())
    services: dict[str, Service] = {}
    instance, before = secrets.token_hex(8), None
    for name, handle in handles.items():
        resident = "" if name == BASE else name
        store = open_state(config, resident)
        observer = observer_of(handle, metrics, name, keep=config.page == "on")
        publisher = Publisher(handle, store, config.keep_versions, () if resident else names, observer)
        instance = store.instance if store and not resident else instance
        before = startup = Startup(config, handle, publisher, resident=resident, after=before)
        if door is not None:
            door.belongs_to(instance)
        services[name] = Service(
            config=config,
            engine=handle,
            publisher=publisher,
            metrics=metrics,
            observer=observer,
            instance=instance,
            startup=startup,
            created=created,
            stopping=stopping,
            resident=resident,
            residents=dict(config.also),
        )
    return Residents(services.pop(BASE), services)


def observer_of(handle: EngineHandle, metrics: Metrics, model: str, *, keep: bool) -> Observer:
    """What notes the work of one model."""
    return Observer(lambda: handle.status, metrics.rows, metrics.push, model, keep=keep)


def document(config: ServerConfig) -> OpenAPIConfig:
    """What `/schema/openapi.json` is made by; it asks for a key where the server does."""
    keys = {"key": SecurityScheme(type="http", scheme="bearer")} if config.protected else {}
    return OpenAPIConfig(
        title="rollout-server",
        version=__version__,
        openapi_router=explorer_router(),
        create_examples=False,
        components=Components(security_schemes=dict(keys)),
        security=[{name: []} for name in keys] or None,
        render_plugins=[ExactJsonPlugin()],
    )


@asynccontextmanager
async def running(residents: Residents) -> AsyncIterator[None]:
    """The engines run inside; the server answers while their models are loading, one after the other."""
    startups = [service.startup.begin() for service in residents.every]
    looking = residents.every if residents.base.config.page == "on" else ()
    sampling = [asyncio.create_task(service.observer.sample_for_ever()) for service in looking]
    try:
        yield
    finally:
        for task in sampling:
            task.cancel()
        await residents.close()
        for service, startup in zip(residents.every, startups, strict=True):
            startup.cancel()
            await service.publisher.close()
