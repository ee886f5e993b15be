"""What a study says about its text and its vocabulary, and the name that text earns.

A study describes its corpus by one of three sources (`docstrings`, `files`, `huggingface`) and its vocabulary by one
of two tokenizers (a byte-level BPE trained on the corpus, or any Hugging Face tokenizer). Both descriptions are
pydantic models, so that unknown keys are errors and editors get a schema.

`corpus_identity` turns the description into plain JSON that says *which text* is meant and not *where it lies*: a file
counts by its size and SHA-256, a package by its version, a hub data set by its name and revision. The digest of that
JSON names the token store, so moving, renaming or touching a file changes nothing and editing one changes the name. The
workflow asks for it each time it is parsed, also in every cluster job, so file digests are remembered in a small file
beside the workflow and only new or changed files are read again.

This module is part of the description layer: it reads no text, imports no package it names, and knows nothing of torch.
"""

import glob
import importlib.metadata
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from qpipe.errors import QpipeError
from qpipe.file_digests import DIGEST_CACHE, FileDigests

RULES_VERSION = 1
"""Version of the rules that turn a corpus into tokens (what a document is, the split, duplicates, how a BPE is
trained). It is part of every identity: raise it when the tokens of an unchanged corpus would change."""

FILE_FORMATS = ("txt", "jsonl", "parquet")
COMPRESSIONS = ("gz", "zst")

_TOKENIZER_FILES = (  # what `transformers` reads a tokenizer from
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Corpus(_Described):
    """What every source shares."""

    validation_fraction: float = Field(
        0.005,
        gt=0,
        le=0.5,
        description="Share of the documents held out for validation. A document goes there when the hash of its text, "
        "read as a number in [0, 1), is below this share; so the choice depends on nothing but the document.",
    )
    max_bytes: int | None = Field(
        None, ge=1, description="Stop before the document that would bring the kept text above this many UTF-8 bytes."
    )
    max_documents: int | None = Field(None, ge=1, description="Stop after this many kept documents.")


class DocstringsCorpus(_Corpus):
    """The documentation strings of installed Python packages: real English that every installation already has."""

    source: Literal["docstrings"] = Field(description="Read the documentation strings of installed packages.")
    packages: tuple[str, ...] = Field(
        ("numpy", "scipy", "pandas", "torch", "transformers"),
        min_length=1,
        description="Distributions whose documentation strings are read, without importing them. Equal versions give "
        "equal text.",
    )


class FilesCorpus(_Corpus):
    """Local text: .txt, .jsonl or .parquet, plain or (text and JSONL) compressed as .gz or .zst."""

    source: Literal["files"] = Field(description="Read local files.")
    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Files or glob patterns (** crosses folders), relative to the working folder. The suffix gives the "
        "format: .txt, .jsonl, .parquet, the first two also as .gz or .zst.",
    )
    text_field: str = Field("text", min_length=1, description="Key (.jsonl) or column (.parquet) that holds the text.")
    separator: str | None = Field(
        None,
        min_length=1,
        description="What separates documents inside a .txt file, for example '\\n\\n' or '<|endoftext|>'. "
        "Default: one file is one document.",
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class HuggingFaceCorpus(_Corpus):
    """A data set streamed from the Hugging Face hub, or a local folder that `datasets` can read."""

    source: Literal["huggingface"] = Field(description="Stream a data set with the `datasets` library.")
    dataset: str = Field(min_length=1, description="Name on the hub, e.g. allenai/c4, or a local folder.")
    config: str | None = Field(None, description="Configuration of the data set, e.g. en or sample-10BT.")
    split: str = Field("train", min_length=1, description="Split that is read; the validation set is cut from it.")
    text_field: str = Field("text", min_length=1, description="Column that holds the text.")
    revision: str | None = Field(
        None, description="Commit, tag or branch of the data set. Pin a commit so that the text can never change."
    )


class TrainedTokenizer(_Described):
    """A byte-level BPE trained on the corpus itself (GPT-2 splitting rule), the same on every machine."""

    train: Literal["bpe"] = Field(description="Train a byte-level BPE on the training documents of the corpus.")
    vocab_size: int = Field(
        ge=257,
        le=2**24,
        description="Rows of the embedding: 256 bytes, 1 end-of-document token, the rest merges.",
    )


class PretrainedTokenizer(_Described):
    """A tokenizer of the Hugging Face hub, a folder saved by `save_pretrained`, or a tokenizer.json file."""

    name: str = Field(
        min_length=1, description="Name on the hub, or a folder or tokenizer.json, relative to the working folder."
    )
    vocab_size: int = Field(
        ge=2, le=2**24, description="Rows of the embedding; at least the tokenizer's largest id + 1."
    )
    revision: str | None = Field(None, description="Commit, tag or branch on the hub.")
    eos: str | None = Field(
        None,
        min_length=1,
        description="Token that ends a document. Default: the tokenizer's own end-of-sequence token.",
    )


def _tokenizer_kind(value: Any) -> str | None:
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return next((kind for kind in ("train", "name") if kind in keys), None)


CorpusConfig = Annotated[DocstringsCorpus | FilesCorpus | HuggingFaceCorpus, Field(discriminator="source")]
TokenizerConfig = Annotated[
    Annotated[TrainedTokenizer, Tag("train")] | Annotated[PretrainedTokenizer, Tag("name")],
    Discriminator(
        _tokenizer_kind,
        custom_error_type="tokenizer_kind",
        custom_error_message="a tokenizer is {train: bpe, vocab_size: ...} or {name: NAME_OR_PATH, vocab_size: ...}",
    ),
]


def corpus_identity(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, base: Path, cache: Path = DIGEST_CACHE
) -> dict[str, Any]:
    """Describe which text and vocabulary are meant, independent of the machine and of file names.

    Parameters
    ----------
    base
        Folder that relative paths start from.
    cache
        File that remembers digests by path, size and timestamps; only written when a file is new or changed.

    Returns
    -------
    dict
        JSON-able; equal for equal text, split rule and tokenizer.

    Raises
    ------
    QpipeError
        Missing files, empty patterns, unknown suffixes, packages that are not installed: all of them at once.
    """
    remembered = FileDigests(cache)
    problems: list[str] = []
    parts: dict[str, Any] = {"rules": RULES_VERSION}
    for key, describe in (
        ("corpus", lambda: _describe_corpus(corpus, base, remembered)),
        ("tokenizer", lambda: _describe_tokenizer(tokenizer, base, remembered)),
    ):
        try:
            parts[key] = describe()
        except QpipeError as error:
            problems.extend(error.problems)
    if problems:
        raise QpipeError(problems)
    remembered.save()
    return parts


def corpus_files(corpus: FilesCorpus, base: Path) -> list[Path]:
    """Return the existing files that `corpus.paths` names, each once, sorted by path.

    Raises
    ------
    QpipeError
        Patterns without a match, missing files, folders, unknown suffixes: all of them at once.
    """
    found: set[Path] = set()
    problems: list[str] = []
    for pattern in corpus.paths:
        matches = _matches(base / Path(pattern).expanduser())
        if not matches:
            kind = "pattern matches no file" if glob.has_magic(pattern) else "file not found"
            problems.append(f"corpus path '{pattern}': {kind} (looked in {base.resolve()}); check corpus.paths")
        for path in matches:
            problem = _file_problem(path)
            problems.extend([problem] if problem else [])
            found.add(path)
    if problems:
        raise QpipeError(problems)
    return sorted(found)


def ordered_files(corpus: FilesCorpus, base: Path, cache: Path = DIGEST_CACHE) -> list[Path]:
    """Return the files of a corpus in the order they are read: by format, size and digest, never by name."""
    remembered = FileDigests(cache)
    files = [path for _, path in _ordered_files(corpus, base, remembered)]
    remembered.save()
    return files


def file_format(path: Path) -> tuple[str, str]:
    """Return `(format, compression)` from the suffixes of `path`, e.g. `("jsonl", "zst")` or `("txt", "")`.

    Raises
    ------
    QpipeError
        The suffix is not one of the formats that can be read.
    """
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in FILE_FORMATS or (kind == "parquet" and compression):
        raise QpipeError(
            f"{path}: cannot tell the format from the name; corpus files end in .txt, .jsonl or .parquet "
            "(.txt and .jsonl also with .gz or .zst)"
        )
    return kind, compression


def local_tokenizer(tokenizer: PretrainedTokenizer, base: Path) -> Path | None:
    """Return the local file or folder that `tokenizer.name` means, or None for a name on the hub.

    Raises
    ------
    QpipeError
        The name is written as a path but nothing lies there, or a folder holds no tokenizer.
    """
    path = base / Path(tokenizer.name).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise QpipeError(f"tokenizer '{tokenizer.name}': {path} is a folder without tokenizer files")
    if path.exists():
        return path
    if tokenizer.name.startswith((".", "/", "~")) or tokenizer.name.endswith(".json") or tokenizer.name.count("/") > 1:
        raise QpipeError(f"tokenizer '{tokenizer.name}': no such file or folder ({path}); check tokenizer.name")
    return None


def _matches(path: Path) -> list[Path]:
    path = Path(os.path.normpath(path))  # so that a file found twice is one file
    if path.exists():
        return [path]
    root = Path(path.anchor or ".")
    return sorted(found for found in root.glob(str(path.relative_to(path.anchor))) if found.is_file())


def _file_problem(path: Path) -> str | None:
    if path.is_dir():
        return f"{path} is a folder; write a pattern such as '{path.name}/*.jsonl' in corpus.paths"
    try:
        file_format(path)
    except QpipeError as error:
        return str(error)
    return None


def _describe_corpus(corpus: CorpusConfig, base: Path, cache: FileDigests) -> dict[str, Any]:
    caps = {"validation_fraction", "max_bytes", "max_documents"}
    shared = {"source": corpus.source, **corpus.model_dump(include=caps, exclude_none=True)}
    if isinstance(corpus, DocstringsCorpus):
        return {**shared, "packages": package_versions(corpus.packages)}
    if isinstance(corpus, FilesCorpus):
        described = [entry for entry, _ in _ordered_files(corpus, base, cache)]
        formats = {entry[0].split(".")[0] for entry in described}
        field = {"text_field": corpus.text_field} if formats - {"txt"} else {}
        separator = {"separator": corpus.separator} if corpus.separator and "txt" in formats else {}
        return {**shared, **field, **separator, "files": described}
    hub = corpus.model_dump(include={"config", "split", "text_field", "revision"}, exclude_none=True)
    folder = base / Path(corpus.dataset).expanduser()
    if folder.is_dir():  # split names are read from file names, so names count here
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        return {**shared, **hub, "folder": [[name, *entry] for name, entry in zip(names, cache(files), strict=True)]}
    return {**shared, **hub, "dataset": corpus.dataset}


def _ordered_files(corpus: FilesCorpus, base: Path, cache: FileDigests) -> list[tuple[list[Any], Path]]:
    files = corpus_files(corpus, base)
    formats = (".".join(filter(None, file_format(path))) for path in files)
    entries = ([kind, *entry] for kind, entry in zip(formats, cache(files), strict=True))
    return sorted(zip(entries, files, strict=True))


def _describe_tokenizer(tokenizer: TokenizerConfig, base: Path, cache: FileDigests) -> dict[str, Any]:
    described = tokenizer.model_dump(exclude_none=True)
    if isinstance(tokenizer, TrainedTokenizer):
        return described
    local = local_tokenizer(tokenizer, base)
    if local is None:
        return described
    names = [local] if local.is_file() else [local / name for name in _TOKENIZER_FILES if (local / name).is_file()]
    digests = {("tokenizer.json" if local.is_file() else path.name): cache([path])[0][1] for path in names}
    return {**{key: value for key, value in described.items() if key != "name"}, "files": digests}


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the public version of each distribution, sorted by normalized name, without importing any.

    The local label (`+cpu`, `+cu128`) is left out: builds of one release for different devices carry the same
    documentation.

    Raises
    ------
    QpipeError
        Packages that are not installed, all at once.
    """
    versions: dict[str, str] = {}
    problems: list[str] = []
    for package in packages:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            problems.append(
                f"corpus package '{package}' is not installed; install it or take it out of corpus.packages"
            )
            continue
        versions[re.sub(r"[-_.]+", "-", package).lower()] = version.partition("+")[0]
    if problems:
        raise QpipeError(problems)
    return dict(sorted(versions.items()))
