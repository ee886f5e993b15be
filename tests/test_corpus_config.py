"""A corpus is named by its content: what may and what may not change the name."""

import hashlib
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from qpipe.corpus_config import CorpusConfig, TokenizerConfig, corpus_files, corpus_identity
from qpipe.errors import QpipeError

CORPUS = TypeAdapter(CorpusConfig)
TOKENIZER = TypeAdapter(TokenizerConfig)
BPE = TOKENIZER.validate_python({"train": "bpe", "vocab_size": 300})


def files(*paths: str, **more: object) -> CorpusConfig:
    return CORPUS.validate_python({"source": "files", "paths": paths, **more})


def name(base: Path, *paths: str, **more: object) -> str:
    identity = corpus_identity(files(*paths, **more), BPE, base, base / "cache" / "digests.json")
    return json.dumps(identity, sort_keys=True)


def age(path: Path) -> None:
    past = time.time() - 100
    os.utime(path, (past, past))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    for path in tmp_path.iterdir():
        age(path)
    return tmp_path


def test_identity_holds_size_and_sha256_of_the_content(folder: Path) -> None:
    entries = json.loads(name(folder, "*.txt"))["corpus"]["files"]
    assert entries == [["txt", 6, hashlib.sha256(b"second").hexdigest()]]


def test_identity_ignores_place_name_order_and_time(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = name(folder, "a.jsonl", "b.txt")
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "z.jsonl").write_text('{"text": "first"}\n')
    (other / "0.txt").write_text("second")
    (folder / "b.txt").touch()
    assert name(folder, "a.jsonl", "b.txt") == before
    assert name(folder, "*.txt", "./a.jsonl", str(folder / "a.*")) == before
    assert name(other, "0.txt", "z.jsonl") == before


def test_identity_sees_an_edit_of_equal_size_and_time(folder: Path) -> None:
    path = folder / "b.txt"
    before, stat = name(folder, "b.txt"), path.stat()
    path.write_text("SECOND")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert name(folder, "b.txt") != before


def test_a_file_written_just_now_is_hashed_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    name(tmp_path, "a.txt")
    assert not (tmp_path / "cache" / "digests.json").exists()


def test_remembered_digests_are_used_and_a_damaged_memory_is_not(folder: Path) -> None:
    before, cache = name(folder, "b.txt"), folder / "cache" / "digests.json"
    remembered = json.loads(cache.read_text())
    entry = remembered[str(folder / "b.txt")]
    cache.write_text(json.dumps({str(folder / "b.txt"): [*entry[:3], "0" * 64]}))
    assert "0" * 64 in name(folder, "b.txt")
    cache.write_text('{"half": ')
    assert name(folder, "b.txt") == before
    assert sorted(path.name for path in cache.parent.iterdir()) == ["digests.json"]


@pytest.mark.parametrize("change", [{"validation_fraction": 0.1}, {"max_bytes": 3}, {"text_field": "body"}])
def test_identity_follows_what_changes_tokens(folder: Path, change: dict[str, object]) -> None:
    assert name(folder, "a.jsonl", **change) != name(folder, "a.jsonl")


def test_fields_without_effect_do_not_change_the_name(folder: Path) -> None:
    assert name(folder, "b.txt", text_field="body") == name(folder, "b.txt")
    assert name(folder, "a.jsonl", separator="\n\n") == name(folder, "a.jsonl")


def test_docstrings_are_named_by_public_versions() -> None:
    corpus = CORPUS.validate_python({"source": "docstrings", "packages": ["PyYAML", "torch"]})
    identity = corpus_identity(corpus, BPE, Path())
    assert identity["corpus"]["packages"] == {"pyyaml": version("PyYAML"), "torch": version("torch").split("+")[0]}


def test_identity_of_a_local_tokenizer_is_its_content(tmp_path: Path) -> None:
    for where in ("one", "two"):
        (tmp_path / where).mkdir()
        (tmp_path / where / "tokenizer.json").write_text("{}")
    corpus = CORPUS.validate_python({"source": "docstrings", "packages": ["numpy"]})
    one, two, hub = (
        corpus_identity(corpus, TOKENIZER.validate_python({"name": where, "vocab_size": 300}), tmp_path)["tokenizer"]
        for where in ("one", "two/tokenizer.json", "somebody/two")
    )
    assert one == two
    assert one["files"] == {"tokenizer.json": hashlib.sha256(b"{}").hexdigest()}
    assert hub["name"] == "somebody/two"


def test_all_problems_at_once(folder: Path) -> None:
    (folder / "data.csv").write_text("a,b")
    (folder / "sub").mkdir()
    bad = TOKENIZER.validate_python({"name": "./nowhere", "vocab_size": 300})
    with pytest.raises(QpipeError) as caught:
        corpus_identity(files("gone.txt", "*.parquet", "data.csv", "sub"), bad, folder)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for part in (
        "'gone.txt': file not found",
        "'*.parquet': pattern matches no file",
        "data.csv: cannot",
        "sub is a",
        "nowhere",
    ):
        assert part in problems


def test_missing_packages_are_all_named() -> None:
    corpus = CORPUS.validate_python({"source": "docstrings", "packages": ["numpy", "no-such-a", "no-such-b"]})
    with pytest.raises(QpipeError) as caught:
        corpus_identity(corpus, BPE, Path())
    assert [word in caught.value.problems[i] for i, word in enumerate(("no-such-a", "no-such-b"))] == [True, True]


@pytest.mark.parametrize(
    ("adapter", "value", "word"),
    [
        (CORPUS, {"source": "filez", "paths": ["a"]}, "filez"),
        (CORPUS, {"source": "files"}, "paths"),
        (CORPUS, {"source": "files", "paths": []}, "paths"),
        (CORPUS, {"source": "docstrings", "validation_fraction": 0}, "validation_fraction"),
        (CORPUS, {"source": "huggingface", "dataset": "x", "nonsense": 1}, "nonsense"),
        (TOKENIZER, {"train": "bpe", "vocab_size": 256}, "vocab_size"),
        (TOKENIZER, {"vocab_size": 300}, "train: bpe"),
        (TOKENIZER, {"name": "x"}, "vocab_size"),
    ],
)
def test_wrong_descriptions_are_refused(adapter: TypeAdapter, value: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        adapter.validate_python(value)


def test_patterns_cross_folders_and_give_each_file_once(tmp_path: Path) -> None:
    for place in ("x/1.txt", "x/y/2.txt", "3.txt"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("text")
    found = corpus_files(files("**/*.txt", "x/../x/1.txt"), tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["3.txt", "x/1.txt", "x/y/2.txt"]
