"""The token store: flat little-endian token ids in shards, and a manifest that says what they are.

A store is a folder with

    manifest.json            written last; a folder without it is not a store
    tokenizer.json           the tokenizer, readable by `tokenizers.Tokenizer.from_file`
    train-00000.bin ...      token ids, uint16 where the vocabulary has at most 65,536 ids, else uint32
    validation-00000.bin ...

Each document is followed by one end-of-document token; nothing else stands between documents. A split is one long
sequence that happens to be cut into shards of equal size (the last one may be shorter), so a document may cross a
shard border. Shards are memory-mapped: opening a store costs a few file-status calls whatever its size.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpipe.errors import QpipeError

FORMAT = "qpipe-tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass
class TokenSplit:
    """One split of a store: a sequence of token ids that can be read at any place.

    Attributes
    ----------
    documents, text_bytes
        Documents in the split (count) and their UTF-8 text (bytes, without end-of-document tokens).
    """

    name: str
    paths: Sequence[Path]
    sizes: Sequence[int]
    dtype: np.dtype[Any]
    documents: int
    text_bytes: int
    _shards: list[NDArray[Any]] | None = field(default=None, repr=False)
    _starts: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None}  # a pickled memory map would be a copy of the data

    def read(self, start: int, length: int) -> Tokens:
        """Return the `length` token ids from `start` on, shape (length,), dtype uint16 or uint32.

        Inside one shard the result is a read-only view of the file, across a border it is a copy.

        Raises
        ------
        QpipeError
            The split does not hold these tokens.
        """
        stop = start + length
        if start < 0 or length < 0 or stop > len(self):
            raise QpipeError(
                f"tokens {start:,} to {stop:,} of the {self.name} split were asked for, but it has {len(self):,}; "
                "tokenize a larger corpus or ask for fewer tokens"
            )
        if self._shards is None:
            self._shards = [np.memmap(path, dtype=self.dtype, mode="r") for path in self.paths]
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts: list[NDArray[Any]] = []
        for shard in range(first, len(self._shards)):
            begin = int(self._starts[shard])
            if begin >= stop:
                break
            parts.append(self._shards[shard][max(start - begin, 0) : stop - begin])
        return np.asarray(parts[0]) if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])


@dataclass
class TokenStore:
    """An opened token store; see `TokenStore.open`.

    Attributes
    ----------
    vocab_size
        Rows of the embedding (count); every token id is below it.
    eos
        Id of the token that ends a document.
    bytes_per_token
        UTF-8 bytes of validation text per validation token, end-of-document tokens included (bytes/token): a loss of
        x nats/token is x / (ln 2 * bytes_per_token) bits/byte.
    digest
        SHA-256 (hex) over vocabulary size, tokenizer and the content of every shard.
    manifest
        The whole manifest, with the identity of the corpus and what was dropped.
    """

    path: Path
    train: TokenSplit
    validation: TokenSplit
    vocab_size: int
    eos: int
    bytes_per_token: float
    digest: str
    manifest: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: Path | str, verify: bool = False) -> "TokenStore":
        """Open the store in folder `path`.

        The manifest's consistency and the sizes of all files are always checked; `verify=True` also reads every byte
        and compares the SHA-256 digests.

        Raises
        ------
        QpipeError
            No store there, or missing, truncated, enlarged or (with `verify`) changed files: all of them at once.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        _check_files(folder, manifest, verify)
        splits = {name: _open_split(folder, name, manifest) for name in SPLITS}
        held_out = splits["validation"]
        return cls(
            path=folder,
            train=splits["train"],
            validation=held_out,
            vocab_size=manifest["vocab_size"],
            eos=manifest["eos"],
            bytes_per_token=held_out.text_bytes / len(held_out),
            digest=manifest["digest"],
            manifest=manifest,
        )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest dtype of the format that holds ids below `vocab_size`: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) that stands for the tokens a manifest describes."""
    shards = [[entry["tokens"], entry["sha256"]] for name in SPLITS for entry in manifest["splits"][name]["shards"]]
    content = [manifest["dtype"], manifest["vocab_size"], manifest["eos"], manifest["tokenizer"]["sha256"], shards]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    remedy = "write the store again with qpipe tokenize"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise QpipeError(f"{folder} is not a token store (no {MANIFEST}); {remedy}") from None
    except ValueError as error:
        raise QpipeError(f"{path} is damaged ({error}); {remedy}") from None
    try:
        kind, version, matches = manifest["format"], manifest["version"], content_digest(manifest) == manifest["digest"]
    except (KeyError, TypeError) as error:
        raise QpipeError(f"{path} is not the manifest of a token store ({error!r}); {remedy}") from None
    if (kind, version) != (FORMAT, FORMAT_VERSION):
        raise QpipeError(f"{path}: format {kind} {version} found, {FORMAT} {FORMAT_VERSION} expected; {remedy}")
    if not matches:
        raise QpipeError(f"{path}: its digest does not fit its content; it was edited or damaged; {remedy}")
    return dict(manifest)


def _check_files(folder: Path, manifest: Mapping[str, Any], verify: bool) -> None:
    itemsize = np.dtype(manifest["dtype"]).itemsize
    expected = {TOKENIZER: (None, manifest["tokenizer"]["sha256"])} | {
        entry["file"]: (entry["tokens"] * itemsize, entry["sha256"])
        for name in SPLITS
        for entry in manifest["splits"][name]["shards"]
    }
    problems = [_file_problem(folder / name, size, digest, verify) for name, (size, digest) in expected.items()]
    found = [problem for problem in problems if problem]
    if found:
        raise QpipeError([f"{problem}; write the store again with qpipe tokenize" for problem in found])


def _file_problem(path: Path, size: int | None, digest: str, verify: bool) -> str | None:
    if not path.is_file():
        return f"{path} is missing from the token store"
    if size is not None and path.stat().st_size != size:
        return f"{path} has {path.stat().st_size:,} bytes where the manifest says {size:,}: truncated or overwritten"
    if verify and file_sha256(path) != digest:
        return f"{path} is damaged: its SHA-256 differs from the manifest's"
    return None


def _open_split(folder: Path, name: str, manifest: Mapping[str, Any]) -> TokenSplit:
    described = manifest["splits"][name]
    return TokenSplit(
        name=name,
        paths=[folder / entry["file"] for entry in described["shards"]],
        sizes=[entry["tokens"] for entry in described["shards"]],
        dtype=np.dtype(manifest["dtype"]),
        documents=described["documents"],
        text_bytes=described["text_bytes"],
    )
