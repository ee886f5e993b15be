"""Reading a token store: any place, across shards; and refusing what is not whole."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpipe.corpus.seen import SeenHashes
from qpipe.corpus.store import FORMAT, FORMAT_VERSION, SPLITS, TokenStore, content_digest, token_dtype
from qpipe.corpus.writer import SplitWriter, partial_store, publish
from qpipe.errors import QpipeError


def build(out: Path, tokens: np.ndarray, vocab_size: int = 1000, shard_tokens: int = 7) -> TokenStore:
    """Write a store whose training split is `tokens`, appended in uneven portions."""
    with partial_store(out) as partial:
        writers = {name: SplitWriter(partial, name, shard_tokens) for name in SPLITS}
        for part in np.array_split(tokens.astype(token_dtype(vocab_size)), 5):
            writers["train"].append(part, documents=1, text_bytes=len(part))
        writers["validation"].append(np.arange(4, dtype=token_dtype(vocab_size)), documents=2, text_bytes=6)
        for writer in writers.values():
            writer.close()
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "dtype": token_dtype(vocab_size).str,
            "vocab_size": vocab_size,
            "eos": 0,
            "tokenizer": {
                "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
                "ids": vocab_size,
            },
            "splits": {name: writer.describe() for name, writer in writers.items()},
        }
        publish(partial, out, "{}", {**manifest, "digest": content_digest(manifest)})
    return TokenStore.open(out, verify=True)


def test_reads_equal_slices_of_the_sequence_at_every_place(tmp_path: Path) -> None:
    expected = np.random.default_rng(0).integers(0, 1000, 31)
    split = build(tmp_path / "store", expected).train
    assert len(split) == 31
    assert len(split.paths) == 5
    for start in range(32):
        for length in range(32 - start):
            np.testing.assert_array_equal(split.read(start, length), expected[start : start + length])


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65536, 2), (65537, 4)])
def test_tokens_are_little_endian_and_as_small_as_the_vocabulary_allows(
    tmp_path: Path, vocab_size: int, itemsize: int
) -> None:
    store = build(tmp_path / "store", np.array([vocab_size - 1, 1]), vocab_size)
    data = (store.path / "train-00000.bin").read_bytes()
    assert data == (vocab_size - 1).to_bytes(itemsize, "little") + (1).to_bytes(itemsize, "little")
    assert store.train.read(0, 1).tolist() == [vocab_size - 1]


def test_bytes_per_token_is_of_the_validation_split(tmp_path: Path) -> None:
    assert build(tmp_path / "store", np.arange(9)).bytes_per_token == 6 / 4


def test_a_pickled_split_reads_the_same_file(tmp_path: Path) -> None:
    split = build(tmp_path / "store", np.arange(500), shard_tokens=1000).train
    split.read(0, 500)
    pickled = pickle.dumps(split)
    assert len(pickled) < 900
    np.testing.assert_array_equal(pickle.loads(pickled).read(3, 5), np.arange(3, 8))


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (30, 2), (0, 32), (5, -1)])
def test_reading_outside_says_how_much_there_is(tmp_path: Path, start: int, length: int) -> None:
    with pytest.raises(QpipeError, match="it has 31"):
        build(tmp_path / "store", np.arange(31)).train.read(start, length)


def test_all_broken_files_are_named(tmp_path: Path) -> None:
    store = build(tmp_path / "store", np.arange(31))
    (store.path / "train-00001.bin").unlink()
    (store.path / "train-00003.bin").write_bytes(b"\0\0")
    with pytest.raises(QpipeError) as caught:
        TokenStore.open(store.path)
    assert len(caught.value.problems) == 2
    assert "train-00001.bin is missing" in caught.value.problems[0]
    assert "train-00003.bin has 2 bytes where the manifest says 14" in caught.value.problems[1]


@pytest.mark.parametrize("name", ["train-00002.bin", "tokenizer.json"])
def test_a_changed_byte_is_found_on_demand(tmp_path: Path, name: str) -> None:
    store = build(tmp_path / "store", np.arange(31))
    data = bytearray((store.path / name).read_bytes())
    data[1] ^= 1
    (store.path / name).write_bytes(data)
    TokenStore.open(store.path)
    with pytest.raises(QpipeError, match=rf"{name} is damaged"):
        TokenStore.open(store.path, verify=True)


def edited(**changes: object) -> object:
    return lambda text: json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is damaged"),
        (lambda text: "[]", "not the manifest"),
        (lambda text: "{}", "not the manifest"),
        (edited(vocab_size=999), "digest does not fit"),
        (edited(version=2), f"{FORMAT} 2 found, {FORMAT} 1 expected"),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    manifest = build(tmp_path / "store", np.arange(31)).path / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(QpipeError, match=message):
        TokenStore.open(manifest.parent)


def test_a_folder_without_manifest_is_not_a_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(QpipeError, match="not a token store"):
            TokenStore.open(path)


def test_a_new_store_replaces_an_older_larger_one(tmp_path: Path) -> None:
    build(tmp_path / "store", np.arange(31))
    build(tmp_path / "store", np.arange(8))
    names = sorted(path.name for path in (tmp_path / "store").iterdir())
    assert names == ["manifest.json", "tokenizer.json", "train-00000.bin", "train-00001.bin", "validation-00000.bin"]


def test_a_failed_attempt_leaves_the_old_store(tmp_path: Path) -> None:
    before = build(tmp_path / "store", np.arange(31))
    with pytest.raises(ZeroDivisionError), partial_store(before.path) as partial:
        (partial / "train-00000.bin").write_bytes(bytes([1 // 0]))
    assert TokenStore.open(before.path, verify=True).digest == before.digest
    assert not list(before.path.glob(".*"))


def test_two_writers_of_one_store_exclude_each_other(tmp_path: Path) -> None:
    with partial_store(tmp_path / "store"):
        with pytest.raises(QpipeError, match="another process"), partial_store(tmp_path / "store"):
            pass
        with partial_store(tmp_path / "other"):
            pass


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    with pytest.raises(QpipeError, match="is a file"), partial_store(tmp_path / "store"):
        pass


@given(st.lists(st.lists(st.integers(0, 40) | st.sampled_from([2**63, 2**64 - 1]))))
def test_seen_hashes_agree_with_a_python_set(batches: list[list[int]]) -> None:
    seen, reference = SeenHashes(), set()
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in reference)
            reference.add(value)
        assert seen.add(np.array(batch, np.uint64)).tolist() == expected
    assert len(seen) == len(reference)


def test_seen_hashes_cost_eight_bytes_each() -> None:
    seen, generator = SeenHashes(), np.random.default_rng(0)
    for _ in range(300):
        assert seen.add(generator.integers(0, 2**64, 1000, np.uint64)).all()
    assert seen.nbytes == 8 * len(seen) == 8 * 300_000
