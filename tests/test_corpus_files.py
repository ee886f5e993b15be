"""Local files as streams of documents: formats, compression, borders, and complaints that name file and line."""

import gzip
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from qpipe.corpus import files as files_module
from qpipe.corpus.blocks import document_hash, documents
from qpipe.corpus.files import file_blocks
from qpipe.corpus_config import CorpusConfig
from qpipe.errors import QpipeError

CORPUS = TypeAdapter(CorpusConfig)
TEXTS = ["Plain.", "Zwölf Boxkämpfer\njagen Viktor.", "日本語 🙂", 'quote " and \\ and \t tab', "a\u2028b\x85c\x0bd"]


def read(path: Path, **more: object) -> list[str]:
    corpus = CORPUS.validate_python({"source": "files", "paths": [str(path)], **more})
    return [text for block in file_blocks(path, corpus) for text in documents(block)]


def complaint(path: Path, **more: object) -> str:
    with pytest.raises(QpipeError) as caught:
        read(path, **more)
    return str(caught.value)


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def two_frames(data: bytes, compression: str) -> bytes:
    half = len(data) // 2
    compress = gzip.compress if compression == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    return compress(data[:half]) + compress(data[half:])


@pytest.fixture(params=[1, 40, 1 << 19])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(files_module, "BLOCK_BYTES", request.param)
    monkeypatch.setattr(files_module, "_READ_BYTES", max(3, request.param // 4))
    return int(request.param)


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
def test_jsonl_plain_and_in_several_compressed_frames(tmp_path: Path, block_bytes: int, compression: str) -> None:
    data = jsonl(TEXTS * 7).replace(b"\n", b"\r\n", 3) + b"\n\n" + jsonl(["no newline at the end"])[:-1]
    path = tmp_path / f"a.jsonl{'.' + compression if compression else ''}"
    path.write_bytes(two_frames(data, compression) if compression else data)
    assert read(path) == [*TEXTS * 7, "no newline at the end"]


def test_jsonl_with_another_field_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS, "body"))
    assert read(tmp_path / "a.jsonl", text_field="body") == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = TEXTS * 100
    table = pa.table({"id": list(range(len(texts))), "body": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=77)
    assert read(tmp_path / "a.parquet", text_field="body") == texts


def test_one_txt_file_is_one_document(tmp_path: Path, block_bytes: int) -> None:
    text = "First line.\n\nSecond paragraph.\n" * 20
    (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode())
    assert read(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("separator", ["\n", "\n\n", "<|end|>", "aa"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    text=st.lists(st.sampled_from(["a", "aa", "b", "\n", "\n\n", "<|end|>", "<|en", "é", "\r\n", "\r"])).map("".join)
)
def test_txt_is_cut_like_str_split(tmp_path_factory: pytest.TempPathFactory, separator: str, text: str) -> None:
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_bytes(text.encode())
    expected = [part for part in text.replace("\r\n", "\n").split(separator) if part.strip()]
    for size in (1, 7, 1 << 19):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files_module, "BLOCK_BYTES", size)
            patch.setattr(files_module, "_READ_BYTES", max(2, size // 3))
            assert read(path, separator=separator) == expected


def test_blocks_stay_small_and_progress_reaches_the_file_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["x" * 1000] * 5000))
    corpus = CORPUS.validate_python({"source": "files", "paths": [str(path)]})
    blocks = list(file_blocks(path, corpus))
    assert len(blocks) >= 9
    assert max(block.size for block in blocks) < 1 << 20
    assert [block.position for block in blocks] == sorted(block.position for block in blocks)
    assert blocks[-1].position == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "line 4, byte 14: 0xe9 is not UTF-8"),
        (b'{"text": "cut', "line 4: not JSON"),
        (b'{"tekst": "a", "id": 3}', r"line 4: no field 'text' \(did you mean 'tekst'\?\); found id, tekst"),
        (b"[1, 2]", "line 4: a JSON list where an object"),
        (b'{"text": null}', "line 4: field 'text' holds NoneType where text"),
        (b'{"text": "\\ud800"}', r"line 4: field 'text' holds half of a surrogate pair \(U\+D800"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path: Path, block_bytes: int, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two"]) + b"\n" + line + b"\n" + jsonl(["five"]))
    assert re.search("a.jsonl, " + message, complaint(tmp_path / "a.jsonl"))


def test_undecodable_bytes_in_text_are_named(tmp_path: Path, block_bytes: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\nthr\xff\xfee\n\nfour")
    assert "a.txt, line 4, byte 4: 0xff is not UTF-8" in complaint(tmp_path / "a.txt", separator="\n\n")
    assert "a.txt, line 4, byte 4: 0xff is not UTF-8" in complaint(tmp_path / "a.txt")


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_truncated_and_damaged_compression(tmp_path: Path, compression: str) -> None:
    numbers = random.Random(0)
    noise = [f"{i} {numbers.getrandbits(48):x}" for i in range(40_000)]
    whole = two_frames(jsonl(noise), compression)
    path = tmp_path / f"a.jsonl.{compression}"
    path.write_bytes(whole[:-10])
    assert re.search(r"ends too early \(truncated file\) after line \d{4,}", complaint(path))
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * 64 + whole[len(whole) // 2 + 64 :])
    assert re.search(r"(damaged compressed data|ends too early|not JSON|not UTF-8)", complaint(path))
    path.write_bytes(b"this is not compressed")
    assert "damaged compressed data" in complaint(path)


def test_a_gzip_file_padded_with_zeros_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text") + bytes(512))
    assert read(tmp_path / "a.txt.gz") == ["text"]


def test_parquet_complaints(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c"], "number": [1, 2, 3]}), path)
    assert "a.parquet, row 2: field 'text' holds NoneType" in complaint(path)
    assert "no field 'txt' (did you mean 'text'?); found number, text" in complaint(path, text_field="txt")
    assert "column 'number' holds int64 where text is expected" in complaint(path, text_field="number")
    path.write_bytes(path.read_bytes()[:-6])
    assert "not a readable Parquet file" in complaint(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_overlong_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(files_module, "BLOCK_BYTES", 100)
    monkeypatch.setattr(files_module, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(b'{"text": "short"}\n' * 30 + b"x" * (1 << 21))
    assert "a document of more than 1 MiB" in complaint(tmp_path / name)


def test_white_space_does_not_make_a_document_or_a_difference(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["", " \n\t", "kept"]))
    assert read(tmp_path / "a.jsonl") == ["kept"]
    assert document_hash("two  words\n") == document_hash("two words") != document_hash("twowords")
