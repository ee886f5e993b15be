"""Documentation strings found by scanning: the same ones that Python's own parser finds, and those of compiled code."""

import ast
import inspect
from importlib.metadata import distribution
from pathlib import Path

import pytest

from qpipe.corpus.docstrings import MIN_CHARACTERS, documentation_strings, gather
from qpipe.errors import QpipeError

LONG = "This sentence is long enough to be taken for documentation, and it says nothing at all about anything."


def parsed(source: str) -> list[str]:
    """The oracle: docstrings as the compiler sees them, in source order."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, nodes)]
    found.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = ((ast.get_docstring(node) or "").strip() for node in found)
    return [text for text in texts if len(text) >= MIN_CHARACTERS]


def test_every_docstring_of_pandas_is_found() -> None:
    """A package with nearly three thousand of them."""
    missing, count = [], 0
    for file in distribution("pandas").files or []:
        if file.suffix == ".py" and "tests" not in file.parts and "core" in file.parts:
            source = Path(str(file.locate())).read_text()
            wanted = parsed(source)
            count += len(wanted)
            missing += sorted(set(wanted) - set(documentation_strings(source)))
    assert count > 2000
    assert missing == []


@pytest.mark.parametrize(
    "source",
    [
        f'# coding\n# comment with """ quotes\n"""{LONG}"""\n',
        f"def f(a: dict = {{'x': 1}}) -> str:  # why\n    # more\n    r'''{LONG} \\d'''\n",
        f'class A:\n\n    """{LONG}\n\n        Indented "quoted" \\n and \\\\ text.\n    """\n    x = "it\'s #"\n',
        f"async def f(\n    x,\n):\n    '''{LONG}''' ; y = '''{LONG}'''\n",
        f'def f():\n    return """{LONG}"""\n',
        f'def f():\n    f"""{LONG}"""\n    b"""{LONG}"""\n',
        f'x = "\\\\"\ndef f():\n    """{LONG}\\""" end"""\n',
        'def f():\n    """Short."""\n',
    ],
)
def test_agrees_with_the_parser(source: str) -> None:
    assert list(documentation_strings(source)) == parsed(source)


@pytest.mark.parametrize(
    "source",
    [
        f'add_newdoc("numpy", "abs", """{LONG}""")',
        f'add_docstr(torch.abs, r"""\n{LONG}\n""".format(**common))',
        f'fft = _add_docstr(_fft.fft_fft, r"""\n{LONG}""")',
        f'_shared_docs["melt"] = """{LONG}"""',
        f'MODEL_DOCSTRING = r"""{LONG}"""',
    ],
)
def test_documentation_of_compiled_code_is_found(source: str) -> None:
    assert list(documentation_strings(source)) == [LONG.strip()]


def test_the_text_of_numpy_holds_what_numpy_says_at_run_time() -> None:
    import numpy as np

    texts = set(gather(("numpy",)))
    for documented in (np.linalg.svd, np.concatenate, np.ndarray.sort, np.frombuffer):
        tail = inspect.cleandoc(documented.__doc__ or "")[-300:]
        assert any(text.endswith(tail) for text in texts), documented


def test_a_package_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "empty_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: empty-package\nVersion: 1.0\n")
    (info / "RECORD").write_text("empty_package-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(QpipeError, match="'empty-package' lists no Python source"):
        list(gather(("empty-package",)))
