"""Bodies of the routes that score, rank and pool, made to go together: which model does what, one way of saying what is
read, and one kind of question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Body = dict[str, Any]
REWARDS = "rm"
"""A reward model, as a version of the base."""
NAMES = ("rm", "rm@1")


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else "a b"


def _texts(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [_text(each) for each in texts] or ["a"]


def _without(body: Body, *names: str) -> Body:
    return {name: value for name, value in body.items() if name not in names}


def _classes(body: Body) -> Body:
    """`input` or `messages`, one name of the activation, and one task."""
    kept = _without(body, "activation", "steps", "task", *(("messages",) if body.get("input") else ("input",)))
    if not kept.get("input") and not kept.get("messages"):
        kept = {**_without(kept, "messages"), "input": "a b"}
    return {**kept, "model": _scorer(body)}


def _scorer(body: Body) -> str:
    return NAMES[len(str(body.get("model"))) % len(NAMES)]


def _rewards(body: Body) -> Body:
    kept = {**_without(body, "label_token_ids", "steps"), "model": _scorer(body)}
    return {**kept, "steps": {"token_id": 5}} if body.get("steps") else kept


def _pairs(body: Body) -> Body:
    """Texts with texts; or a query with items and the tokens that are asked for."""
    kept = _without(
        body, "queries", "documents", "text_1", "text_2", "data_1", "data_2", "query", "items", "activation"
    )
    if not body.get("label_token_ids"):
        kept = _without(kept, "label_token_ids", "apply_softmax", "item_first")
        return {**kept, "queries": _text(body.get("queries")), "documents": _texts(body.get("documents"))}
    asked = {"query": [5, 6], "items": [[7], [8, 9]]} if isinstance(body.get("query"), list) else {}
    return {**kept, "model": "base", **(asked or {"query": _text(body.get("query")), "items": ["a", "b"]})}


def _ranks(body: Body) -> Body:
    kept = _without(body, "activation")
    return {**kept, "query": _text(body.get("query")), "documents": _texts(body.get("documents"))}


def _remote(body: Body) -> Body:
    return {"query": _texts(body.get("query")), "model": REWARDS}


_BY_ROUTE: dict[str, Callable[[Body], Body]] = {
    "classify": _classes,
    "pooling": _classes,
    "score": _pairs,
    "rerank": _ranks,
    "rewards": _rewards,
    "get_reward": _remote,
}


def fitting(path: str, body: Any) -> Any:
    """A body that the route of this path takes; as it is where the path is none of these."""
    make = _BY_ROUTE.get(path.rsplit("/", 1)[-1])
    return make(body) if make is not None and isinstance(body, dict) else body
