"""Turns a request body into a request, or into one sentence on what is wrong with it.

pydantic finds the faults; its words are written for programmers of the schema. Here each kind of
fault has a sentence for the person who wrote the request, and a stable code for their program.
"""

from __future__ import annotations

import collections
import json
from typing import Any, LiteralString, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from fourfold.errors import RequestError, meant

_MAX_FAULTS = 256
"""pydantic collects every fault of a body; past this many, spelling them out costs too much."""

_TYPES = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_LENGTHS = {
    "too_short": ("min_length", "at least", "entries"),
    "too_long": ("max_length", "at most", "entries"),
    "string_too_short": ("min_length", "at least", "characters"),
    "string_too_long": ("max_length", "at most", "characters"),
}

Body = TypeVar("Body", bound=BaseModel)


def fault(code: LiteralString, sentence: str, *, param: str | None = None) -> PydanticCustomError:
    """A fault with its own code and words, for a validator to raise.

    `param` is for a validator of the whole body; elsewhere the field's place is known.
    """
    return PydanticCustomError(code, "{sentence}", {"sentence": sentence, "param": param})


def parse(schema: type[Body], body: bytes) -> Body:
    """The request that `body` holds; raises `RequestError` for the first thing wrong with it."""
    try:
        request = schema.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > _MAX_FAULTS:
            message = "the body has hundreds of wrong fields; check it against the API"
            raise RequestError(message, code="invalid_request") from None
        first = error.errors(include_url=False, include_input=False)[0]
        raise _refusal(schema, first["type"], first["loc"], first.get("ctx", {})) from None
    # pydantic takes the last of several values for a key, others take the first: what checks a
    # request before us might have seen another one. To read it again is little beside tokenising.
    json.loads(body, object_pairs_hook=_refuse_repeats)
    return request


def _refuse_repeats(fields: list[tuple[str, Any]]) -> None:
    """Raises `RequestError` where an object of a body gives a field twice."""
    if len(dict(fields)) < len(fields):
        (name, _), *_ = collections.Counter(name for name, _ in fields).most_common(1)
        param = name[:128]
        message = f"'{param}' is given twice in one object; send it once"
        raise RequestError(message, param=param, code="duplicate_parameter")


def _refusal(
    schema: type[BaseModel], kind: str, loc: tuple[int | str, ...], ctx: dict[str, Any]
) -> RequestError:
    param = ctx.get("param") or _param(loc)
    if "sentence" in ctx:
        return RequestError(_about(param, ctx["sentence"]), param=param, code=kind)
    if kind == "json_invalid":
        message = f"the body is not valid JSON ({ctx['error']}); send one JSON object in UTF-8"
        return RequestError(message, code="invalid_json")
    if kind == "missing":
        message = f"'{param}' is missing; it is required"
        return RequestError(message, param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        message = f"'{param}' is not a known parameter; {_spelling(schema, loc)}"
        return RequestError(message, param=param, code="unknown_parameter")
    if kind in _TYPES and not loc:
        return RequestError("the body must be one JSON object", code="invalid_type")
    if kind in _TYPES:
        return RequestError(f"'{param}' must be {_TYPES[kind]}", param=param, code="invalid_type")
    return RequestError(f"'{param}' {_constraint(kind, ctx)}", param=param, code="invalid_value")


def _about(param: str | None, sentence: str) -> str:
    """Puts the field before a sentence that does not name it by itself."""
    if param is None or sentence.startswith(f"'{param.rpartition('.')[2]}'"):
        return sentence
    return f"'{param}': {sentence}"


def _constraint(kind: str, ctx: dict[str, Any]) -> str:
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must be {words} {ctx[bound]:g}"
    if kind in _LENGTHS:
        bound, words, things = _LENGTHS[kind]
        return f"must have {words} {ctx[bound]} {things}"
    if kind == "finite_number":
        return "must be a finite number"
    return "has a value that cannot be used; check it against the API"


def _spelling(schema: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    known = schema.model_fields if len(loc) == 1 else ()
    return meant(str(loc[0]), known, otherwise="remove it or check its spelling")


def _param(loc: tuple[int | str, ...]) -> str | None:
    """The place of a fault as a program would write it: messages[0].content."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return path.lstrip(".")[:128] or None
