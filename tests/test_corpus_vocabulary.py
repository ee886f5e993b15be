"""Tokenizers: a BPE trained here, and any saved by Hugging Face libraries."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qpipe.corpus import vocabulary as vocabulary_module
from qpipe.corpus.blocks import Block
from qpipe.corpus.encoding import Encoder
from qpipe.corpus.vocabulary import END_OF_DOCUMENT, make_vocabulary, open_tokenizer, pieces, train_bpe
from qpipe.corpus_config import PretrainedTokenizer, TokenizerConfig
from qpipe.errors import QpipeError

CONFIG = TypeAdapter(TokenizerConfig)
WORDS = [
    a + b for a in ("low", "new", "wide", "hou", "naï", "東京", "an") for b in ("", "er", "est", "se", "d", "🙂", "ily")
]
TEXTS = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(60)) + "\n" for i in range(200)]


def encoded(vocabulary: vocabulary_module.Vocabulary, *texts: str) -> list[int]:
    block = Encoder(vocabulary, np.dtype("<u4"))(Block("texts", "test", 1, list(texts)))
    return [int(token) for token in block.tokens]


def reference_merges(texts: list[str], alphabet: list[str], number: int) -> list[tuple[str, str]]:
    """Sennrich et al. 2016, algorithm 1: join the most frequent pair of neighbours, again and again.

    Of equally frequent pairs the one with the smaller ids comes first.
    """
    words = Counter(tuple(word.replace(" ", "Ġ")) for text in texts for word in re.findall(" ?[a-z]+", text))
    ids = {symbol: i for i, symbol in enumerate(alphabet)}
    merges = []
    for _ in range(number):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        left, right = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append((left, right))
        ids[left + right] = len(ids)
        words = Counter({joined(word, left, right): count for word, count in words.items()})
    return merges


def joined(word: tuple[str, ...], left: str, right: str) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == (left, right):
            out[-1] = left + right
        else:
            out.append(symbol)
    return tuple(out)


def test_bpe_merges_are_those_of_the_published_algorithm() -> None:
    generator = np.random.default_rng(3)
    texts = [
        " ".join("".join(generator.choice(list("aabcde"), generator.integers(1, 9))) for _ in range(20))
        for _ in range(60)
    ]
    expected = reference_merges(texts, sorted(pre_tokenizers.ByteLevel.alphabet()), 60)
    merges = json.loads(train_bpe(texts, 257 + 60).json)["model"]["merges"]
    assert [tuple(merge) for merge in merges] == expected


def test_bpe_text_survives_a_round_trip_and_documents_end_with_id_0() -> None:
    vocabulary = train_bpe(TEXTS, 400)
    ids = encoded(vocabulary, TEXTS[3], "\x00 unseen ✨ bytes é")
    assert vocabulary.eos == 0
    assert [i for i, token in enumerate(ids) if token == 0][-1] == len(ids) - 1
    assert ids.count(0) == 2
    middle = ids.index(0)
    tokenizer = open_tokenizer(vocabulary.json)
    assert tokenizer.decode(ids[:middle]) == TEXTS[3]
    assert tokenizer.decode(ids[middle + 1 : -1]) == "\x00 unseen ✨ bytes é"


def test_bpe_has_all_bytes_and_exactly_the_size_asked_for() -> None:
    vocabulary = train_bpe(TEXTS, 300)
    names = open_tokenizer(vocabulary.json).get_vocab()
    assert vocabulary.size == len(names) == 300
    assert set(pre_tokenizers.ByteLevel.alphabet()) | {END_OF_DOCUMENT} <= set(names)


def test_bpe_training_does_not_depend_on_order_threads_or_process() -> None:
    expected = train_bpe(TEXTS, 350).digest
    assert train_bpe(TEXTS[::-1], 350).digest == expected
    code = "from tests.test_corpus_vocabulary import TEXTS, train_bpe; print(train_bpe(TEXTS, 350).digest)"
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_text_that_looks_like_the_end_token_is_ordinary_text() -> None:
    vocabulary = train_bpe(TEXTS, 300)
    ids = encoded(vocabulary, f"before {END_OF_DOCUMENT} after")
    assert ids.count(vocabulary.eos) == 1
    assert open_tokenizer(vocabulary.json).decode(ids[:-1]) == f"before {END_OF_DOCUMENT} after"


def test_pieces_join_to_the_text_and_break_at_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_module, "PIECE_CHARACTERS", 20)
    for text in ("a line\n" * 30, "words and words " * 10, "x" * 65, "", "x" * 20):
        cut = list(pieces(text))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= 20
    assert all(piece.endswith("\n") for piece in pieces("a line\n" * 30))


def byte_level() -> Tokenizer:
    """GPT-2-like."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["</s>", "<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return tokenizer


def llama_like() -> Tokenizer:
    """SentencePiece-like BPE with byte fallback that adds <s> in front, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT-like, with [SEP] as end token and truncation switched on in the file."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=3, pad_token="[PAD]", length=64)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "eos"), [(byte_level, "</s>"), (llama_like, "</s>"), (word_piece, "[SEP]")], ids=["gpt2", "llama", "bert"]
)
def test_saved_hugging_face_tokenizers_give_the_ids_transformers_gives(tmp_path: Path, make, eos: str) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=make(), eos_token=eos).save_pretrained(tmp_path / "saved")
    reference = AutoTokenizer.from_pretrained(tmp_path / "saved")
    rows = len(reference) + 5
    vocabulary = make_vocabulary(PretrainedTokenizer(name="saved", vocab_size=rows), tmp_path, [])
    texts = [TEXTS[0], "Unseen WORDS, punctuation?! 東 é", "wide\n\n  wider"]
    expected = [reference(text, add_special_tokens=False, truncation=False)["input_ids"] for text in texts]
    assert encoded(vocabulary, *texts) == [i for ids in expected for i in [*ids, reference.eos_token_id]]


def test_a_tokenizer_file_needs_to_be_told_its_end_token(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    config = PretrainedTokenizer(name="tokenizer.json", vocab_size=320, eos="</s>")
    vocabulary = make_vocabulary(config, tmp_path, [])
    assert (vocabulary.eos, vocabulary.size) == (0, byte_level().get_vocab_size())
    for eos, message in ((None, "does not say which token ends"), ("<end>", "has no token '<end>'")):
        with pytest.raises(QpipeError, match=message):
            make_vocabulary(config.model_copy(update={"eos": eos}), tmp_path, [])


def test_more_ids_than_rows_of_the_embedding_is_refused(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        QpipeError, match=r"ids up to \d+, but vocab_size is 290; set tokenizer.vocab_size to at least \d+"
    ):
        make_vocabulary(PretrainedTokenizer(name="tokenizer.json", vocab_size=290, eos="</s>"), tmp_path, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "not a tokenizer.json"), ("not json", "not a tokenizer.json"), (None, "no such file")],
)
def test_unreadable_tokenizers_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(QpipeError, match=message):
        make_vocabulary(PretrainedTokenizer(name="tokenizer.json", vocab_size=300, eos="a"), tmp_path, [])


def test_a_hub_name_that_cannot_be_reached_says_what_to_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = PretrainedTokenizer(name="no-such-owner/no-such-tokenizer", vocab_size=300)
    with pytest.raises(QpipeError, match=r"cannot be loaded .*HF_TOKEN"):
        make_vocabulary(config, tmp_path, [])
