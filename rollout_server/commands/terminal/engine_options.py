"""Options of `serve`: how the engine uses its device, where versions are, which names and pictures it takes."""

from __future__ import annotations

from typing import Annotated

import typer

from rollout_server.commands.terminal.command_options import option

Also = Annotated[
    list[str] | None,
    option("Another model to serve, addressed by its name; repeatable.", metavar="NAME=DIR_OR_HUB_ID"),
]
Memory = Annotated[
    str | None,
    option("Weights, versions and KV of all models.", "half of the device where there are several", metavar="SIZE"),
]
MaxBatch = Annotated[int | None, option("Rows that decode together; as many as the device holds.")]
PrefillTokens = Annotated[int | None, option("Most tokens read in a turn; as many as suit the device.")]
Prefer = Annotated[
    str | None,
    option("Whole batches done soonest, or no row waiting long.", "throughput", metavar="throughput|latency"),
]
Attention = Annotated[
    str | None, option("The attention found right and fastest here, or MLX's own.", "auto", metavar="auto|mlx")
]
Warm = Annotated[
    str | None,
    option("Run a first batch's shapes before serving, on a GPU; none begins after 30 s.", "on", metavar="on|off"),
]
KvMemory = Annotated[str | None, option("Memory for keys and values, as 512MB or 2GiB.", metavar="SIZE")]
KvBits = Annotated[int | None, option("8 keeps keys and values in 8 bits, which log-probabilities show.")]
PrefixCache = Annotated[
    str | None, option("Keep KV for later requests with the same beginning.", "on", metavar="on|off")
]
WeightsMemory = Annotated[str | None, option("Device memory for versions.", metavar="SIZE")]
StateDir = Annotated[
    str | None, option("Directory in which versions outlive a restart; one server each.", metavar="DIR")
]
AdapterDir = Annotated[str | None, option("The only folder that /v1/load_lora_adapter may load from.", metavar="DIR")]
MaxPictureBytes = Annotated[str | None, option("Largest file of a picture.", "20MiB", metavar="SIZE")]
MaxPicturePixels = Annotated[int | None, option("Most pixels of a picture, width times height.", "33554432")]
MaxPictures = Annotated[int | None, option("Most pictures of one conversation.", "64")]
MaxRequestPixels = Annotated[int | None, option("Most pixels of all pictures of a request.", "134217728")]
PictureMemory = Annotated[str | None, option("Memory for pictures that may be shown again.", "256MiB", metavar="SIZE")]
AllowImageHost = Annotated[
    list[str] | None, option("Host to fetch pictures from; repeatable. Else they are data: URLs.", metavar="NAME")
]
Replicas = Annotated[int | None, option("Engines in processes of their own; on CUDA a GPU each.")]
MinReplicas = Annotated[int | None, option("With fewer live ones it is not ready, and no version changes.", "1")]
TensorParallel = Annotated[int | None, option("Ranks, each with a part of every layer; on CUDA a GPU each.")]
Backend = Annotated[str | None, option("How ranks sum; nccl on CUDA, else ring.", metavar="ring|jaccl|jaccl-ring|nccl")]
Hostfile = Annotated[str | None, option("Hosts of the ranks, as mlx.launch reads them; else this one.", metavar="FILE")]
RayAddress = Annotated[
    str | None, option("Ray cluster that places the replicas (extra `ray`).", metavar="auto|HOST:PORT")
]
FleetSwitch = Annotated[
    bool | None, typer.Option("--fleet", help="Compute nothing here: replicas join, with `serve --join`.")
]
Join = Annotated[str | None, option("Be a replica of this controller's fleet.", metavar="URL")]
FleetCert = Annotated[
    str | None, option("Certificate that links are encrypted under; with --join, one to trust.", metavar="FILE")
]
FleetKeyFile = Annotated[str | None, option("Private key of that certificate.", metavar="FILE")]
AllowHost = Annotated[list[str] | None, option("Host name to answer to without keys; repeatable.", metavar="NAME")]
