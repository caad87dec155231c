"""What the code of an mlx-lm family reads of config.json, found in its source: `ModelArgs.from_dict` drops every key
that the class has no field for, and a class may have a field that its code never looks at."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rollout_server.errors import EngineUnavailable
from rollout_server.quoting import quoted

ARGS = "ModelArgs"
NESTED = "text_config"
PACKAGES = ("rollout_server.models.recurrent", "mlx_lm.models")
"""Where modules of families are: the first that has one of this name. Ours are those that mlx-lm lacks, or has with
faults."""
ATTEMPTS = 20
SHARED_CODE = frozenset({"activations", "base", "cache", "pipeline", "rope_utils", "switch_layers"})
"""Modules that see no configuration of a family."""


@dataclass(frozen=True, slots=True)
class Family:
    """What one class takes of the part of config.json that describes the text model."""

    name: str
    """The module of mlx-lm that computes the text model."""
    module: str
    """The module whose `Model` is loaded: this one, or one around it."""
    package: str
    """The package that this module is in."""
    fields: frozenset[str]
    required: frozenset[str]
    """Fields without a default."""
    reads: frozenset[str]
    """Fields that some code looks at."""
    words: frozenset[str]
    """Short texts in the source: which names of layers it knows, for one."""
    calls: frozenset[str]
    """Names of functions and classes that the source mentions."""
    nested: bool
    """True if that part is `text_config`, and not config.json itself."""
    outer: frozenset[str] = frozenset()
    """Fields of the class around it, if there is one."""

    @property
    def code(self) -> str:
        """What computes it, as sentences name it."""
        return f"{'mlx-lm' if self.package.startswith('mlx_lm') else 'this server'}'s {self.name}"


def family_of(config: Mapping[str, Any], renamed: Mapping[str, str]) -> Family:
    """The family that serves this configuration; `renamed` is mlx-lm's table of model types that another module
    serves. Raises `EngineUnavailable` where there is none."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise EngineUnavailable(f"config.json names no family: model_type is {quoted(kind)}.")
    outer = _Source.of(renamed.get(kind, kind))
    if outer is None:
        raise EngineUnavailable(f"Model type {kind} not supported.")
    text = config.get(NESTED)
    fields = outer.fields(ARGS)
    if NESTED not in fields:
        return outer.family(ARGS)
    # What such a class does without the nested part is to take the whole for it.
    nested = isinstance(text, dict)
    inner, name = outer.text_class(text if isinstance(text, dict) else config)
    return replace(inner.family(name), module=outer.name, package=outer.package, nested=nested, outer=frozenset(fields))


def parsed(text: str) -> ast.Module:
    """Its tree. Older Pythons count depth over all threads while they make one, and give up by SystemError where two
    threads do at once, as engines that load side by side may (CPython's issue 106905); the next attempt counts anew."""
    for _ in range(ATTEMPTS):
        with suppress(SystemError):
            return ast.parse(text)
    return ast.parse(text)


@dataclass(frozen=True, eq=False)
class _Source:
    name: str
    package: str
    tree: ast.Module

    @classmethod
    def of(cls, name: str) -> _Source | None:
        if re.fullmatch(r"[\w-]+", name) is None:
            return None
        for package in PACKAGES:
            path = _folder(package) / f"{name}.py"
            if path.is_file():
                return cls(name, package, parsed(path.read_text("utf-8")))
        return None

    def family(self, name: str) -> Family:
        sources = list(self._reachable(set()))
        fields = self.fields(name)
        looked_at = {word for source in sources for word in source._looked_at()}
        nodes = [node for source in sources for node in ast.walk(source.tree)]
        return Family(
            self.name,
            self.name,
            self.package,
            fields=frozenset(fields),
            required=frozenset(field for field, needed in fields.items() if needed),
            reads=frozenset(fields) & looked_at,
            words=frozenset(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)),
            calls=frozenset(
                n.attr if isinstance(n, ast.Attribute) else n.id
                for n in nodes
                if isinstance(n, ast.Attribute | ast.Name)
            ),
            nested=False,
        )

    @cached_property
    def _imports(self) -> dict[str, tuple[str, str | None]]:
        """Local name → (module of mlx-lm, name in it; None for the module itself)."""
        found: dict[str, tuple[str, str | None]] = {}
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for alias in node.names:
                    local = alias.asname or alias.name
                    found[local] = (alias.name, None) if node.module is None else (node.module, alias.name)
        return found

    @cached_property
    def _classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}

    def fields(self, name: str) -> dict[str, bool]:
        """Field → whether it has to be there, of a dataclass and of those it extends."""
        found: dict[str, bool] = {}
        for base in self._classes[name].bases:
            where = self._resolve(base)
            if where is not None:
                found |= where[0].fields(where[1])
        for node in self._classes[name].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = node.value is None
        return found

    def _resolve(self, expression: ast.expr) -> tuple[_Source, str] | None:
        """The class that an expression names, if it is one of mlx-lm's with fields of its own."""
        if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
            module, inside = self._imports.get(expression.value.id, ("", ""))
            source = _Source.of(module) if inside is None else None
            name = expression.attr
        elif isinstance(expression, ast.Name) and expression.id in self._classes:
            source, name = self, expression.id
        elif isinstance(expression, ast.Name):
            module, inside = self._imports.get(expression.id, ("", None))
            source, name = _Source.of(module), inside or ""
        else:
            return None
        return (source, name) if source is not None and name in source._classes and source.name != "base" else None

    def text_class(self, text: Mapping[str, Any]) -> tuple[_Source, str]:
        """The class that takes `text_config`: of several, the one whose module is called as the text's model type,
        else the last."""
        found = []
        for node in ast.walk(self.tree):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr == "from_dict" and NESTED in ast.dump(node):
                found.append(self._resolve(called.value))
        named = [where for where in found if where is not None]
        # A module that extends another leaves the nested part to it.
        for base in (*self._classes[ARGS].bases, *self._classes["Model"].bases):
            where = None if named else self._resolve(base)
            if where is not None and where[0] is not self:
                return where[0].text_class(text)
        if not named:
            raise EngineUnavailable(f"mlx-lm's {self.name} takes text_config in a way that cannot be followed.")
        # ast.walk goes by depth, and an elif lies deeper than the if before it.
        return next((where for where in named if where[0].name == text.get("model_type")), named[-1])

    def _reachable(self, seen: set[str]) -> Iterator[_Source]:
        seen.add(self.name)
        yield self
        for module, _ in self._imports.values():
            if module not in seen | SHARED_CODE and (source := _Source.of(module)) is not None:
                yield from source._reachable(seen)

    def _looked_at(self) -> Iterator[str]:
        """Names that code takes from an object: of `self` only where the class is one of fields."""
        for top in self.tree.body:
            own = isinstance(top, ast.ClassDef) and any(_is_dataclass(mark) for mark in top.decorator_list)
            for node in ast.walk(top):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    if own or not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                        yield node.attr
                elif (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id == "getattr"
                    and isinstance(node.args[1], ast.Constant)
                ):
                    yield str(node.args[1].value)


def _is_dataclass(mark: ast.expr) -> bool:
    called = mark.func if isinstance(mark, ast.Call) else mark
    return isinstance(called, ast.Name) and called.id == "dataclass"


def _folder(package: str) -> Path:
    top, *rest = package.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise EngineUnavailable(f"{top} is not installed.")
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
