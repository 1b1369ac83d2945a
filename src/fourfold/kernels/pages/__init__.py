"""Pages of 8-bit keys and values: their layout, and how they are filled."""

from fourfold.kernels.pages.fill import SealJobs, seal_pages
from fourfold.kernels.pages.layout import PAGE_TOKENS, VALUE_ORDER, PageCodes, PageLayout, PageViews
from fourfold.kernels.pages.move import hash_pages, move_pages

__all__ = [
    "PAGE_TOKENS",
    "VALUE_ORDER",
    "PageCodes",
    "PageLayout",
    "PageViews",
    "SealJobs",
    "hash_pages",
    "move_pages",
    "seal_pages",
]
