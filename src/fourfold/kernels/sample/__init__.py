"""Logits to tokens: penalties, temperature, top-k, top-p, min-p and the draw in one verb."""

from fourfold.kernels.sample.newest import newest_tokens
from fourfold.kernels.sample.params import SampleParams, SampleRow, noise_key, uniform_numbers
from fourfold.kernels.sample.sample import Sampled, sample
from fourfold.kernels.sample.tables import TokenTables

__all__ = [
    "SampleParams",
    "SampleRow",
    "Sampled",
    "TokenTables",
    "newest_tokens",
    "noise_key",
    "sample",
    "uniform_numbers",
]
