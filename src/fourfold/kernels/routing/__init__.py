"""Choosing experts, sorting the rows of a mixture by expert, and adding up what experts return."""

from fourfold.kernels.routing.combine import combine
from fourfold.kernels.routing.group_rows import group_rows
from fourfold.kernels.routing.groups import RowGroups
from fourfold.kernels.routing.route import choose_experts, route, route_and_group
from fourfold.kernels.routing.rule import Rule, Spread

__all__ = [
    "RowGroups",
    "Rule",
    "Spread",
    "choose_experts",
    "combine",
    "group_rows",
    "route",
    "route_and_group",
]
