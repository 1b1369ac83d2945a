"""Pages in a GPU's memory that a neighbour pulls, by the code with which two engines of one GPU
do it: both sides, beside a plain copy on the device."""

from __future__ import annotations

import contextlib
import functools
import queue
import random
import time
from collections.abc import Callable, Iterator

import msgspec
import torch
import xxhash

from fourfold.bench.transport.config import DEVICE_ROW_BYTES, LAYERS, TransportBenchConfig
from fourfold.bench.transport.messages import WAIT_SECONDS, Answer, OpenDevice, Pull
from fourfold.bench.transport.near import FarProcess, Sample, timed
from fourfold.engine.handover.pages import Prompt, page_format, side_stream, view
from fourfold.engine.handover.pulling import PagedMemory, PullLanding, Tickets, may_pull
from fourfold.engine.handover.sending import Route, Sending
from fourfold.errors import ConfigError
from fourfold.kernels.device_memory import DeviceMemoryError, attach
from fourfold.kernels.pages import move_pages
from fourfold.quadrants.kv_pages import PAGE_TOKENS, FloatPages, PageShape
from fourfold.transport import Identity, Node, Part, Peer, TransportConfig
from fourfold.transport.peer import DevicePages
from fourfold.transport.stats import DEVICE_MEMORY

_LEAVE_OUT = "leave device out of --paths"


def find_gpu() -> torch.device:
    """The GPU that both sides use. Raises `ConfigError` where there is none."""
    if not torch.cuda.is_available():
        raise ConfigError(f"--paths device needs a GPU, and PyTorch finds none; {_LEAVE_OUT}")
    device = torch.device("cuda", 0)
    torch.cuda.synchronize(device)  # which wakes its driver
    return device


def describe(pages: FloatPages) -> DevicePages:
    """How others map pages, as an engine tells its peers. Raises `ConfigError` where they
    cannot."""
    (memory,) = pages.memory
    if memory.device_memory is None:
        raise ConfigError(
            "this GPU's memory cannot be shared with another process, for the reason in the "
            f"warning above; {_LEAVE_OUT}"
        )
    uuid = torch.cuda.get_device_properties(pages.device).uuid
    return DevicePages(gpu=str(uuid), pages=pages.data.shape[1], records=memory.device_memory)


class _Side:
    """What both sides have: pages of a GPU that others may map, and a node that says so."""

    def __init__(
        self,
        name: str,
        epoch: int,
        *,
        pages: int,
        page_bytes: int,
        run_pages: int,
        streams: int | None,
    ) -> None:
        """Raises `ConfigError` where there is no GPU, or it does not share its memory."""
        self.device = find_gpu()
        shape = PageShape(
            layers=LAYERS,
            kv_heads=1,
            head_width=page_bytes // DEVICE_ROW_BYTES,
            dtype=torch.float16,
        )
        self.pages = FloatPages(shape, pages, self.device, shared=True)
        self.memory = PagedMemory.of(self.pages)
        self.stream = side_stream(self.pages)
        runs = [range(at, min(at + run_pages, pages)) for at in range(0, pages, run_pages)]
        random.Random(epoch).shuffle(runs)
        order = [page for run in runs for page in run]
        self.prompt = Prompt(order, 0, pages * PAGE_TOKENS)
        self.node = Node(
            Identity(
                name=name,
                epoch=epoch,
                model="benchmark",
                pages=page_format(self.pages),
                device=describe(self.pages),
            ),
            TransportConfig(streams=streams),
        )

    def wait(self) -> None:
        """Until the GPU has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def digest(self) -> int:
        """Checksum of all pages in their order."""
        found = self.memory.records_LPR[:, self.prompt.pages].cpu()
        return xxhash.xxh3_64_intdigest(view(found))


class _TimedLanding(PullLanding):
    """Notes how long pages were moved for."""

    seconds = 0.0

    def landed(self, part: Part, layer: int, layers: int, first: int, count: int) -> int:
        start = time.perf_counter()
        pulled = super().landed(part, layer, layers, first, count)
        self.seconds += time.perf_counter() - start
        return pulled


class FarDevice:
    """The side that pulls."""

    def __init__(self, command: OpenDevice) -> None:
        """Raises `ConfigError` or `DeviceMemoryError` where it cannot."""
        self._side = _Side(
            "far",
            2,
            pages=command.pages,
            page_bytes=command.page_bytes,
            run_pages=command.run_pages,
            streams=command.streams,
        )
        side, peer = self._side, msgspec.json.decode(command.node, type=Peer)
        try:
            self._theirs = self._map(peer)
        except (ConfigError, DeviceMemoryError):
            side.node.close()
            raise
        # Compiles it before it is waited for: a link gives up who stands still for seconds.
        pages = torch.tensor(side.prompt.pages, device=side.device)
        move_pages(side.memory.records_LPR, pages, self._theirs.records_LPR, pages)
        side.wait()

    def _map(self, peer: Peer) -> PagedMemory:
        """A peer's pages, where an engine would pull them, too."""
        if peer.device is None or not may_pull(peer, self._side.node.peer):
            raise ConfigError("both sides must be processes of one host and see the same GPU")
        map_memory = functools.partial(attach, device=self._side.device)
        return PagedMemory.attached(self._side.pages, peer.device, map_memory)

    @property
    def node(self) -> bytes:
        """Its node's `Peer`, as JSON."""
        return msgspec.json.encode(self._side.node.peer)

    def close(self) -> None:
        self._side.node.close()

    def pull(self, command: Pull, say: Callable[[Answer], None]) -> None:
        """Takes pages for a lease; answers when they may come, and when they have."""
        side = self._side
        side.memory.records_LPR.zero_()
        side.wait()
        landing = _TimedLanding(side.memory, self._theirs, side.prompt, 0, side.stream)
        done: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        side.node.expect(command.lease, 1, landing, done.put)
        say(Answer())
        start = time.process_time()
        error = done.get(timeout=WAIT_SECONDS)
        cpu = time.process_time() - start
        side.node.forget(command.lease)
        say(Answer(cpu=cpu, error=error, digest=side.digest(), moving=landing.seconds))


def open_far(command: OpenDevice) -> FarDevice | str:
    """The side that pulls, or why there can be none."""
    try:
        return FarDevice(command)
    except (ConfigError, DeviceMemoryError) as error:
        return str(error)


class NearDevice:
    """The side whose pages are pulled, and its link: what `OurLink` is for memory of the host."""

    trusts = False
    path = DEVICE_MEMORY

    def __init__(self, config: TransportBenchConfig, far: FarProcess, run_pages: int) -> None:
        """Raises `ConfigError` where there is no GPU, or it does not share its memory."""
        self._far = far
        self._side = _Side(
            "near",
            1,
            pages=config.pages,
            page_bytes=config.page_bytes,
            run_pages=run_pages,
            streams=config.streams,
        )
        self._tickets = Tickets(self._side.memory, self._side.stream)
        self._target = torch.empty_like(self._side.memory.records_LPR)
        self._leases = iter(range(1, 1 << 30))
        far.tell(
            OpenDevice(
                pages=config.pages,
                page_bytes=config.page_bytes,
                run_pages=run_pages,
                streams=config.streams,
                node=msgspec.json.encode(self._side.node.peer),
            )
        )
        try:
            answer = far.hear()
        except RuntimeError as error:
            self._side.node.close()
            raise ConfigError(f"pages cannot be pulled out of this GPU: {error}") from error
        self._link = self._side.node.link(msgspec.json.decode(answer.node, type=Peer))

    @contextlib.contextmanager
    def link(self) -> Iterator[NearDevice]:
        """This, when it has been used once; closed at the end."""
        try:
            self.transfer(verify=True)
            yield self
        finally:
            self._side.node.close()

    def copy(self) -> Sample:
        """All bytes from one place of the GPU to another, by PyTorch."""
        with timed() as found:
            self._target.copy_(self._side.memory.records_LPR)
            self._side.wait()
        return Sample(found.seconds, found.cpu, 0.0)

    def transfer(self, *, verify: bool) -> Sample:
        """All pages, which are others each time. Raises `RuntimeError` where they are not what was
        sent."""
        assert verify, "there is no moving of pages without their hashes"
        side, lease = self._side, next(self._leases)
        side.memory.records_LPR.add_(1 + lease % 2)
        side.wait()
        digest = side.digest()
        self._far.tell(Pull(lease=lease))
        self._far.hear()
        done: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with timed() as found:
            transfer = self._link.begin(lease, done.put, self._tickets.pulled)
            sending = Sending(side.prompt, LAYERS, done.put)
            sending.begin(Route(transfer, self._tickets, side.memory.form, 0))
            sending.stored(range(LAYERS), side.prompt.tokens)
            start = time.perf_counter()
            sending.advance()
            hashing = time.perf_counter() - start
            error = done.get(timeout=WAIT_SECONDS)
        if error is not None:
            raise RuntimeError(f"a transfer failed: {error}")
        answer = self._far.hear()
        if answer.digest != digest:
            raise RuntimeError("other pages arrived than were sent")
        return Sample(found.seconds, found.cpu, answer.cpu, hashing, answer.moving)

    def round_trips(self, count: int) -> list[float]:
        """Seconds that messages of 64 bytes took there and back."""
        return self._link.round_trips(count, WAIT_SECONDS)
