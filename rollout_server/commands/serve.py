"""`rollout-server serve`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout_server.commands.asking.server_choice import Adapters
from rollout_server.commands.terminal.command_options import configure, load_blas, log, one_sentence, option
from rollout_server.commands.terminal.engine_options import (
    AdapterDir,
    AllowHost,
    AllowImageHost,
    Also,
    Attention,
    Backend,
    FleetCert,
    FleetKeyFile,
    FleetSwitch,
    Hostfile,
    Join,
    KvBits,
    KvMemory,
    MaxBatch,
    MaxPictureBytes,
    MaxPicturePixels,
    MaxPictures,
    MaxRequestPixels,
    Memory,
    MinReplicas,
    PictureMemory,
    Prefer,
    PrefillTokens,
    PrefixCache,
    RayAddress,
    Replicas,
    StateDir,
    TensorParallel,
    Warm,
    WeightsMemory,
)

if TYPE_CHECKING:
    from rollout_server.config import ServerConfig
    from rollout_server.engine.messages.options import Task

TRIED: Mapping[Task, tuple[str | None, str, dict[str, Any]]] = MappingProxyType(
    {
        "generate": (
            'generate "12+13=" --max-tokens 16',
            "/v1/completions",
            {"model": "base", "prompt": "12+13=", "max_tokens": 16},
        ),
        "classify": ('score "12+13=25"', "/v1/rewards", {"model": "base", "sequences": [{"text": "12+13=25"}]}),
        "token_classify": (
            None,
            "/v1/rewards",
            {"model": "base", "sequences": [{"text": "12+13=25"}], "steps": {"text": "="}},
        ),
        "embed": (
            'score "a cat sat" "12+13=25" --query "who sat?"',
            "/v1/embeddings",
            {"model": "base", "input": "12+13="},
        ),
    }
)
"""What somebody may try first with a model of a task: a command, and a route with its body."""

RANKS_END_S = 20.0
"""Beyond what replies may take, seconds until ranks that do not end are killed."""


def serve(
    ctx: typer.Context,
    model: Annotated[str | None, option("Directory or Hub id; without it the embedded demo model.")] = None,
    also: Also = None,
    adapters: Adapters = None,
    served_model_name: Annotated[str | None, option("What the base is called, besides `base`.")] = None,
    revision: Annotated[str | None, option("Branch, tag or commit of a Hub id.")] = None,
    context_length: Annotated[int | None, option("Tokens of prompt and reply; at most the model's.")] = None,
    host: Annotated[str | None, option("Address to listen on; loopback unless keys are set.", "127.0.0.1")] = None,
    port: Annotated[int | None, option("Port to listen on; 0 takes a free one.", "8000")] = None,
    max_batch: MaxBatch = None,
    prefill_tokens: PrefillTokens = None,
    prefer: Prefer = None,
    attention: Attention = None,
    warm: Warm = None,
    memory: Memory = None,
    kv_memory: KvMemory = None,
    kv_bits: KvBits = None,
    prefix_cache: PrefixCache = None,
    weights_memory: WeightsMemory = None,
    max_queue: Annotated[int | None, option("Requests open at once; more are answered 429.", "4096")] = None,
    max_rows_per_request: Annotated[int | None, option("Rows of one request; more are answered 400.", "65536")] = None,
    keep_versions: Annotated[int | None, option("Newest versions kept of each name.", "8")] = None,
    state_dir: StateDir = None,
    adapter_dir: AdapterDir = None,
    max_upload: Annotated[str | None, option("Largest upload of weights.", "2GiB", metavar="SIZE")] = None,
    max_body: Annotated[str | None, option("Largest other request body.", "64MiB", metavar="SIZE")] = None,
    max_picture_bytes: MaxPictureBytes = None, max_picture_pixels: MaxPicturePixels = None,
    max_pictures: MaxPictures = None, max_request_pixels: MaxRequestPixels = None, picture_memory: PictureMemory = None,
    allow_image_host: AllowImageHost = None,
    replicas: Replicas = None, min_replicas: MinReplicas = None,
    ray_address: RayAddress = None,
    tensor_parallel: TensorParallel = None,
    backend: Backend = None, hostfile: Hostfile = None,
    fleet: FleetSwitch = None,
    join: Join = None,
    fleet_cert: FleetCert = None, fleet_key_file: FleetKeyFile = None,
    page: Annotated[str | None, option("Serve the live page at /.", "on", metavar="on|off")] = None,
    trace: Annotated[str | None, option("Record a timeline of the engine's turns.", metavar="FILE")] = None,
    log_format: Annotated[str | None, option("How the log is written.", "text", metavar="text|json")] = None,
    otel: Annotated[str | None, option("Trace requests (extra `otel`).", "off", metavar="on|off")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Listen beyond loopback without keys.")] = None,
    allow_host: AllowHost = None,
) -> None:  # fmt: skip
    """Serve a base model, and others beside it: rollouts, completions, log-probabilities, rewards, weights.

    What is not given here is taken from ROLLOUT_<NAME> in the environment, then from the defaults. Keys come from
    ROLLOUT_API_KEY and ROLLOUT_ADMIN_KEY only, and the key of a fleet from ROLLOUT_FLEET_KEY."""
    options = {str(parameter.name): parameter.opts[0] for parameter in ctx.command.params}
    _serve({name: value for name, value in ctx.params.items() if value not in (None, [], ())}, options)


def _serve(given: dict[str, Any], options: Mapping[str, str]) -> None:
    """Reads the configuration, and serves until it is told to stop."""
    with one_sentence():
        blas = load_blas()
        config = configure(given, options)
        from rollout_server import logs

        logs.configure(config.log_format)
        log.log(logging.WARNING if blas.missing else logging.INFO, "%s", blas)
        if config.tensor_parallel is not None and launched_elsewhere(config):
            return
        if config.join is not None:
            from rollout_server.commands.join import join

            return join(config)
        from rollout_server.http.server import serve as serve_http

        serve_http(config, ready=partial(greet, page=config.page == "on", key=key_to_send(config)))


def launched_elsewhere(config: ServerConfig) -> bool:
    """With a hostfile this command runs again, as each rank; returns whether this process was one that serves no HTTP,
    whose work is done."""
    from rollout_server.config import RankSettings, forwarded
    from rollout_server.versions.startup import ranks_of

    rank, ranks = RankSettings().mlx_rank, ranks_of(config)
    if ranks is None or (rank is None and config.hostfile is None):
        return False
    if rank is None and config.hostfile is not None:
        from rollout_server.fleet.ranks.hosts import launch, launching, read_hosts
        from rollout_server.fleet.wire import AGAIN

        hosts = read_hosts(config.hostfile, ranks.size, ranks.backend)
        command = launching(config.hostfile, ranks.backend, forwarded(), sys.argv[1:])
        # The launcher says of no rank how it has ended: one that could not go on is to be started again.
        sys.exit(0 if launch(command, hosts[0], config.shutdown_s + RANKS_END_S) else AGAIN)
    if rank:
        from rollout_server.fleet.ranks.follower import follow

        sys.exit(follow(ranks))
    return False


def key_to_send(config: ServerConfig) -> str | None:
    """The variable that holds a key for inference; None where the server asks for none."""
    if config.api_key is not None:
        return "ROLLOUT_API_KEY"
    return None if config.admin_key is None else "ROLLOUT_ADMIN_KEY"


def greet(url: str, task: Task, *, page: bool, key: str | None) -> None:
    """Says that the server is ready, where to look, and what to try from another terminal, of what its model does.
    Commands take keys from the environment, where the server's own are; curl has to be given that of `key`."""
    from rollout_server.http.server import announce

    announce(url)
    given = "" if key is None else f' -H "Authorization: Bearer ${key}"'
    command, route, asked = TRIED[task]
    lines = [f"  page    {url}/"] if page else []
    lines += [f"  {command.split()[0]:7} rollout-server {command} --url {url}"] if command else []
    lines += [
        f"  push    rollout-server push DIR --name policy --url {url}",
        f"  curl    curl {url}{route} -H 'content-type: application/json'{given} -d '{json.dumps(asked)}'",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
