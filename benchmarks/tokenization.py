"""Tokens per second and peak memory of `tokenize_corpus` against two usual ways, in one run on the same text and cores.

    python benchmarks/tokenization.py corpus.jsonl.zst [...] [--bytes 50_000_000] [--vocab-size 32000] [--repeats 3]
    python benchmarks/tokenization.py corpus.jsonl.zst [...] --memory 100_000_000 400_000_000

Each way starts from the same JSONL file, uses the same byte-level BPE and ends with the token ids on disk:

- `qpipe`: `tokenize_corpus`, with all it does besides (processes, hashing, duplicates, split, digests, manifest);
- `encode_batch`: the `tokenizers` library in one process with its own threads, batches of 1,000 documents;
- `datasets.map`: batched, one process per core, then the ids written as one array. The conversion of the JSONL file to
  its own format is not counted.

The repeats of the three are interleaved and the medians compared, so that other load on the machine hits all alike.
Memory is the largest sum of resident memory over the process and its children, sampled every 20 ms; pages that
processes share are counted once per process.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qpipe.corpus import tokenize_corpus
from qpipe.corpus.blocks import documents
from qpipe.corpus.files import file_blocks
from qpipe.corpus.vocabulary import END_OF_DOCUMENT, train_bpe
from qpipe.corpus_config import FilesCorpus, PretrainedTokenizer

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MAP_BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSONL files with a field 'text'")
    parser.add_argument("--bytes", type=int, default=50_000_000, help="text to tokenize (default: 50 MB)")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="+", metavar="BYTES", help="measure peak memory at these sizes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenization-") as name:
        folder = Path(name)
        texts = limited(read_texts(args.files), args.bytes // 4)
        (folder / "tokenizer.json").write_text(train_bpe(texts, args.vocab_size).json, encoding="utf-8")
        sizes = args.memory or [args.bytes]
        measure = print_memory if args.memory else functools.partial(print_speed, repeats=args.repeats)
        for size in sizes:
            write_corpus(args.files, size, folder / "corpus.jsonl")
            measure(folder, args.vocab_size)


def read_texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        corpus = FilesCorpus(source="files", paths=(str(file),))
        for block in file_blocks(file, corpus):
            yield from documents(block)


def limited(texts: Iterator[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield text


def write_corpus(files: list[Path], size: int, path: Path) -> None:
    """Write `size` bytes of text as one JSONL file; where the files hold less, they come again, slightly changed."""
    copy = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for text in limited(read_texts(files), size - written):
                changed = f"{copy} {text}" if copy else text  # or it would be dropped as a duplicate
                file.write(json.dumps({"text": changed}, ensure_ascii=False) + "\n")
                written += len(changed.encode())
            copy += 1


def qpipe_way(folder: Path, vocab_size: int) -> int:
    store = tokenize_corpus(
        FilesCorpus(source="files", paths=("corpus.jsonl",)),
        PretrainedTokenizer(name="tokenizer.json", vocab_size=vocab_size, eos=END_OF_DOCUMENT),
        folder / "store",
        base=folder,
        progress=False,
        digest_cache=folder / "digests.json",
    )
    return len(store.train) + len(store.validation)


def library_way(folder: Path, vocab_size: int) -> int:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    count, batch = 0, []
    with (folder / "corpus.jsonl").open(encoding="utf-8") as lines, (folder / "raw.bin").open("wb") as out:
        for line in lines:
            batch.append(json.loads(line)["text"])
            if len(batch) == MAP_BATCH:
                count += write_batch(tokenizer, batch, out)
                batch = []
        return count + write_batch(tokenizer, batch, out)


def write_batch(tokenizer: Tokenizer, batch: list[str], out: Any) -> int:
    ids = [token for encoding in tokenizer.encode_batch(batch) for token in [*encoding.ids, 0]]
    np.array(ids, np.uint16).tofile(out)
    return len(ids)


def map_way(folder: Path, vocab_size: int, rows: Any) -> int:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    mapped = rows.map(
        functools.partial(encode_rows, tokenizer),
        batched=True,
        batch_size=MAP_BATCH,
        num_proc=CORES,
        remove_columns=["text"],
        load_from_cache_file=False,
        cache_file_name=str(folder / "mapped.arrow"),
        features=map_features(),
    )
    count = 0
    with (folder / "mapped.bin").open("wb") as out:
        for table in mapped.with_format("arrow").iter(MAP_BATCH):
            ids = table.column("ids").combine_chunks().flatten().to_numpy()
            ids.tofile(out)
            count += len(ids)
    return count


def encode_rows(tokenizer: Tokenizer, rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"ids": [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(rows["text"])]}


def map_features() -> Any:
    from datasets import Features, Sequence, Value

    return Features({"ids": Sequence(Value("uint16"))})


def print_speed(folder: Path, vocab_size: int, repeats: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=str(folder / "cache")
    )
    ways: dict[str, Callable[[], int]] = {
        "qpipe": lambda: qpipe_way(folder, vocab_size),
        "encode_batch": lambda: library_way(folder, vocab_size),
        "datasets.map": lambda: map_way(folder, vocab_size, rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            tokens[name] = way()
            seconds[name].append(time.perf_counter() - begin)
    speed = {name: tokens[name] / statistics.median(seconds[name]) for name in ways}
    size = (folder / "corpus.jsonl").stat().st_size
    print(f"{size / 1e6:.0f} MB of JSONL, {CORES} cores, vocabulary {vocab_size:,}, median of {repeats}")
    for name, rate in speed.items():
        times = " ".join(f"{s:.1f}" for s in seconds[name])
        ratio = speed["qpipe"] / rate
        print(f"{name:<14} {rate / 1e6:6.2f} M tokens/s   qpipe is {ratio:.2f}x   {tokens[name]:,} tokens in {times} s")


def print_memory(folder: Path, vocab_size: int) -> None:
    shutil.rmtree(folder / "store", ignore_errors=True)
    peak, stop = [0], threading.Event()
    sampler = threading.Thread(target=sample_memory, args=(peak, stop))
    sampler.start()
    begin = time.perf_counter()
    tokens = qpipe_way(folder, vocab_size)
    elapsed = time.perf_counter() - begin
    stop.set()
    sampler.join()
    size = (folder / "corpus.jsonl").stat().st_size
    print(
        f"{size / 1e6:7.0f} MB of JSONL, {CORES} workers: peak {peak[0] / 2**20:5.0f} MiB over all processes; "
        f"{tokens / 1e6:.1f} M tokens in {elapsed:.0f} s"
    )
    sys.stdout.flush()


def sample_memory(peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.02):
        peak[0] = max(peak[0], sum(map(resident, family(os.getpid()))))


def family(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in task.read_text().split():
                found += family(int(child))
        except OSError:  # the thread has ended
            continue
    return found


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    main()
