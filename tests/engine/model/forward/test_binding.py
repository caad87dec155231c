"""Models of one family share the modules of their classes, each on a thread of its own."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import ModuleType

import mlx.core as mx
import mlx_lm.models.llama as llama

from rollout_server.engine.model.forward.binding import bound

NAME = "scaled_dot_product_attention"


def test_the_last_that_leaves_unbinds() -> None:
    own = getattr(llama, NAME)
    first, second = ExitStack(), ExitStack()
    first.enter_context(bound((llama,)))
    asking = getattr(llama, NAME)
    second.enter_context(bound((llama,)))
    assert asking is not own and getattr(llama, NAME) is asking, "it asks once, whoever is within"
    first.close()
    assert getattr(llama, NAME) is asking, "another forward is under way"
    second.close()
    assert getattr(llama, NAME) is own


def test_threads_find_it_bound_and_leave_it_as_it_was() -> None:
    module = ModuleType("family")
    own = mx.fast.scaled_dot_product_attention
    setattr(module, NAME, own)
    unbound = list[int]()

    def forwards() -> None:
        for turn in range(2000):
            with bound((module,)):
                if getattr(module, NAME) is own:
                    unbound.append(turn)

    threads = [threading.Thread(target=forwards) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not unbound and getattr(module, NAME) is own
