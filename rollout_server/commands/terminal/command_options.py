"""What commands share: options, errors as one sentence, configuration, a client, JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from rollout_server.errors import RolloutError
from rollout_server.quoting import quoted

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from pydantic_settings import BaseSettings

    from rollout_server.config import ServerConfig
    from rollout_server.machine.blas import BlasChoice
    from trainer_client import RolloutClient

    S = TypeVar("S", bound=BaseSettings)

log = logging.getLogger("rollout_server")

RULES: Mapping[str, str] = MappingProxyType(
    {
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_parsing": "a number",
        "bool_parsing": "true or false",
        "greater_than": "above {gt:g}",
        "greater_than_equal": "{ge} or more",
        "less_than_equal": "{le} or less",
        "literal_error": "{expected}",
        "string_too_short": "a text of {min_length} characters or more",
        "string_too_long": "a text of {max_length} characters or less",
    }
)
"""Types of pydantic's errors → what a value has to be."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Url = Annotated[str | None, typer.Option(help="The server; default is ROLLOUT_HOST and ROLLOUT_PORT.", metavar="URL")]


def option(
    text: str, default: str | None = None, metavar: str | None = None, offered: Callable[..., list[str]] | None = None
) -> Any:
    """An option that is None when not given: environment and configuration decide, help names their default. A shell
    completes it with what is `offered`, else with the values that `metavar` lists."""
    return typer.Option(
        help=f"{text} Default: {default}." if default else text,
        metavar=metavar,
        autocompletion=offered or _one_of(metavar),
    )


def _one_of(metavar: str | None) -> Callable[[str], list[str]] | None:
    """For an option shown as `on|off`: its values, as far as they begin with what was typed."""
    values = metavar.split("|") if metavar and "|" in metavar else []
    return (lambda incomplete: [value for value in values if value.startswith(incomplete)]) if values else None


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what a user can cause into one sentence on standard error and exit status 1. A bug keeps its traceback."""
    try:
        yield
    except typer.Exit:  # a RuntimeError by descent
        raise
    except RolloutError as error:
        _fail(error.message)
    except ImportError as error:
        _fail(f"{error}. `rollout-server doctor` says what is wrong with this installation.")
    except (OSError, RuntimeError, ValueError) as error:
        log.debug("Where it came from:", exc_info=True)
        _fail(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(message: str) -> None:
    typer.echo(f"rollout-server: {message}", err=True)
    raise typer.Exit(1)


def load_blas() -> BlasChoice:
    from rollout_server.machine.blas import load_fast_blas

    return load_fast_blas()


def configure(given: dict[str, Any], options: Mapping[str, str]) -> ServerConfig:
    """The configuration from options and environment. Raises ValueError with one line that names everything bad: by its
    option, where the command has one (`options`, by the names of fields), and by its variable."""
    from rollout_server.config import ServerConfig

    return _read(ServerConfig, given, options)


def _read(settings: type[S], given: dict[str, Any], options: Mapping[str, str] = MappingProxyType({})) -> S:
    from pydantic import ValidationError

    try:
        return settings(**given)
    except ValidationError as error:
        faults = [_fault(fault["loc"], _sentence(fault), options) for fault in error.errors()]
        raise ValueError("; ".join(faults)) from None


def _fault(loc: tuple[int | str, ...], text: str, options: Mapping[str, str]) -> str:
    if not loc:
        return text
    field = str(loc[0])
    variable = f"ROLLOUT_{field.upper()}"
    return f"{options[field]} ({variable}): {text}" if field in options else f"{variable}: {text}"


def _sentence(fault: ErrorDetails) -> str:
    """What is wrong with a value. Rules of ours say so themselves."""
    rule = RULES.get(fault["type"])
    if rule is None:
        return fault["msg"].removeprefix("Value error, ")
    return f"{quoted(fault['input'])} is not {rule.format(**fault.get('ctx', {}))}"


def address(url: str | None) -> tuple[str, str | None]:
    """(URL, key) of the server that a command talks to. Raises ValueError for variables that make none."""
    from rollout_server.config import ClientSettings

    # With --url it does not matter what the variables say of an address.
    settings = _read(ClientSettings, {} if url is None else {"host": "127.0.0.1", "port": 8000})
    return url or settings.url, settings.key


@contextmanager
def connected(url: str | None) -> Iterator[RolloutClient]:
    """A client with this environment's key; what the server refuses leaves as one sentence."""
    from trainer_client import Retry, RolloutClient, TrainerClientError

    where, key = address(url)
    try:
        with RolloutClient(where, api_key=key, retry=Retry(attempts=3)) as client:
            yield client
    except TrainerClientError as error:
        raise RuntimeError(str(error)) from error


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        # The contract's name for a size is `bytes`.
        names = {field.name: "bytes" if field.name == "nbytes" else field.name for field in fields(value)}
        return {name: getattr(value, attribute) for attribute, name in names.items()}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
