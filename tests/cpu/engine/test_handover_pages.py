"""Pages on their way between engines that keep them alike, or not: what is read is what lands."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fourfold.engine.handover import pages as pages_module
from fourfold.engine.handover.convert import ConvertedPages
from fourfold.engine.handover.landing import HostLanding, PromptLanding
from fourfold.engine.handover.pages import HostPages, Outlet, Prompt, page_format
from fourfold.engine.handover.pulling import PagedMemory, PullLanding, Tickets
from fourfold.engine.handover.sending import Route, Sending
from fourfold.engine.handover.staged import StagedLanding, StagedPages
from fourfold.kernels.pages import seal_pages
from fourfold.kernels.pages.layout import PAGE_TOKENS, PageCodes
from fourfold.quadrants.kv_pages import CodedPages, KVPages, PageShape, make_pages
from fourfold.transport.format import PageFormat
from fourfold.transport.pieces import Part, Piece

LAYERS, PAGES, SLOTS, HEADS, WIDTH = 3, 12, 3, 2, 32
CPU = torch.device("cpu")
KINDS: dict[str, tuple[torch.dtype, PageCodes | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.float32, PageCodes.INT8),
    "fp8": (torch.bfloat16, PageCodes.FP8),
}
TOKENS = (1, 63, 64, 65, 128, 200)


@dataclasses.dataclass
class Wire:
    """A transfer that copies at once, in place of one that sends."""

    landing: PromptLanding
    came: list[tuple[Part, int, int, int]] = dataclasses.field(default_factory=list)
    finished: bool = False

    def write(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self.came.append((piece.part, piece.layer, piece.first, piece.count))
            data = b"".join(piece.data)
            views = self.landing.views(piece.part, piece.layer, piece.first, piece.count)
            assert len(data) == sum(view.nbytes for view in views)
            for view in views:
                view[:] = data[: view.nbytes]
                data = data[view.nbytes :]

    def finish(self) -> None:
        assert not self.finished
        self.finished = True

    def cancel(self) -> None:
        raise AssertionError("nobody cancels here")


def pages_of(kind: str) -> KVPages:
    dtype, codes = KINDS[kind]
    shape = PageShape(layers=LAYERS, kv_heads=HEADS, head_width=WIDTH, dtype=dtype, codes=codes)
    return make_pages(shape, PAGES, SLOTS, CPU)


def fill(pages: KVPages, prompt: Prompt, kv: Tensor) -> None:
    """What prefilling a prompt leaves: `kv` [layers, 2, tokens, heads, width]."""
    for layer, kv_2TGC in enumerate(kv):
        if isinstance(pages, CodedPages):
            full = prompt.tokens // PAGE_TOKENS
            rows = torch.arange(full) * PAGE_TOKENS
            ids = torch.tensor(prompt.pages[:full], dtype=torch.int64)
            x = kv_2TGC.to(pages.shape.dtype)
            seal_pages(pages.records[layer], pages.layout, x[0], x[1], rows, ids)
            first, rest = prompt.slot * PAGE_TOKENS, prompt.tokens % PAGE_TOKENS
            pages.open[layer, :, first : first + rest] = x[:, full * PAGE_TOKENS :]
        else:
            for token in range(prompt.tokens):
                page = pages.data[layer, prompt.pages[token // PAGE_TOKENS]]
                page[:, :, token % PAGE_TOKENS] = kv_2TGC[:, token].to(page.dtype)


def read(pages: KVPages, prompt: Prompt) -> Tensor:
    """The inverse of `fill`, with what codes have lost."""
    same = ConvertedPages(pages, page_format(pages))
    return torch.stack([same._read(layer, prompt, 0, prompt.tokens) for layer in range(LAYERS)])


def send(
    outlet: Outlet, source: Prompt, theirs: PageFormat, wire: Wire, found: int, cuts: list[int]
) -> None:
    """A prompt that is computed in chunks, layer by layer, and sent meanwhile."""
    sending = Sending(source, LAYERS, pytest.fail)
    for place, end in enumerate(cuts):
        for layer in range(LAYERS):
            sending.stored([layer], end)
            sending.advance()
        if place == 0:
            sending.begin(Route(wire, outlet, theirs, found))
            sending.advance()


def host(pages: KVPages, prompt: Prompt, found: int) -> PromptLanding:
    return HostLanding(HostPages(pages), prompt, found)


def device(pages: KVPages, prompt: Prompt, found: int) -> PromptLanding:
    return StagedLanding(StagedPages(pages), prompt, found)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("mine", "theirs"), [*itertools.product(KINDS, KINDS)])
@pytest.mark.parametrize("land", [host, device])
def test_what_is_sent_lands(
    mine: str, theirs: str, tokens: int, land: Callable[[KVPages, Prompt, int], PromptLanding]
) -> None:
    torch.manual_seed(tokens)
    source, target = pages_of(mine), pages_of(theirs)
    here, there = Prompt([7, 3, 4, 5], 1, tokens), Prompt([2, 9, 1, 8], 2, tokens)
    fill(source, here, torch.randn(LAYERS, 2, tokens, HEADS, WIDTH))
    form = page_format(target)
    if form == page_format(source):
        outlet: Outlet = HostPages(source) if land is host else StagedPages(source)
    else:
        outlet = ConvertedPages(source, form)
    found = (tokens - 1) // PAGE_TOKENS // 2
    if found:  # as if it had come before
        whole = Wire(land(target, there, 0))
        send(outlet, here, form, whole, 0, [tokens])
        whole.landing.land()
    wire = Wire(land(target, there, found))
    cuts = sorted({*range(PAGE_TOKENS, tokens, PAGE_TOKENS), tokens})
    send(outlet, here, form, wire, found, cuts)
    wire.landing.land()
    assert wire.finished
    assert len(wire.came) == len(set(wire.came))
    sent, landed = read(source, here), read(target, there)
    error = float((landed - sent).norm() / sent.norm())
    assert error <= tolerance(source, target)


@pytest.mark.parametrize("records", [1, 2, 5])
@pytest.mark.parametrize(
    ("mine", "theirs"), [("int8", "int8"), ("float32", "float32"), ("int8", "float32")]
)
def test_what_is_copied_in_steps_lands(
    mine: str, theirs: str, records: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several layers, of one, and of less; pages and layers in any order are gathered."""
    source, target = pages_of(mine), pages_of(theirs)
    form = page_format(target)
    outlet = StagedPages(source) if mine == theirs else ConvertedPages(source, form)
    monkeypatch.setattr(pages_module, "STEP_BYTES", records * outlet.record_bytes)
    here, there = Prompt([7, 3, 4, 5], 1, 200), Prompt([2, 9, 1, 8], 2, 200)
    fill(source, here, torch.randn(LAYERS, 2, 200, HEADS, WIDTH))
    wire = Wire(device(target, there, 0))
    sending = Sending(here, LAYERS, pytest.fail)
    sending.begin(Route(wire, outlet, form, 0))
    sending.stored([1], 130)
    sending.advance()
    sending.stored(range(LAYERS), 200)
    sending.advance()
    wire.landing.land()
    assert max(piece[3] for piece in wire.came) <= records
    assert torch.equal(read(target, there), read(source, here))


@pytest.mark.parametrize("mine", KINDS)
def test_what_a_record_takes_beside_the_pages_is_known(mine: str) -> None:
    """As it is where it is only copied, as float32 where it is converted."""
    pages, wide = pages_of(mine), pages_of("float32")
    assert StagedPages(pages).record_bytes == page_format(pages).record_bytes
    for theirs in KINDS:
        form = page_format(pages_of(theirs))
        assert ConvertedPages(pages, form).record_bytes == page_format(wide).record_bytes


def tolerance(source: KVPages, target: KVPages) -> float:
    """What the receiver's form loses of the sender's."""
    if page_format(source) == page_format(target):
        return 0.0
    if target.shape.codes is not None:
        return 0.01 if target.shape.codes is PageCodes.INT8 else 0.04
    return 0.0 if target.shape.dtype == torch.float32 else 0.005


@pytest.mark.parametrize("land", [host, device])
def test_runs_that_a_prompt_does_not_have_are_refused(
    land: Callable[[KVPages, Prompt, int], PromptLanding],
) -> None:
    landing = land(pages_of("int8"), Prompt([0, 1, 2], 0, 130), 1)
    assert (landing.layers, landing.pages, landing.open) == (LAYERS, 1, True)
    for part, layer, first, count in [
        (Part.PAGES, 0, 0, 2), (Part.PAGES, LAYERS, 0, 1), (Part.PAGES, 0, 1, 1),
        (Part.PAGES, 0, 0, 0), (Part.OPEN, LAYERS, 0, 1),
    ]:  # fmt: skip
        with pytest.raises(LookupError):
            landing.views(part, layer, first, count)
    with pytest.raises(LookupError):
        land(pages_of("int8"), Prompt([0, 1], 0, 128), 0).views(Part.OPEN, 0, 0, 1)


def test_a_short_prompt_is_sent_as_one() -> None:
    source, target = pages_of("int8"), pages_of("int8")
    prompt = Prompt([0, 1], 0, 100)
    wire = Wire(host(target, prompt, 0))
    sending = Sending(prompt, LAYERS, pytest.fail)
    sending.begin(Route(wire, HostPages(source), page_format(target), 0))
    for layer in range(LAYERS):
        assert not wire.came
        sending.stored([layer], 100)
        sending.advance()
    assert len(wire.came) == 2 * LAYERS


def test_a_cancelled_sending_sends_nothing_more() -> None:
    class Cancelled(Wire):
        def cancel(self, left: Callable[[], None]) -> bool:  # type: ignore[override]
            self.finished = True
            return True

    pages, prompt = pages_of("int8"), Prompt([0, 1], 0, 100)
    wire = Cancelled(host(pages, prompt, 0))
    sending = Sending(prompt, LAYERS, pytest.fail)
    sending.begin(Route(wire, HostPages(pages), page_format(pages), 0))
    sending.stored(range(LAYERS), 64)
    assert sending.cancel(pytest.fail)
    sending.stored(range(LAYERS), 100)
    sending.advance()
    assert wire.finished
    assert not wire.came


def test_pages_that_changed_while_they_were_pulled_are_refused() -> None:
    source, target = pages_of("int8"), pages_of("int8")
    here, there = Prompt([7, 3], 1, 100), Prompt([2, 9], 2, 100)
    fill(source, here, torch.randn(LAYERS, 2, 100, HEADS, WIDTH))
    mine = PagedMemory.of(source)
    landing = PullLanding(PagedMemory.of(target), mine, there, 0, None)
    layers = range(LAYERS)
    tickets = {
        Part.PAGES: Tickets(mine, None).records(layers, here, 0, 1),
        Part.OPEN: Tickets(mine, None).rows(layers, here),
    }
    for part, of_layers in tickets.items():
        for layer, [ticket] in enumerate(of_layers):
            [room] = landing.views(part, layer, 0, 1)
            room[:] = ticket
        landing.landed(part, 0, LAYERS, 0, 1)
    assert torch.equal(read(target, there), read(source, here))
    mine.records_LPR[1, 7, 5] ^= 1
    with pytest.raises(ValueError, match="changed"):
        landing.landed(Part.PAGES, 0, LAYERS, 0, 1)
    landing.landed(Part.PAGES, 0, 1, 0, 1)
    [room] = landing.views(Part.PAGES, 2, 0, 1)
    room[:8] = (10**6).to_bytes(8, "little")
    for layer, layers_ in ((2, 1), (0, LAYERS)):
        with pytest.raises(ValueError, match="does not have"):
            landing.landed(Part.PAGES, layer, layers_, 0, 1)
