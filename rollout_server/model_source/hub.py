"""Models of the Hugging Face Hub: fetched into its cache once and read from there.

Only data is fetched: configurations, tokenizers, templates and safetensors. Code and pickles stay where they are, as
nothing here runs the one or reads the other. Tokens, cache and endpoint are those of huggingface_hub (`HF_TOKEN`,
`HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`). A file whose connection breaks is gone on with where it broke; what is
whole is never fetched again.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from rollout_server import __version__
from rollout_server.errors import EngineUnavailable, InvalidField, RolloutError
from rollout_server.quoting import quoted, shortened

log = logging.getLogger("rollout_server.hub")

FETCHED = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
LEFT_OUT = ("*/*.safetensors", "*/*.model")
"""Files that hold the same weights again, for other programs."""
LINE_S = 5.0
"""Seconds between two lines about a download, where there is no terminal for a bar."""
REASON = 300
"""The most characters that are shown of somebody else's error."""


def fetch(model: str, revision: str | None = None) -> Path:
    """The directory that holds `model` at `revision` (branch, tag or commit; default the main branch), after
    downloading what is missing of it. Raises `InvalidField` for what the user has to change and `EngineUnavailable` for
    what may work later; both say what to do."""
    started = time.monotonic()
    bars: list[Any] = []
    try:
        found = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(FETCHED),
            ignore_patterns=list(LEFT_OUT),
            library_name="rollout-server",
            library_version=__version__,
            tqdm_class=progress_of(model, bars),
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise explained(error, model, revision) from error
    finally:
        # The library leaves them open, and what is said next would continue their line.
        for bar in bars:
            bar.close()
    path = Path(found)
    log.info("%s is at %s (%.1f s)", model, path, time.monotonic() - started)
    return path


def explained(error: Exception, model: str, revision: str | None) -> RolloutError:
    """The sentence for what went wrong, and what to do about it."""
    where = f"{constants.ENDPOINT}/{model}"
    answered = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match error:
        case HFValidationError():
            return _wrong(
                f"{quoted(model)} is no directory here, and no Hub id either, which is OWNER/NAME or NAME: give one "
                "of the two to --model."
            )
        case GatedRepoError() if get_token() is None:
            return _wrong(f"{model} is gated: accept its terms at {where}, then set HF_TOKEN to a token of yours.")
        case GatedRepoError():
            return _wrong(
                f"{model} is gated, and the account of this token has no access to it: ask for it at {where}, or set "
                "HF_TOKEN to another token."
            )
        case RepositoryNotFoundError():
            private = "the token in use may not read it" if get_token() else "it is private and needs HF_TOKEN"
            return _wrong(
                f"{model} is no directory here, and {constants.ENDPOINT} has no such model, or {private}: "
                "look at the spelling, or set HF_TOKEN to a token that may read it."
            )
        case RevisionNotFoundError():
            return _wrong(
                f"{model} has no revision {quoted(revision or 'main')}: --revision takes a branch, a tag or a commit "
                f"of {where}.",
                "revision",
            )
        case HfHubHTTPError() if answered == 401:
            return _wrong(
                f"{constants.ENDPOINT} refused the token: set HF_TOKEN to a valid one, or unset it and log out for "
                "what everybody may read."
            )
        case HfHubHTTPError() if answered == 403:
            return _wrong(
                f"The token in use may not read {model}: give it access at {constants.ENDPOINT}/settings/tokens, or "
                "set HF_TOKEN to another one."
            )
        case LocalEntryNotFoundError():
            return _not_here(error, model, revision)
    return _broken(error, model)


def _not_here(error: LocalEntryNotFoundError, model: str, revision: str | None) -> RolloutError:
    """Neither the Hub could be asked nor has the cache all of it."""
    cause = error.__cause__
    if constants.HF_HUB_OFFLINE:
        at = "" if revision is None else f" --revision {revision}"
        return _wrong(
            f"{model} is not, or not wholly, in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to "
            f"fetch it: run `rollout-server download {model}{at}` without HF_HUB_OFFLINE, or give a directory."
        )
    if isinstance(cause, HfHubHTTPError):
        return explained(cause, model, revision)
    return EngineUnavailable(
        f"{constants.ENDPOINT} cannot be reached ({_reason(cause or error)}), and {model} is not, or not wholly, in "
        f"the cache {constants.HF_HUB_CACHE}: look at the network and at HF_ENDPOINT, or give a directory."
    )


def _broken(error: Exception, model: str) -> RolloutError:
    return EngineUnavailable(
        f"{model} could not be fetched from {constants.ENDPOINT} ({_reason(error)}): try again; files that are whole "
        "are not fetched again."
    )


def _wrong(message: str, param: str = "model") -> InvalidField:
    return InvalidField(message, param=param)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shortened(lines[0], REASON) if lines else type(error).__name__


def progress_of(title: str, made: list[Any]) -> type[Any]:
    """A class for huggingface_hub to report to: one bar of bytes on a terminal, a line in the log every few seconds
    elsewhere, nothing where HF_HUB_DISABLE_PROGRESS_BARS says so. Its objects are added to `made`."""
    on_terminal = sys.stderr.isatty()

    class Progress(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # Of the library's bars only this one is about all bytes: others count files, or bytes on the wire.
            of_bytes = options.get("unit") == "B" and not str(options.get("name")).endswith(".transfer")
            self._told = time.monotonic()
            sink = sys.stderr if on_terminal else io.StringIO()
            super().__init__(*args, **{**options, "disable": not of_bytes, "desc": title, "file": sink})
            made.append(self)

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            """Its title stays."""

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if on_terminal:
                super().display(msg, pos)
            elif self.n and time.monotonic() - self._told >= LINE_S:
                self._told = time.monotonic()
                done, whole = (self.format_sizeof(number, "B") for number in (self.n, self.total or self.n))
                log.info("%s: %s of %s", title, done, whole)

    return Progress
