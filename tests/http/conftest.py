"""A small real tokenizer, a scripted engine, and the application over it."""

from __future__ import annotations

from tests.support.http.fixtures import (
    adapter as adapter,
)
from tests.support.http.fixtures import (
    client as client,
)
from tests.support.http.fixtures import (
    config as config,
)
from tests.support.http.fixtures import (
    engine as engine,
)
from tests.support.http.fixtures import (
    made_app as made_app,
)
from tests.support.http.fixtures import (
    problem as problem,
)
from tests.support.http.fixtures import (
    push as push,
)
from tests.support.http.fixtures import (
    tokenizer as tokenizer,
)
