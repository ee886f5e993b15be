"""From corpus to token store: the tokens a plain single loop gives, whatever the workers, kills and sources."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from qpipe.corpus import TokenStore, tokenize_corpus, writer
from qpipe.corpus import files as files_module
from qpipe.corpus_config import CorpusConfig, TokenizerConfig, TrainedTokenizer
from qpipe.errors import QpipeError

CORPUS = TypeAdapter(CorpusConfig)
TOKENIZER = TypeAdapter(TokenizerConfig)
BPE = TrainedTokenizer(train="bpe", vocab_size=300)
ROOT = Path(__file__).parents[1]
FRACTION = 0.2


def make_texts(number: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    words = ["".join(generator.choice(list("etaoinshrdlu"), generator.integers(1, 8))) for _ in range(300)]
    return [" ".join(generator.choice(words, generator.integers(5, 80))) + "." for _ in range(number)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tokenize(tmp_path: Path, corpus: dict[str, object], tokenizer: TokenizerConfig = BPE, **more: object) -> TokenStore:
    config = CORPUS.validate_python({"validation_fraction": FRACTION, **corpus})
    settings: dict[str, object] = {"base": tmp_path, "workers": 1, "progress": False, **more}
    out = settings.pop("out", tmp_path / "store")
    store = tokenize_corpus(config, tokenizer, out, digest_cache=tmp_path / "digests.json", **settings)  # type: ignore[arg-type]
    return TokenStore.open(store.path, verify=True)


def reference(texts: list[str], tokenizer: Tokenizer, eos: int) -> dict[str, list[int]]:
    """The oracle: one document after the other, duplicates known by their normalized text, split by BLAKE2b."""
    splits: dict[str, list[int]] = {"train": [], "validation": []}
    seen = set()
    for text in texts:
        normal = " ".join(text.split())
        if normal in seen or not normal:
            continue
        seen.add(normal)
        share = int.from_bytes(blake2b(normal.encode(), digest_size=8).digest(), "little") / 2**64
        split = splits["validation" if share < FRACTION else "train"]
        split += [*tokenizer.encode(text, add_special_tokens=False).ids, eos]
    return splits


def assert_is(store: TokenStore, texts: list[str]) -> None:
    expected = reference(texts, Tokenizer.from_file(str(store.path / "tokenizer.json")), store.eos)
    for split in (store.train, store.validation):
        assert split.read(0, len(split)).tolist() == expected[split.name]


def by_size(*paths: Path) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("workers", [1, 3])
def test_store_equals_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(files_module, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(writer, "SHARD_TOKENS", 5000)
    texts = make_texts(400)
    texts += ["", texts[3], " " + texts[7].replace(" ", "\n")]  # empty, a duplicate, one that differs in white space
    first = write_jsonl(tmp_path / "z.jsonl", texts[:150])
    second = write_jsonl(tmp_path / "a.jsonl", texts[150:])
    assert by_size(first, second) == [first, second]
    store = tokenize(tmp_path, {"source": "files", "paths": ["*.jsonl"]}, workers=workers)
    assert len(store.train.paths) > 2
    assert_is(store, texts)
    assert store.train.documents + store.validation.documents == 400
    assert store.manifest["dropped_duplicates"]["documents"] == 2
    assert store.validation.text_bytes + store.train.text_bytes == sum(map(len, texts[:400]))


def test_split_is_stable_when_documents_are_added_or_reordered(tmp_path: Path) -> None:
    texts = make_texts(300)
    tokenizer = write_tokenizer(tmp_path)
    held_out = []
    for number, variant in enumerate((texts, make_texts(50, seed=9) + texts[::-1])):
        path = write_jsonl(tmp_path / f"{number}.jsonl", variant)
        store = tokenize(tmp_path, {"source": "files", "paths": [path.name]}, tokenizer)
        ids = store.validation.read(0, len(store.validation))
        documents = np.split(ids, np.flatnonzero(ids == store.eos) + 1)[:-1]
        held_out.append({bytes(document) for document in documents})
    assert held_out[0] < held_out[1]
    assert 0.1 < len(held_out[0]) / 300 < 0.3


def write_tokenizer(folder: Path, vocab_size: int = 300) -> TokenizerConfig:
    from qpipe.corpus.vocabulary import END_OF_DOCUMENT, train_bpe

    (folder / "tokenizer.json").write_text(train_bpe(make_texts(100), 300).json)
    return TOKENIZER.validate_python({"name": "tokenizer.json", "vocab_size": vocab_size, "eos": END_OF_DOCUMENT})


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    texts = make_texts(60)
    write_jsonl(tmp_path / "a.jsonl", texts)
    store = tokenize(tmp_path, {"source": "files", "paths": ["a.jsonl"]}, write_tokenizer(tmp_path, 100_000))
    assert (store.vocab_size, store.train.read(0, 1).dtype) == (100_000, np.uint32)
    assert_is(store, texts)


def test_formats_of_equal_text_give_equal_tokens(tmp_path: Path) -> None:
    texts = make_texts(80)
    write_jsonl(tmp_path / "a.jsonl", texts)
    compressed = zstandard.compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "a.jsonl.zst").write_bytes(compressed)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=13)
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    digests = set()
    for name in ("a.jsonl", "a.jsonl.zst", "a.parquet", "a.txt"):
        store = tokenize(tmp_path, {"source": "files", "paths": [name], "separator": "\n\n"})
        assert_is(store, texts)
        digests.add(store.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_set_streams_offline_from_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = make_texts(300)
    (tmp_path / "set").mkdir()
    if kind == "jsonl":
        write_jsonl(tmp_path / "set" / "train.jsonl", texts)
    else:
        pq.write_table(
            pa.table({"id": range(300), "text": texts}), tmp_path / "set" / "train.parquet", row_group_size=70
        )
    corpus = {"source": "huggingface", "dataset": "set"}
    assert_is(tokenize(tmp_path, corpus, workers=2), texts)
    capped = tokenize(tmp_path, {**corpus, "max_documents": 120})
    assert_is(capped, texts[:120])
    for change, message in (
        ({"text_field": "txt"}, r"no field 'txt' \(did you mean 'text'\?\)"),
        ({"split": "nonsense"}, "cannot be opened .*nonsense"),
        ({"dataset": "no/such-set"}, "no/such-set train cannot be opened"),
    ):
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(QpipeError, match=message):
            tokenize(tmp_path, {**corpus, **change})


def test_docstrings_give_a_corpus(tmp_path: Path) -> None:
    from qpipe.corpus.docstrings import gather

    store = tokenize(tmp_path, {"source": "docstrings", "packages": ["numpy"]}, workers=2)
    assert_is(store, list(gather(("numpy",))))
    assert len(store.train) > 300_000


@pytest.mark.parametrize("workers", [1, 2])
def test_caps_stop_at_the_same_document_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(files_module, "BLOCK_BYTES", 2000)
    texts = make_texts(200)
    texts[20] = texts[10]
    write_jsonl(tmp_path / "a.jsonl", texts)
    sizes = np.cumsum([0 if i == 20 else len(text) for i, text in enumerate(texts)])
    corpus = {"source": "files", "paths": ["a.jsonl"]}
    for cap in (int(sizes[77]), int(sizes[77]) + 1, int(sizes[78]) - 1):
        assert_is(tokenize(tmp_path, {**corpus, "max_bytes": cap}, workers=workers), texts[:78])
    assert_is(tokenize(tmp_path, {**corpus, "max_documents": 50}, workers=workers), texts[:51])


def test_held_out_text_does_not_train_the_tokenizer(tmp_path: Path) -> None:
    texts = make_texts(200)
    write_jsonl(tmp_path / "a.jsonl", texts)
    store = tokenize(tmp_path, {"source": "files", "paths": ["a.jsonl"]})
    threshold = FRACTION * 2**64
    kept = [
        text for text in texts if int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >= threshold
    ]
    from qpipe.corpus.vocabulary import train_bpe

    assert (store.path / "tokenizer.json").read_text() == train_bpe(kept, 300).json


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b'{"text": "a"}\n{"text": "b', {}, r"a.jsonl, line 2: not JSON"),
        (b'{"text": "ok"}\n{"text": "\xff"}\n', {}, r"a.jsonl, line 2, byte 11: 0xff is not UTF-8"),
        (b'{"body": "ok"}\n', {}, r"a.jsonl, line 1: no field 'text'; found body"),
        (b"", {}, r"the corpus holds no text"),
        (b'{"text": " "}\n', {}, r"the corpus holds no text"),
        (b'{"text": "only one"}\n', {"validation_fraction": 1e-9}, r"documents fell into the validation split .*raise"),
        (b'{"text": "abc"}\n', {"max_bytes": 2}, r"the corpus holds no text"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    tmp_path: Path, content: bytes, more: dict[str, object], message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    tokenizer = write_tokenizer(tmp_path)
    for config in (BPE, tokenizer):
        with pytest.raises(QpipeError, match=message):
            tokenize(tmp_path, {"source": "files", "paths": ["a.jsonl"], **more}, config)
        assert list((tmp_path / "store").iterdir()) == []


def test_a_complaint_of_a_worker_keeps_an_older_store(tmp_path: Path) -> None:
    corpus = {"source": "files", "paths": ["a.jsonl"]}
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    before = tokenize(tmp_path, corpus).digest
    path.write_text(path.read_text() + "broken\n")
    with pytest.raises(QpipeError, match="line 101: not JSON"):
        tokenize(tmp_path, corpus, workers=2)
    assert TokenStore.open(tmp_path / "store", verify=True).digest == before


SCRIPT = """
import sys
from pathlib import Path
from pydantic import TypeAdapter
from qpipe.corpus import tokenize_corpus
from qpipe.corpus_config import CorpusConfig, TokenizerConfig
base = Path(sys.argv[1])
corpus = {"source": "files", "paths": ["a.jsonl"], "validation_fraction": 0.2}
tokenize_corpus(
    TypeAdapter(CorpusConfig).validate_python(corpus),
    TypeAdapter(TokenizerConfig).validate_python({"train": "bpe", "vocab_size": 300}),
    base / "killed", base=base, workers=2, progress=False, digest_cache=base / "digests.json",
)
"""


def children(pid: int) -> list[int]:
    task = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(child) for child in task.read_text().split()] if task.exists() else []
    return direct + [grandchild for child in direct for grandchild in children(child)]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "\nState:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes through /proc")
@pytest.mark.parametrize(
    "moment",
    ["first shard", pytest.param("start", marks=pytest.mark.slow), pytest.param("workers", marks=pytest.mark.slow)],
)
def test_kill_9_leaves_no_process_and_the_next_attempt_is_right(tmp_path: Path, moment: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(3000) * 8)  # one text in eight is kept: long work, little to check
    shard = tmp_path / "killed" / ".partial" / "train-00000.bin"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def has_workers() -> bool:
        return len(children(process.pid)) >= 3

    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment)
    try:
        wait_for({"start": shard.parent.exists, "first shard": shard.exists, "workers": has_workers}[moment])
        started = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert shard.parent.exists()
    wait_for(lambda: not any(map(alive, started)), 20)
    with pytest.raises(QpipeError, match="not a token store"):
        TokenStore.open(tmp_path / "killed")
    corpus = {"source": "files", "paths": ["a.jsonl"]}
    again = tokenize(tmp_path, corpus, out=tmp_path / "killed")
    assert_is(again, make_texts(3000))
    names = sorted(path.name for path in again.path.iterdir())
    assert names == ["manifest.json", "tokenizer.json", "train-00000.bin", "validation-00000.bin"]


def test_command_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    study = (ROOT / "config" / "demo.yaml").read_text()
    start, end = study.index("corpus:"), study.index("tokenizer:")
    corpus = "corpus: {source: files, paths: [a.jsonl], validation_fraction: 0.1}\n"
    (tmp_path / "study.yaml").write_text(study[:start] + corpus + study[end:])
    command = [sys.executable, "-m", "qpipe", "tokenize", "study.yaml", "tokens"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = call("--json", "--workers", "1")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    store = TokenStore.open(tmp_path / "tokens", verify=True)
    assert summary["digest"] == store.digest
    assert summary["splits"]["train"]["tokens"] == len(store.train)
    assert "tokenizing" in done.stderr
    assert f"{len(store.train):,} tokens" in call("--no-progress").stdout
    (tmp_path / "a.jsonl").write_text("{}\n")
    wrong = call("--no-progress")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "a.jsonl, line 1: no field 'text'" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
