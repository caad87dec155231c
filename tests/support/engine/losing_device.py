"""`python -m tests.support.engine.losing_device MODEL`: serves a model on a CUDA device, loses the device by a
misaligned access while a row runs, and prints the state of the engine and what the row's owner is told."""

from __future__ import annotations

import asyncio
import sys

import mlx.core as mx

from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.loop import Engine
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.errors import EngineUnavailable
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams

SOURCE = "y[0] = *reinterpret_cast<const double*>(reinterpret_cast<const char*>(x) + 1);"


def lose() -> None:
    kernel = mx.fast.cuda_kernel(name="misaligned", input_names=["x"], output_names=["y"], source=SOURCE)
    one = (1, 1, 1)
    (read,) = kernel(
        inputs=[mx.ones((64,))], grid=one, threadgroup=one, output_shapes=[(1,)], output_dtypes=[mx.float32]
    )
    mx.eval(read)


async def main(model: str) -> None:
    compute = Engine._compute

    def losing(self: Engine) -> None:
        compute(self)
        if handle.status.running:
            lose()

    handle = EngineHandle(EngineOptions(model, "tiny"))
    handle.start()
    await handle.wait_ready()
    Engine._compute = losing  # type: ignore[method-assign]
    sampling = SamplingParams(max_tokens=500, ignore_eos=True)
    group = RolloutRequest("a", (1, 2, 3), sampling, PolicyAddress("base"), seeds=(1,))
    try:
        async for _ in handle.submit("a", [group]):
            pass
    except EngineUnavailable as error:
        sys.stdout.write(f"{handle.status.state}: {error}\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
