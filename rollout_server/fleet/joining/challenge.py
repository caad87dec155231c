"""How a replica and a controller show each other that they have the same key, which neither of them sends.

Each side draws a nonce and proves that it has the key by an HMAC of both nonces, of who it is, and of the certificate
that the link is encrypted under. So a proof that somebody listened to opens nothing, and somebody who stands between
the two, with a certificate of his own or with none, has no proof that fits.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Side = Literal["replica", "controller"]

PATH, UPGRADE = "/v1/fleet/link", "rollout-fleet"
"""What a replica asks an HTTP server for, which then speaks frames instead."""
NONCE_HEADER, TLS_HEADER = "x-fleet-nonce", "x-fleet-tls"
LONGEST_GREETING = 65_536
"""Bytes of a frame of somebody who is not known yet."""
HANDSHAKE_S = 10.0
"""Seconds until the two know each other."""


def nonce() -> str:
    """What a side draws for one link."""
    return secrets.token_hex(16)


def is_nonce(text: str) -> bool:
    """Returns whether a stranger may have drawn it as `nonce` does."""
    return len(text) == 32 and all(letter in "0123456789abcdef" for letter in text)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One for each link. `certificate` is the controller's as DER, empty where the link is not encrypted."""

    replica: str
    """The nonce of the replica."""
    controller: str
    certificate: bytes

    def proof(self, key: str | None, side: Side, id: str) -> str:
        """What a side says; empty where there is no key."""
        if key is None:
            return ""
        said = [side, id, self.replica, self.controller, hashlib.sha256(self.certificate).hexdigest()]
        return hmac.new(key.encode(), "\0".join(["rollout-fleet 1", *said]).encode(), "sha256").hexdigest()

    def holds(self, proof: str, key: str | None, side: Side, id: str) -> bool:
        """Returns whether the other side has the key."""
        return hmac.compare_digest(proof.encode(), self.proof(key, side, id).encode())


def certificate_of(path: Path) -> bytes:
    """The first certificate of a PEM file, as DER, which is the one that a server shows. Raises `ValueError`."""
    text = path.read_text("ascii", errors="replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    if begin not in text or end not in text:
        raise ValueError(f"{path} holds no certificate in PEM")
    return ssl.PEM_cert_to_DER_cert(text[text.index(begin) : text.index(end) + len(end)])
