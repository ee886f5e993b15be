"""From a name or an inline composition to a `Representation`.

Names are built from a small grammar, filled in by `representations.yaml`:

    name    = part ("+" part)*
    part    = preset | widths ["-" method] | mask ["-" mask method]
    widths  = "w" token ["a" token] | "a" token      e.g. w4, w4a4, w1.58, w4e2m1, a8
    mask    = "s" percent | n ":" m                  e.g. s50, 2:4

A *preset* is a fixed entry of the file (`mxfp4`); a *method* is an entry with placeholders that serves every bit
width (`quest`, `lsq`); a *mask method* says how pruned weights are scheduled and trained (`rbbm`). Plain widths use the
study's default method. Parts joined by `+` are merged; two parts that set the same field contradict each other.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from qpipe.errors import QpipeError, nearest
from qpipe.formats.spec import Mask, Representation, TensorFormat

_DESCRIPTION = ("meaning", "source")
_TOKEN = r"(\d+(?:\.\d+)?|\d+e\d+m\d+)"
_WIDTHS = re.compile(rf"(?:w{_TOKEN})?(?:a{_TOKEN})?")
_SHARE = re.compile(r"s(\d+(?:\.\d+)?)")
_PATTERN = re.compile(r"(\d+):(\d+)")


class Catalogue(NamedTuple):
    """The content of `representations.yaml`."""

    presets: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    mask_methods: Mapping[str, Mapping[str, Any]]


def catalogue_path() -> Path:
    """Where the catalogue lies: inside the installed package, else `config/` of the source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "representations.yaml"
    return installed if installed.exists() else package.parent / "config" / "representations.yaml"


@lru_cache
def catalogue() -> Catalogue:
    """Read the shipped catalogue once."""
    content = yaml.safe_load(catalogue_path().read_text(encoding="utf-8"))
    return Catalogue(content["presets"], content["methods"], content["mask_methods"])


def resolve(
    spec: str | Mapping[str, Any] | Representation,
    *,
    default_method: str = "quest",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Representation:
    """Return the representation that a study, a loss table or a command line names.

    Parameters
    ----------
    spec : a name such as `w4a4-lsq`, or an inline composition `{name: ..., weights: {...}, activations: {...}}`
    default_method : method of plain `wB` and `wBaB`; the label stays as given
    presets : a study's own presets, name -> composition; they may not redefine shipped ones

    Raises
    ------
    QpipeError
        Unknown name (with the nearest known one), unknown field, or a composition that makes no sense.
    """
    if isinstance(spec, Representation):
        return spec
    if isinstance(spec, Mapping):
        if "name" not in spec:
            raise QpipeError(
                f"an inline representation needs `name`; found only {', '.join(map(str, spec)) or 'nothing'}"
            )
        return _build(str(spec["name"]), {key: value for key, value in spec.items() if key != "name"})
    own = dict(presets or {})
    if clash := sorted(set(own) & set(catalogue().presets)):
        raise QpipeError([f"preset '{name}' is shipped with qpipe; give your own another name" for name in clash])
    merged: dict[str, Any] = {}
    if spec in own:
        merged = dict(own[spec])
    elif spec != "dense":
        for part in spec.split("+"):
            _merge(merged, _expand(part, default_method, own), spec)
        _settle_backward(merged)
    return _build(spec, {key: value for key, value in merged.items() if key not in _DESCRIPTION})


def from_canonical(fields: Mapping[str, Any], name: str | None = None) -> Representation:
    """Rebuild a representation from `Representation.canonical()`; the name defaults to `dense` or `custom`."""
    return _build(name or ("custom" if fields else "dense"), fields)


def catalogue_names() -> list[str]:
    """One name per distinct entry: dense, every preset, every method at each width, and sparse examples."""
    content = catalogue()
    names = ["dense", *content.presets]
    for method, entry in content.methods.items():
        for bits in entry["bits"]:
            names += [f"w{bits}-{method}"] if "weights" in entry else []
            names += [f"w{bits}a{bits}-{method}"] if {"weights", "activations"} <= set(entry) else []
    return names


def known_names(presets: Mapping[str, Any] | None = None) -> list[str]:
    """Names worth suggesting: the catalogue, plain widths and masks, and a study's own presets."""
    plain = [f"w{bits}" for bits in (1, 1.58, 2, 3, 4, 5, 6, 7, 8)] + [f"w{b}a{b}" for b in range(1, 9)]
    masks = [f"{mask}-{method}" for mask in ("s50", "2:4") for method in catalogue().mask_methods]
    return [*catalogue_names(), *(presets or {}), *plain, "s50", "s75", "2:4", "4:8", *masks]


def _expand(part: str, default_method: str, own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Composition of one `+`-free part of a name."""
    content = catalogue()
    for table in (own, content.presets):
        if part in table:
            return dict(table[part])
    head, _, method = part.partition("-")
    if head and (match := _WIDTHS.fullmatch(head)):
        return _fill_method(part, match[1], match[2], method or default_method)
    if fields := _mask_fields(head):
        return {"weights": {"mask": fields | _mask_method(part, method)}}
    raise QpipeError(
        f"unknown representation '{part}'{nearest(part, known_names(own))}; `qpipe capacity --all` lists them"
    )


def _mask_fields(head: str) -> dict[str, Any] | None:
    if match := _SHARE.fullmatch(head):
        return {"sparsity": float(match[1]) / 100}
    if match := _PATTERN.fullmatch(head):
        return {"n": int(match[1]), "m": int(match[2])}
    return None


def _mask_method(part: str, method: str) -> dict[str, Any]:
    known = catalogue().mask_methods
    if method and method not in known:
        raise QpipeError(f"'{part}': unknown mask method '{method}'{nearest(method, known)}; known: {', '.join(known)}")
    entry = known[method] if method else {}
    return {key: value for key, value in entry.items() if key not in _DESCRIPTION}


def _fill_method(part: str, weights: str | None, activations: str | None, method: str) -> dict[str, Any]:
    """Fill a method's placeholders with the bit widths of the name."""
    methods = catalogue().methods
    if method not in methods:
        raise QpipeError(f"'{part}': unknown method '{method}'{nearest(method, methods)}; known: {', '.join(methods)}")
    entry = methods[method]
    result = {key: value for key, value in entry.items() if key in ("rotation",)}
    for side, token in (("weights", weights), ("activations", activations)):
        if token is None:
            continue
        if side not in entry:
            raise QpipeError(f"'{part}': method '{method}' has no rule for {side}; try {next(iter(methods))}")
        result[side] = _fill_side(part, entry, side, token, method)
    return result


def _fill_side(part: str, entry: Mapping[str, Any], side: str, token: str, method: str) -> dict[str, Any]:
    fields = dict(entry[side])
    if "e" in token:
        width, grid = token.split("e", 1)
        exponent, mantissa = grid.split("m")
        if int(width) != 1 + int(exponent) + int(mantissa):
            raise QpipeError(
                f"'{part}': e{grid} has {1 + int(exponent) + int(mantissa)} bits with its sign, not {width}"
            )
        if not entry.get("floats"):
            raise QpipeError(f"'{part}': method '{method}' has no floating-point grids; try quest or absmax")
        return fields | {"grid": f"e{grid}"}
    allowed = {str(bits): bits for bits in entry["bits"]}
    if token not in allowed:
        raise QpipeError(f"'{part}': method '{method}' has {', '.join(allowed)} bits, not {token}")
    levels = 2 ** round(float(token))
    fields["grid"] = fields["grid"].format(bits=token, levels=levels)
    overrides = {str(bits): value for bits, value in entry.get("at", {}).items()}
    return fields | overrides.get(token, {}).get(side, {})


def _merge(into: dict[str, Any], part: Mapping[str, Any], name: str) -> None:
    """Merge `part` into a composition; a field set twice is a contradiction."""
    for key, value in part.items():
        if key in _DESCRIPTION:
            continue
        if isinstance(value, Mapping) and isinstance(into.get(key, {}), Mapping):
            into[key] = dict(into.get(key, {}))
            _merge(into[key], value, name)
        elif key in into and into[key] != value:
            raise QpipeError(f"'{name}': two of its parts set `{key}` ({into[key]} and {value}); keep one of them")
        else:
            into[key] = value


def _settle_backward(fields: dict[str, Any]) -> None:
    """Under a trust estimator let it judge the pruned weights too, as QuEST does, unless a mask method decides."""
    weights = fields.get("weights", {})
    if "mask" in weights and weights.get("gradient") == "trust":
        weights["mask"] = {"backward": "trust"} | weights["mask"]


def _build(name: str, fields: Mapping[str, Any]) -> Representation:
    try:
        return Representation(name=name, **fields)
    except ValidationError as error:
        raise QpipeError(list(_problems(name, error))) from None


def _problems(name: str, error: ValidationError) -> Iterator[str]:
    """One readable line per problem that pydantic found."""
    models: dict[str, type[BaseModel]] = {"weights": TensorFormat, "activations": TensorFormat, "mask": Mask}
    for item in error.errors():
        where = [str(step) for step in item["loc"] if step not in ("literal['tensor','row']", "int")]
        field = ".".join(where)
        prefix = f"representation '{name}'" + (f", {field}" if field else "")
        if item["type"] == "extra_forbidden":
            owner = models.get(where[-2], Representation) if len(where) > 1 else Representation
            known = list(owner.model_fields)
            yield f"{prefix}: unknown field{nearest(where[-1], known)}; known: {', '.join(known)}"
        elif item["type"] == "value_error":
            cause = item["ctx"]["error"]
            yield from (f"{prefix}: {text}" for text in getattr(cause, "problems", [str(cause)]))
        else:
            yield f"{prefix}: {item['msg']}, got {item['input']!r}"
