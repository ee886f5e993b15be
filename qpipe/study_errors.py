"""Turning pydantic's validation errors into sentences: where, what was found, what would be right."""

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from qpipe.errors import nearest


def explain(error: ValidationError, model: type[BaseModel], raw: Any) -> list[str]:
    """Return one sentence per problem of `raw`, unknown keys with the nearest valid name."""
    return [_sentence(dict(entry), model, raw) for entry in error.errors(include_url=False)]


def _sentence(entry: Mapping[str, Any], model: type[BaseModel], raw: Any) -> str:
    location: tuple[Any, ...] = entry["loc"]
    path = _path(location, raw)
    if entry["type"] == "extra_forbidden":
        known = _fields(model, location[:-1])
        return f"{path}: unknown key{nearest(str(location[-1]), known)}; known here: {', '.join(sorted(known))}"
    if entry["type"] == "missing":
        return f"{path}: required and not given"
    message = entry["msg"].removeprefix("Value error, ")
    found = entry.get("input")
    shown = "" if isinstance(found, Mapping | list) or found is None else f", found {found!r}"
    return f"{path}: {message[0].lower()}{message[1:]}{shown}" if path else f"{message}{shown}"


def _path(location: Sequence[Any], raw: Any) -> str:
    """Write a location as the user would: tags of unions, which are not in the file, are left out."""
    text, value = "", raw
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(part, int):
            if value is not None and not isinstance(value, list):
                continue  # a single value where a list stands
            text += f"[{part}]"
            value = value[part] if isinstance(value, list) and part < len(value) else None
        elif isinstance(value, Mapping) and part in value and (last or isinstance(value[part], Mapping | list)):
            text += f".{part}" if text else str(part)
            value = value[part]
        elif last and isinstance(value, Mapping):
            text += f".{part}" if text else str(part)
    return text


def _fields(model: type[BaseModel], location: Sequence[Any]) -> set[str]:
    """Return the field names valid at a location, over all members of the unions on the way."""
    models = {model}
    for part in location:
        stepped = {
            inner for m in models if part in m.model_fields for inner in _models(m.model_fields[part].annotation)
        }
        tagged = {m for m in models if _has_tag(m, part)}
        models = stepped or tagged or models
    return {name for m in models for name in m.model_fields}


def _has_tag(model: type[BaseModel], tag: Any) -> bool:
    return any(tag in typing.get_args(field.annotation) for field in model.model_fields.values())


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for inner in typing.get_args(annotation):
        yield from _models(inner)
