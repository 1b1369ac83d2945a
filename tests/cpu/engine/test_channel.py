"""The wire between a gateway and an engine: every message arrives whole, as what it was."""

from __future__ import annotations

import itertools
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from fourfold.engine.building import EngineSetup, ModelFacts
from fourfold.engine.channel import (
    Channel,
    FromEngine,
    Hello,
    Load,
    LoadFailed,
    News,
    Progress,
    Ready,
    Stop,
    ToEngine,
    encode,
)
from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import (
    Abort,
    EngineStats,
    FinishReason,
    Role,
    SamplingParams,
    Submit,
    TokenLogprob,
    TokenOutput,
)
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.models.precision import PageFormat, Precision
from fourfold.transport import format as transport
from fourfold.transport.peer import Peer

SAMPLING = SamplingParams(
    temperature=0.5, logit_bias={7: -1.5}, stop_token_ids=(2, 3), seed=2**62, logprobs=2
)
TO_ENGINE: list[ToEngine] = [
    Load(
        EngineSetup(
            source=Source(SourceKind.DIRECTORY, Path("/models/m\u00fcll"), "m\u00fcll"),
            device="cuda:1",
            precision=Precision.W4A8,
            config=EngineConfig(kv_pages=PageFormat.INT8, kv_memory_gib=1.5, max_running=3),
        )
    ),
    Submit(request_id=2**40, prompt_ids=tuple(range(70_000)), sampling=SAMPLING, n=4),
    Abort(request_id=5, index=1, reason=FinishReason.STOP),
    Abort(request_id=5),
    Stop(),
]
PAGES = transport.PageFormat(
    layers=2,
    kv_heads=2,
    head_width=8,
    page_tokens=64,
    code="int8",
    open_code="float32",
    record_bytes=4096,
)
LIKELY = TokenLogprob(5, -0.25, ((5, -0.25), (9, float("-inf"))))
FROM_ENGINE: list[FromEngine] = [
    Progress(5, 2**40),
    Hello("both-0", Role.BOTH, 5),
    Ready(
        ModelFacts(vocabulary=320, eos_token_ids=(2,), checkpoint="a", fingerprint="a float32"),
        1024,
        EngineStats(pages_total=9),
        Peer(name="both-0", epoch=2**63, host="::1", port=9, pages=PAGES),
        "cpu",
    ),
    LoadFailed("ConfigError", "a sentence"),
    News([], EngineStats(steps=3, step_seconds=0.5), 1.25),
    News(
        [
            TokenOutput(request_id=1, index=0, token=5, logprob=LIKELY, cached_tokens=64),
            TokenOutput(request_id=1, index=1, prompt_logprobs=(LIKELY, LIKELY)),
            TokenOutput(request_id=2, index=0, finish=FinishReason.FAILED, error="because"),
        ]
        * 500,
        EngineStats(),
        2.5,
    ),
]


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize(("kind", "messages"), [(ToEngine, TO_ENGINE), (FromEngine, FROM_ENGINE)])
@pytest.mark.parametrize("piece", [1 << 20, 1999])
def test_messages_arrive_as_they_were_however_they_were_cut(
    kind: object, messages: list[object], piece: int, wire: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = wire
    data = b"".join(encode(message) for message in messages)  # type: ignore[arg-type]

    def send() -> None:
        for start in range(0, len(data), piece):
            ours.sendall(data[start : start + piece])

    threading.Thread(target=send).start()
    channel: Channel[object] = Channel(theirs, kind)
    heard: list[object] = []
    while len(heard) < len(messages):
        heard += channel.receive()
    assert heard == messages


def test_a_setup_comes_out_with_its_types(wire: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = wire
    sent = TO_ENGINE[0]
    Channel[FromEngine](ours, FromEngine).send(sent)
    [heard] = Channel[ToEngine](theirs, ToEngine).receive()
    assert isinstance(heard, Load)
    assert heard.setup.source.path == Path("/models/m\u00fcll")
    assert heard.setup.precision is Precision.W4A8
    assert heard.setup.config.kv_pages is PageFormat.INT8


def test_what_claims_to_be_too_long_is_no_message(
    wire: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = wire
    head = (4294901244).to_bytes(4, "little") + bytes(4)
    ours.sendall(head + zlib.crc32(head).to_bytes(4, "little") + b"{}")
    with pytest.raises(ValueError, match="4294901244 bytes"):
        Channel[ToEngine](theirs, ToEngine).receive()


@pytest.mark.parametrize("bit", range(8))
def test_what_is_altered_on_its_way_is_no_message(bit: int) -> None:
    data = encode(TO_ENGINE[2])
    for place in range(len(data)):
        ours, theirs = socket.socketpair()
        altered = bytearray(data)
        altered[place] ^= 1 << bit
        with ours, theirs:
            ours.sendall(altered)
            with pytest.raises(ValueError, match="not what was sent"):
                Channel[ToEngine](theirs, ToEngine).receive()


def test_a_part_of_a_message_is_none_yet_and_an_end_is_noticed(
    wire: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = wire
    theirs.setblocking(False)
    channel: Channel[ToEngine] = Channel(theirs, ToEngine)
    with pytest.raises(BlockingIOError):
        channel.receive()
    data = encode(Abort(request_id=1))
    heard = list(
        itertools.chain.from_iterable(
            (ours.send(data[place : place + 1]), channel.receive())[1] for place in range(len(data))
        )
    )
    assert heard == [Abort(request_id=1)]
    ours.close()
    with pytest.raises(EOFError):
        channel.receive()


def test_a_worker_without_pages_is_no_message(wire: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = wire
    facts = ModelFacts(vocabulary=9, eos_token_ids=(), checkpoint="a", fingerprint="a float32")
    peer = Peer(name="a", epoch=1, host="::1", port=9, pages=PAGES)
    message = msgspec.msgpack.decode(encode(Ready(facts, 64, EngineStats(), peer, "cpu"))[12:])
    del message["peer"]["pages"]
    theirs.sendall(encode(message))
    with pytest.raises(msgspec.MsgspecError, match="without pages"):
        Channel[FromEngine](ours, FromEngine).receive()


def test_options_that_are_refused_are_no_message(wire: tuple[socket.socket, socket.socket]) -> None:
    """A gateway of another version may take what this one does not."""
    ours, theirs = wire
    message = msgspec.msgpack.decode(encode(TO_ENGINE[0])[12:])
    message["setup"]["config"]["max_running"] = 0
    ours.sendall(encode(message))
    with pytest.raises(ValueError, match="--max-running 0 must be at least 1"):
        Channel[ToEngine](theirs, ToEngine).receive()


def test_what_takes_long_to_send_is_sent_while_any_of_it_goes() -> None:
    """A socket's timeout is for silence, not for the whole of a long message."""
    sent = bytearray()

    class Slow:
        """Takes a little at a time."""

        def send(self, data: memoryview) -> int:
            sent.extend(data[:100])
            return min(100, len(data))

    Channel[ToEngine](Slow(), FromEngine).send(FROM_ENGINE[-1])  # type: ignore[arg-type]
    assert bytes(sent) == encode(FROM_ENGINE[-1])
