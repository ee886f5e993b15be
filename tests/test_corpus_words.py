"""Word-by-word encoding gives the ids that the library gives for the whole text, or is not used."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from qpipe.corpus import words as words_module
from qpipe.corpus.words import WordEncoder, word_prefix

# Patterns as in the tokenizer.json files of Llama 3 and Qwen 2.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")

ATOMS = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\x00",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2003",
    "\u2028",
    "\u3000",
    "▁",
    "e\u0301",
    "\u0301",
]
ATOMS += [
    "a",
    "the",
    " the",
    " The",
    "ing",
    "'s",
    "'LL",
    " '",
    "1",
    "1234",
    " 12",
    ".",
    ",",
    " (",
    "...",
    "é",
    "日本",
    "🙂",
    "ſ",
]
ATOMS += ["<s>", "</s>", "a ▁b", " a▁", "_", " \u200bx", "İ", "ǆ", "٣", " ٣", "Ⅷ"]
TEXT = st.lists(st.sampled_from(ATOMS), max_size=30).map("".join) | st.text(max_size=30)
TRAINING = [" ".join(ATOMS[(i * j) % len(ATOMS)] * (1 + i % 2) for j in range(40)) for i in range(150)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(rule: pre_tokenizers.PreTokenizer, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = rule
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentence_piece(metaspace: str | None = None, fallback: bool = True) -> Tokenizer:
    """Llama 2: `▁` for a space, merges inside words and inside runs of `▁` only, bytes for the unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))
    runs = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")  # for the training only: entries such as ▁▁▁ and ▁▁the
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(split=False), runs])
    special = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))] if fallback else SPECIAL
    alphabet = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=70)
    tokenizer.train_from_iterator(TRAINING, trainer)
    description = json.loads(tokenizer.to_str())
    description["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(description))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


FAST: dict[str, Tokenizer] = {
    "gpt-2": byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-3": byte_level(split_by(LLAMA_3)),
    "qwen-2": byte_level(split_by(QWEN_2), normalizers.NFC()),
    "llama-2": sentence_piece(),
    "llama-2 without bytes": sentence_piece(fallback=False),
    "llama-2 metaspace first": sentence_piece("first"),
    "llama-2 metaspace always": sentence_piece("always"),
}


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXT, max_size=4))
def test_ids_are_those_of_the_whole_text(name: str, texts: list[str]) -> None:
    tokenizer = FAST[name]
    tokenizer.encode_special_tokens = True
    encoder = WordEncoder(tokenizer, np.dtype("<u2"))
    assert encoder.prefix is not None
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    for _ in range(2):  # learning the words, then knowing them
        assert [np.frombuffer(ids, "<u2").tolist() for ids in encoder(texts)] == expected


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": "first"}


def changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda description: {**description, **changes}


def model_changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda description: {**description, "model": {**description["model"], **changes}}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt-2", changed(normalizer={"type": "Lowercase"})),
        ("gpt-2", changed(pre_tokenizer=None)),
        ("gpt-2", changed(pre_tokenizer={"type": "ByteLevel", "use_regex": False})),
        ("gpt-2", changed(pre_tokenizer={"type": "ByteLevel", "use_regex": True, "add_prefix_space": True})),
        ("gpt-2", changed(pre_tokenizer={"type": "Whitespace"})),
        ("gpt-2", changed(added_tokens=[{"content": "two words", "special": False}])),
        ("gpt-2", model_changed(dropout=0.1)),
        ("llama-2", changed(normalizer=None)),
        ("llama-2", model_changed(type="Unigram")),
        ("llama-2", model_changed(vocab={"▁": 0, "a": 1})),
        ("llama-2 metaspace first", changed(pre_tokenizer={**METASPACE, "replacement": "_"})),
        ("llama-2 metaspace first", changed(pre_tokenizer={**METASPACE, "prepend_scheme": "never"})),
        ("llama-2 metaspace first", changed(pre_tokenizer={**METASPACE, "split": True})),
    ],
)
def test_other_tokenizers_are_not_cut(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    description = json.loads(FAST[name].to_str())
    assert word_prefix(description) is not None
    assert word_prefix(change(description)) is None


def test_a_vocabulary_that_reaches_over_spaces_is_not_cut() -> None:
    description = json.loads(FAST["llama-2"].to_str())
    description["model"]["vocab"]["of▁the"] = 9999
    assert word_prefix(description) is None


def test_an_unknown_split_rule_is_not_cut() -> None:
    tokenizer = byte_level(split_by(LLAMA_3.replace("]?", "]*")))
    assert word_prefix(json.loads(tokenizer.to_str())) is None


def test_uncut_tokenizers_give_the_same_ids_as_the_library() -> None:
    tokenizer = FAST["gpt-2"]
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.add_tokens([AddedToken("the (")])
    encoder = WordEncoder(plain, np.dtype("<u4"))
    text = "over the (fence) of the garden"
    assert encoder.prefix is None
    assert np.frombuffer(encoder([text])[0], "<u4").tolist() == plain.encode(text, add_special_tokens=False).ids


def test_few_words_are_remembered_and_none_that_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "_KEPT_WORDS", 50)
    tokenizer = FAST["gpt-2"]
    encoder = WordEncoder(tokenizer, np.dtype("<u2"))
    for start in range(0, 400, 20):
        text = " ".join(f"word{chr(97 + i % 26)}{i}" for i in range(start, start + 20)) + " " + "x" * 200
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert np.frombuffer(encoder([text])[0], "<u2").tolist() == expected
        assert len(encoder._known) <= 50
        assert max(map(len, encoder._known)) <= 48
