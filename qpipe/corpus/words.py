"""Encoding text word by word, each distinct word once: the same ids as in one go, several times faster.

Running text repeats its words, and most tokenizers treat a word the same wherever it stands. So a text is cut where a
space stands between a non-space and an ASCII letter, every distinct part is encoded once by the tokenizer itself, and
its ids are looked up from then on. This is exact where no token can reach over such a place, which is checked on the
tokenizer's own description (`word_prefix`) and holds for

- byte-level tokenizers with the splitting rule of GPT-2, or those of Llama 3 and Qwen 2: each rule begins a new part at
  a space before a letter unless white space stands before it, and reads nothing across; the part ends with the letters,
  so `word,` is `word` and `,`, which leaves far fewer distinct words;
- tokenizers in the manner of SentencePiece BPE (Llama 2) that write a space as `▁` and split nowhere, if no entry of
  the vocabulary has a `▁` after another character: then no merge ever reaches over the place.

Text of any other tokenizer is encoded in one go.
"""

import json
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_CUT = re.compile(r" (?=[A-Za-z])(?<=[^\s▁] )")
_STEM = re.compile(r"[A-Za-z]+(?=[\x00-@\[-`{-\x7f])")
_KEPT_WORDS = 1 << 17  # some 20 MB
_KEPT_CHARACTERS = 48  # longer parts hardly ever repeat

_MARK = "▁"
_MARKED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
    ],
}
_ALWAYS_KNOWN = {_MARK, *string.ascii_letters}  # or unknown characters might be joined over a cut
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT_RULES = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r"\p{N}{1,3}", r"\p{N}")
}


class WordEncoder:
    """Encodes texts to ids as bytes, remembering words.

    Parameters
    ----------
    tokenizer
        Set to add no special tokens and to read special tokens as text.
    dtype
        Integer type of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self.prefix = word_prefix(json.loads(tokenizer.to_str()))
        self._known: dict[str, bytes] = {}  # words that follow a cut
        self._tails: dict[str, bytes] = {}  # what follows the letters of such a word

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as the bytes of an array of `dtype`."""
        if self.prefix is None:
            return self._encode(texts)
        parts = [_CUT.split(text) for text in texts]
        heads = self._encode([part[0] for part in parts])
        words = {word for part in parts for word in part[1:]}
        self._learn(words)
        look_up = self._known.__getitem__
        ids = [b"".join([head, *map(look_up, part[1:])]) for head, part in zip(heads, parts, strict=True)]
        self._forget(words)
        return ids

    def _learn(self, words: set[str]) -> None:
        new = [word for word in words if word not in self._known]
        if self.prefix:
            ends = {word: match.end() for word in new if (match := _STEM.match(word))}
            self._add(self._known, {word[: ends.get(word, len(word))] for word in new}, self.prefix)
            self._add(self._tails, {word[end:] for word, end in ends.items()}, "")
            self._known.update((w, self._known[w[:end]] + self._tails[w[end:]]) for w, end in ends.items())
        else:
            self._add(self._known, set(new), self.prefix or "")

    def _add(self, known: dict[str, bytes], texts: set[str], prefix: str) -> None:
        new = [text for text in texts if text not in known]
        known.update(zip(new, self._encode([prefix + text for text in new]), strict=True))

    def _forget(self, words: set[str]) -> None:
        """Bound the memory: drop long words now, and when there are too many all but the latest `words`."""
        for word in words:
            if len(word) > _KEPT_CHARACTERS:
                del self._known[word]
        if len(self._known) > _KEPT_WORDS:
            self._tails = {}
            self._known = {word: self._known[word] for word in words if len(word) <= _KEPT_CHARACTERS}

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype).tobytes() for encoding in encoded]


def word_prefix(description: dict[str, Any]) -> str | None:
    """Return what must stand before a word cut out of a text to encode it as in the text, or None for no such rule.

    Parameters
    ----------
    description
        Content of a tokenizer.json.
    """
    plain_tokens = [token for token in description["added_tokens"] if not token["special"]]
    if plain_tokens or description["model"].get("dropout"):  # tokens matched before any splitting, random merges
        return None
    if _splits_at_words(description):
        return " "
    return "" if _marks_spaces(description) else None


def _splits_at_words(description: dict[str, Any]) -> bool:
    normalizer, splitter = description["normalizer"], description["pre_tokenizer"]
    if normalizer not in (None, {"type": "NFC"}) or splitter is None:  # nothing composes with a space
        return False
    if splitter["type"] == "Sequence" and len(splitter["pretokenizers"]) == 2:
        rule, byte_level = splitter["pretokenizers"]
        known = rule["type"] == "Split" and rule["pattern"].get("Regex") in _SPLIT_RULES
        isolated = known and rule["behavior"] == "Isolated" and not rule["invert"]
        plain = {"use_regex": False, "add_prefix_space": False}
        return isolated and byte_level["type"] == "ByteLevel" and byte_level.items() >= plain.items()
    byte_level = splitter["type"] == "ByteLevel" and splitter["use_regex"]
    return byte_level and not splitter["add_prefix_space"]  # a prefix would also stand before the rest of a word


def _marks_spaces(description: dict[str, Any]) -> bool:
    normalizer, splitter, model = (description[key] for key in ("normalizer", "pre_tokenizer", "model"))
    replaced = normalizer == _MARKED and splitter is None
    metaspace = normalizer is None and splitter is not None and splitter["type"] == "Metaspace"
    if metaspace:
        metaspace = splitter["replacement"] == _MARK and splitter["prepend_scheme"] != "never" and not splitter["split"]
    if model["type"] != "BPE" or not (replaced or metaspace):
        return False
    inner_mark = re.compile(f"[^{_MARK}]{_MARK}")
    return model["vocab"].keys() >= _ALWAYS_KNOWN and not any(map(inner_mark.search, model["vocab"]))
