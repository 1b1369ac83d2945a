"""Sorting the rows of a mixture of experts by expert, and adding up what the experts return."""

from fourfold.kernels.routing.combine import combine
from fourfold.kernels.routing.group_rows import group_rows
from fourfold.kernels.routing.groups import RowGroups

__all__ = ["RowGroups", "combine", "group_rows"]
