"""Pages of 8-bit keys and values: their layout, and how they are filled."""

from fourfold.kernels.pages.fill import SealJobs, append_rows, seal_pages
from fourfold.kernels.pages.layout import PAGE_TOKENS, VALUE_ORDER, PageCodes, PageLayout, PageViews

__all__ = [
    "PAGE_TOKENS",
    "VALUE_ORDER",
    "PageCodes",
    "PageLayout",
    "PageViews",
    "SealJobs",
    "append_rows",
    "seal_pages",
]
