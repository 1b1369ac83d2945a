"""Mutual TLS from files: every side shows a certificate of one authority, and asks for one."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from fourfold.errors import ConfigError
from fourfold.transport.config import TlsFiles


class TlsContexts(NamedTuple):
    """For connections that are accepted, and for those that are made."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def load_tls(files: TlsFiles) -> TlsContexts:
    """TLS 1.3 with these files. Raises `ConfigError` where they cannot be used.

    Any certificate of the authority will do, whatever host it names: workers move, and an authority
    of the service's own signs nobody else.
    """
    contexts = TlsContexts(
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    )
    contexts.server.num_tickets = 0  # nobody resumes, and diallers of streams would never read them
    contexts.client.check_hostname = False
    for context in contexts:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(files.certificate, files.key)
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
    return contexts


def _why(error: OSError) -> str:
    return error.strerror or str(error)
