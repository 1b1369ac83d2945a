"""Where the pages of a prompt land at the engine that will decode."""

from __future__ import annotations

import abc

from fourfold.engine.handover.pages import HostPages, Prompt, records_of, rows_of
from fourfold.transport.format import PageFormat
from fourfold.transport.pieces import Part


class PromptLanding(abc.ABC):
    """Memory for the pages and open rows of one prompt, as the transport fills it.

    The first `found` pages are there already; the sender counts from the one after.
    """

    def __init__(self, form: PageFormat, prompt: Prompt, found: int) -> None:
        self.layers = form.layers
        self.pages = records_of(form, prompt.tokens) - found
        self.open = rows_of(form, prompt.tokens) > 0

    def views(self, part: Part, layer: int, first: int, count: int) -> list[memoryview]:
        """Writable memory for a run, piece after piece. Raises `LookupError` where the prompt has
        no such run. Called from the transport's threads."""
        if not 0 <= layer < self.layers:
            raise LookupError(f"layer {layer} of {self.layers}")
        if part is Part.OPEN:
            if not self.open:
                raise LookupError("a prompt of whole pages has no open rows")
            return self._rows(layer)
        if not 0 <= first < first + count <= self.pages:
            raise LookupError(f"pages {first} to {first + count} of {self.pages}")
        return self._records(layer, first, count)

    def landed(self, part: Part, layer: int, layers: int, first: int, count: int) -> int:
        """What was sent of a run is there. What this raises fails the transfer; see `Landing` for
        what it returns."""
        return 0

    @abc.abstractmethod
    def land(self) -> None:
        """Everything has come: enqueues what is left to do before steps may read the pages."""

    @abc.abstractmethod
    def _records(self, layer: int, first: int, count: int) -> list[memoryview]: ...

    @abc.abstractmethod
    def _rows(self, layer: int) -> list[memoryview]: ...


class HostLanding(PromptLanding):
    """A prompt lands in its own pages and open rows, which nobody reads before all has come."""

    def __init__(self, memory: HostPages, prompt: Prompt, found: int) -> None:
        super().__init__(memory.format, prompt, found)
        self._memory, self._prompt, self._found = memory, prompt, found

    def land(self) -> None:
        """Nothing is left to do."""

    def _records(self, layer: int, first: int, count: int) -> list[memoryview]:
        return self._memory.records([layer], self._prompt, self._found + first, count)[0]

    def _rows(self, layer: int) -> list[memoryview]:
        return self._memory.rows([layer], self._prompt)[0]
