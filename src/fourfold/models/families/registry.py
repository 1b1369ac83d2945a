"""The families we compute, by the `model_type` of their config.json."""

from __future__ import annotations

from fourfold.errors import CheckpointError
from fourfold.models.families import glm4_moe, llama, mixtral, olmoe, qwen3, qwen3_moe
from fourfold.models.families.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (llama, qwen3, qwen3_moe, mixtral, olmoe, glm4_moe)
}


def find_family(model_type: object, where: str) -> Family:
    """The family of a `model_type`; `where` is named in the error if there is none."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return family
