"""Mutual TLS from files: every side shows a certificate of one authority, and asks for one."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path
from typing import NamedTuple

from fourfold.errors import ConfigError
from fourfold.transport.config import TlsFiles

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class Tls(NamedTuple):
    """One side's TLS."""

    server: ssl.SSLContext
    """For connections that are accepted."""
    client: ssl.SSLContext
    """For those that are made."""
    certificate: bytes
    """Hash of this side's certificate, as `hash_certificate` makes it."""


def hash_certificate(certificate: bytes) -> bytes:
    """SHA-256 of a certificate in DER: 32 bytes."""
    return hashlib.sha256(certificate).digest()


def load_tls(files: TlsFiles) -> Tls:
    """TLS 1.3 with these files. Raises `ConfigError` where they cannot be used.

    Any certificate of the authority will do, whatever host it names: workers move, and an authority
    of the service's own signs nobody else.
    """
    server, client = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    server.num_tickets = 0  # nobody resumes, and diallers of streams would never read them
    client.check_hostname = False
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(files.certificate, files.key, password=_refuse)
        except OSError as error:  # what ssl raises is one too
            raise ConfigError(
                f"the certificate {files.certificate} with the key {files.key} cannot be used: "
                f"{_why(error)}; check --tls-cert and --tls-key"
            ) from error
        try:
            context.load_verify_locations(files.authority)
        except OSError as error:
            raise ConfigError(
                f"the authority {files.authority} cannot be used: {_why(error)}; check --tls-ca"
            ) from error
    return Tls(server, client, hash_certificate(_read_certificate(files.certificate)))


def _read_certificate(path: Path) -> bytes:
    """The first certificate of a PEM file, which is the one that is shown, in DER. Raises
    `ConfigError`."""
    _, begin, rest = path.read_text(encoding="ascii", errors="replace").partition(_BEGIN)
    body, end, _ = rest.partition(_END)
    if not begin or not end:
        raise ConfigError(
            f"{path} holds no certificate between {_BEGIN} and {_END}; check --tls-cert"
        )
    return ssl.PEM_cert_to_DER_cert(begin + body + end)


def _refuse() -> str:
    """In place of a passphrase, for which OpenSSL would wait at the terminal in every process."""
    raise ConfigError(
        "the key of --tls-key is encrypted with a passphrase, which nobody is there to type; "
        "store it without one: openssl pkey -in KEY -out PLAIN"
    )


def _why(error: OSError) -> str:
    return error.strerror or str(error)
