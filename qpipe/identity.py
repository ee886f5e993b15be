"""Canonical digests: equal content, equal digest, on every machine.

Identity in qpipe is the SHA-256 of canonical JSON: keys sorted, no white space, floats in Python's shortest exact
form. Values without one canonical form (NaN, infinities, sets, arbitrary objects) are refused, because a digest that
could differ between two processes would silently retrain everything.
"""

import hashlib
import json
from typing import Any

from qpipe.errors import QpipeError


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of plain data (mappings with string keys, lists, strings, numbers, booleans)."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise QpipeError(f"a value has no canonical form and cannot enter an identity: {error}") from error


def digest(value: Any, length: int = 8) -> str:
    """Return the first `length` hexadecimal digits of the SHA-256 of `value`'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]
