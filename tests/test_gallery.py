"""The gallery of public runs: the page that ships is what the present code and its rule make."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def test_rule_needs_no_study_and_makes_the_page() -> None:
    """A dry run on a fresh tree plans exactly the one job."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", "workflow/gallery.smk", "-n", "--forceall", "--nolock"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^gallery +1\ntotal +1$", done.stdout + done.stderr, re.MULTILINE)


def test_page_in_the_docs_is_what_the_code_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same words; numbers to 3%, because interval ends differ in their last digits between machines."""
    page = tmp_path / "gallery.md"
    monkeypatch.setattr(sys, "argv", ["gallery.py", str(page)])
    runpy.run_path(str(ROOT / "benchmarks" / "gallery.py"), run_name="__main__")
    shipped, made = (text.read_text(encoding="utf-8") for text in (ROOT / "docs" / "gallery.md", page))
    assert NUMBER.sub("#", made) == NUMBER.sub("#", shipped)
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (made, shipped)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.03, abs=0.001)
