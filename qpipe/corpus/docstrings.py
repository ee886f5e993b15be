r"""The documentation strings of installed packages: a real English corpus that the installation itself brings.

Scientific Python carries some twenty megabytes of documentation. It is read from the .py files that each distribution
lists, without importing anything, by one regular expression that finds comments and string literals. A triple-quoted
literal counts as documentation when it stands where Python looks for one (first thing in a module, or right after the
colon that ends a `def` or `class` line), when it is handed to a call with `doc` in its name such as `add_newdoc(...)`,
which is how compiled functions get theirs, or when it is assigned to a name that ends in `doc`, `docs` or `docstring`.

Scanning instead of parsing is several times faster than `ast` and, unlike it, does not depend on the grammar of the
running Python: equal package versions give equal text under every Python version and operating system. Tests and
vendored code are left out, and so are strings under `MIN_CHARACTERS`: mostly one-line remarks that many functions
share.
"""

import ast
import importlib.metadata
import re
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from qpipe.corpus_config import package_versions
from qpipe.errors import QpipeError

MIN_CHARACTERS = 100
"""Shorter documentation strings are left out (characters)."""

_SKIPPED_FOLDERS = {"test", "tests", "_internal", "_vendor"}

_LITERAL = re.compile(
    r"""
    \#[^\n]*
    | (?<!\w) (?P<prefix>[rRuUbBfF]{0,2})
      (?: (?P<long>\"{3} [^"\\]* (?: (?: \\. | "(?!"") ) [^"\\]* )* \"{3}
                 | '{3}  [^'\\]* (?: (?: \\. | '(?!'') ) [^'\\]* )* '{3})
        | " (?: [^"\\\n] | \\. )* "
        | ' (?: [^'\\\n] | \\. )* ' )
    """,
    re.VERBOSE | re.DOTALL,
)
_HANDED_OVER = re.compile(r"doc\w*\([^)]*$")
_ASSIGNED = re.compile(r"doc(s|string)?(\[[^\]\n]*\])?[ ]*=[ ]*$", re.IGNORECASE)
_ONLY_COMMENTS = re.compile(r"(?:\s|#[^\n]*\n)*\Z")
_AFTER_HEADER = re.compile(r":[ \t]*(?:#[^\n]*)?\n(?:\s|#[^\n]*\n)*\Z")
_LOOK_BACK = 240  # characters before a literal that tell what it is for


def gather(packages: tuple[str, ...]) -> Iterator[str]:
    """Yield the documentation strings of the packages, one document each, in a fixed order (package, path, place).

    Raises
    ------
    QpipeError
        Packages that are not installed, or whose installation lists no Python source.
    """
    for package in package_versions(packages):
        files = _source_files(package)
        if not files:
            raise QpipeError(
                f"corpus package '{package}' lists no Python source files; install it as a wheel (not as an editable "
                "install) or take it out of corpus.packages"
            )
        for path in files:
            yield from documentation_strings(_read_source(path))


def documentation_strings(source: str) -> Iterator[str]:
    """Yield the documentation strings of one module's source text, dedented, in order of appearance."""
    for match in _LITERAL.finditer(source):
        if match["long"] is None or "b" in match["prefix"].lower() or "f" in match["prefix"].lower():
            continue
        if len(match["long"]) >= MIN_CHARACTERS and _is_documentation(source, match.start()):
            text = _dedent(_value(match.group()))
            if len(text) >= MIN_CHARACTERS:
                yield text


def _source_files(package: str) -> list[Path]:
    distribution = importlib.metadata.distribution(package)
    names = sorted(
        file.as_posix()
        for file in distribution.files or []
        if file.suffix == ".py" and not (_SKIPPED_FOLDERS & set(file.parts)) and not file.name.startswith("test_")
    )
    return [Path(str(distribution.locate_file(name))) for name in names]


def _read_source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").lstrip("\ufeff")
    except UnicodeDecodeError:  # a module that declares another encoding
        with tokenize.open(path) as file:
            return file.read()
    except FileNotFoundError:
        raise QpipeError(f"{path} is missing although its package lists it; install the package again") from None


def _is_documentation(source: str, start: int) -> bool:
    before = source[max(0, start - _LOOK_BACK) : start]
    if _HANDED_OVER.search(before) or _ASSIGNED.search(before) or _AFTER_HEADER.search(before):
        return True
    return _ONLY_COMMENTS.match(source, 0, start) is not None


def _value(literal: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # documentation with unknown escapes such as \d is common
        return str(ast.literal_eval(literal))


def _dedent(text: str) -> str:
    """Remove the indentation that all lines after the first share, and white space at both ends."""
    first, *rest = text.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    return "\n".join([first.lstrip(" "), *(line[margin:] for line in rest)]).strip()
