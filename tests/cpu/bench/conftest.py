"""The scripted server, one for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scripted_server import ScriptedServer


@pytest.fixture(scope="package")
def _running() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(_running: ScriptedServer) -> ScriptedServer:
    """The scripted server, with its counters at zero."""
    _running.requests.clear()
    _running.in_flight_peak = 0
    return _running
