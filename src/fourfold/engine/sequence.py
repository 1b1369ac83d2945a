"""One sample being generated: its tokens, its pages, and how far it is computed."""

from __future__ import annotations

from fourfold.engine.messages import Continue, FinishReason, Stage, Submit, TokenLogprob
from fourfold.engine.page_pool import PageKey, page_key
from fourfold.quadrants.kv_pages import PAGE_TOKENS


class Sequence:
    """State of one sample of a request; changed by the scheduler alone.

    `tokens` are prompt and output as far as the host knows them, `given` is how many it came with.
    `computed` tokens have their KV in `pages` once the steps launched so far have run. `pending`
    counts sampled tokens that have not yet come back from the device. `longest` is the length at
    which it ends if nothing else ends it. `slot` is its place in the runner's per-sample state
    while it runs, `admissions` how often it began to (once more after every preemption). `found` is
    how many of its first tokens the prefix cache had when it came; of a leader. `root` begins the
    keys of its pages, by which others of the same root find them; None where nobody is to.

    `stage` is what of it is computed here: of a request's samples the first may be cut in two, the
    others share its prompt's pages. `proceeds` is the next token of a prompt computed elsewhere,
    `delivered` whether the pages of one computed here are where it goes on.
    """

    def __init__(
        self,
        request: Submit,
        index: int,
        arrival: int,
        leader: Sequence | None,
        longest: int,
        root: PageKey | None,
    ) -> None:
        self.request = request
        self.index = index
        self.arrival = arrival
        self.leader = leader
        self.longest = longest
        self.root = root
        self.stage = request.stage if leader is None else Stage.WHOLE
        self.stop_token_ids = frozenset(request.sampling.stop_token_ids)
        self.tokens = [*request.prompt_ids, *request.generated]
        self.given = len(self.tokens)
        self.pages: list[int] = []
        self.computed = 0
        self.pending = 0
        self.slot = -1
        self.admissions = 0
        self.cached_tokens = 0
        self.found = 0
        self.prefilled_once = bool(request.generated)
        self.prompt_logprobs: list[TokenLogprob] = []
        self.finish: FinishReason | None = None
        self.proceeds: Continue | None = None
        self.delivered = False
        self._keys: list[PageKey] = []
        self._published = 0

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens including those still on the device."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return self.length - self.computed

    @property
    def prefilled(self) -> bool:
        """Whether all tokens it came with are computed, or will be by the steps launched so far."""
        return self.computed >= self.given

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt must still be computed in full to report on it, which one sample does
        for all of a request."""
        told = self.leader is not None and self.leader.prefilled_once
        return self.request.sampling.prompt_logprobs and not self.prefilled_once and not told

    def pages_for(self, tokens: int) -> int:
        """Pages still to be allocated until `tokens` tokens fit."""
        return max(0, -(-tokens // PAGE_TOKENS) - len(self.pages))

    def keys(self, tokens: int) -> list[PageKey]:
        """The hash chain of the pages filled by the first `tokens` known tokens; of a sample with a
        root."""
        assert self.root is not None
        full = tokens // PAGE_TOKENS
        while len(self._keys) < full:
            start = len(self._keys) * PAGE_TOKENS
            previous = self._keys[-1] if self._keys else self.root
            self._keys.append(page_key(previous, self.tokens[start : start + PAGE_TOKENS]))
        return self._keys[:full]

    def newly_sealed(self) -> list[tuple[int, PageKey]]:
        """Pages filled since the last call, with their keys."""
        known = min(self.computed, len(self.tokens))
        if known < (self._published + 1) * PAGE_TOKENS:
            return []
        first, keys = self._published, self.keys(known)
        self._published = len(keys)
        return list(zip(self.pages[first : len(keys)], keys[first:], strict=True))

    def forget_pages(self) -> list[int]:
        """Gives up all pages and what was computed; returns the pages."""
        # A new list: steps under way still read the old one, and planners know lists by identity.
        pages, self.pages = self.pages, []
        self.computed = 0
        self._published = 0
        return pages
