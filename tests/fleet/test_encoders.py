"""A fleet of encoders answers whatever it is asked, also where a pause ends what runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from rollout_server.engine.messages.scoring import Embed
from rollout_server.errors import EngineUnavailable
from rollout_server.rollout import PolicyAddress
from tests.support.fleet.kill_replicas import fleet_handle, until
from tests.support.golden_encoders import copied

BASE = PolicyAddress("base")


@pytest.mark.long
def test_a_pause_that_ends_what_runs_leaves_no_call_of_a_fleet_unanswered(tmp_path: Path) -> None:
    model = copied("bert/embed", tmp_path)
    many = tuple((5, 6, 7 + index % 40) * 10 for index in range(3000))

    async def scenes() -> None:
        handle = fleet_handle(model, 2, kv_memory=None, prefill_tokens=32)
        handle.start()
        await handle.wait_ready()
        (before,) = (await handle.embed(Embed(handle.new_id("e"), BASE, ((5, 6, 7),)))).vectors
        calls = [asyncio.create_task(handle.embed(Embed(handle.new_id("e"), BASE, many))) for _ in range(2)]
        await until(lambda: all(replica.state == "live" for replica in handle.status.replicas))
        await asyncio.sleep(0.3)
        await handle.pause("abort")
        for call in calls:
            with pytest.raises(EngineUnavailable, match="ended"):
                await asyncio.wait_for(call, 60)
        await handle.resume()
        (after,) = (await handle.embed(Embed(handle.new_id("e"), BASE, ((5, 6, 7),)))).vectors
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
        await handle.close()

    asyncio.run(scenes())
