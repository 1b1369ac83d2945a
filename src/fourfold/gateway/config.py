"""What one request may ask for. Importing this needs nothing heavy."""

from __future__ import annotations

import dataclasses

from fourfold.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatewayLimits:
    """Budgets checked before anything is allocated for a request."""

    max_n: int = 16
    """Samples of one prompt at most."""
    max_prompt_tokens: int | None = None
    """Tokens of one prompt at most. Default: the context length."""
    max_output_tokens: int | None = None
    """Tokens of one answer at most. Default: what the context leaves."""
    max_concurrent: int = 256
    """Requests held at once, waiting or running; one more is answered 429."""
    request_timeout: float = 600.0
    """Seconds after which a request that has not ended is ended with an error; inf: never."""
    max_stop: int = 16
    """Stop strings of one request at most."""
    max_logprobs: int = 20
    """Alternatives reported for each token at most."""
    max_logit_bias: int = 1024
    """Entries of logit_bias at most."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name.startswith("max_log") else 1
            if value is not None and not value >= least:  # said so that nan is refused too
                option = field.name.replace("_", "-")
                raise ConfigError(f"--{option} {value} is too small")
