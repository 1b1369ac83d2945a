"""What `fourfold bench offline` measures, by name. Imports nothing heavy.

prefill-16x4096           16 prompts of 4096 tokens, until each has its first token
decode-8x512              8 sequences decoding together after prompts of 512 tokens
requests-512x1000x256     512 requests at once, 1000 tokens in and 256 out each
"""

from __future__ import annotations

import dataclasses
import enum
import re

from fourfold.errors import ConfigError

SHORT_ANSWER = 8
LONG_ANSWER = 136
"""A decode case answers in both lengths; what a token takes is the slope between them."""

_FORMS = (
    re.compile(r"(?P<kind>prefill|decode)-(?P<requests>[1-9]\d*)x(?P<prompt>[1-9]\d*)"),
    re.compile(
        r"(?P<kind>requests)-(?P<requests>[1-9]\d*)x(?P<prompt>[1-9]\d*)x(?P<output>[1-9]\d*)"
    ),
)


class Kind(enum.StrEnum):
    """What a case is about."""

    PREFILL = "prefill"
    DECODE = "decode"
    REQUESTS = "requests"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Requests that arrive together, all of one length; lengths in tokens."""

    kind: Kind
    requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def title(self) -> str:
        """The case as a record names it."""
        if self.kind is Kind.DECODE:
            return f"batch {self.requests} after {self.prompt_tokens} tokens"
        if self.kind is Kind.REQUESTS:
            return f"{self.requests} requests, {self.prompt_tokens} in, {self.output_tokens} out"
        if self.requests == 1:
            return f"prompt of {self.prompt_tokens} tokens"
        return f"{self.requests} prompts of {self.prompt_tokens} tokens"


def parse_case(name: str) -> Case:
    """The case of a name. ConfigError where it is none."""
    match = next((found for form in _FORMS if (found := form.fullmatch(name))), None)
    if match is None:
        raise ConfigError(
            f"--cases {name!r} is no case; write prefill-PROMPTSxTOKENS, decode-BATCHxCONTEXT or "
            "requests-COUNTxINxOUT"
        )
    kind = Kind(match["kind"])
    outputs = {Kind.PREFILL: 1, Kind.DECODE: LONG_ANSWER}
    return Case(
        kind=kind,
        requests=int(match["requests"]),
        prompt_tokens=int(match["prompt"]),
        output_tokens=outputs.get(kind) or int(match["output"]),
    )
