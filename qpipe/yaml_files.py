"""Reading and writing YAML as qpipe means it.

YAML 1.1, which PyYAML speaks, reads an unquoted ``2:4`` as the number 124 (base sixty) and lets a repeated key
overwrite the first one. In a study both are traps: ``2:4`` is a sparsity pattern and a repeated key a mistake. This
loader keeps ``2:4`` a string, reads ``1e-3`` as a number and refuses repeated keys, naming the line.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from qpipe.errors import QpipeError


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(
        r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$".replace("\n", "")
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text; `source` names it in errors (unreadable YAML, repeated keys)."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise QpipeError(f"{where}: not readable as YAML: {getattr(error, 'problem', error)}") from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file (errors: missing file, not UTF-8, unreadable YAML, repeated keys)."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise QpipeError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise QpipeError(f"{path}: cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def dump_yaml(value: Any) -> str:
    """Return YAML text of plain data, keys in the order given."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))
