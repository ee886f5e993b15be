"""Perplexity against the recorded loss and against transformers; a local task through the lm-evaluation-harness."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_huggingface import SMALL, save
from tokenizers import Tokenizer, models, pre_tokenizers
from training_cases import VOCABULARY

from qpipe.cli import main
from qpipe.errors import QpipeError
from qpipe.quality import load_scorer, perplexity

WORDS = [f"w{i}" for i in range(VOCABULARY)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model with a tokenizer of words w0 ... w63."""
    target = tmp_path_factory.mktemp("model")
    save(target, eos_token_id=0)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(target / "tokenizer.json"))
    return target


def words(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("count", [2, 10, 65, 150])
def test_perplexity_is_that_of_transformers(folder: Path, count: int) -> None:
    import transformers

    ids = words(count)
    text = " ".join(WORDS[i] for i in ids)
    found = perplexity(load_scorer(folder), text)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    losses = {}
    for start in [*range(0, max(1, count - 65), 64), max(0, count - 65)]:  # windows of 64, the last one full
        window = torch.tensor(ids[start : start + 65])
        with torch.no_grad():
            logits = reference(window[None, :-1]).logits[0]
        each = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        for place, value in enumerate(each.tolist()):
            losses.setdefault(start + 1 + place, value)
    assert found.tokens == len(losses) == count - 1
    assert found.loss == pytest.approx(sum(losses.values()) / len(losses), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss * len(ids) / math.log(2) / len(text))


def test_sequences_of_any_length_are_scored_alike(folder: Path) -> None:
    scorer = load_scorer(folder)
    sequences = [words(length, length) for length in (2, 30, 5, 64, 17)]
    together = scorer.log_probabilities(sequences)
    for sequence, found in zip(sequences, together, strict=True):
        torch.testing.assert_close(found, scorer.log_probabilities([sequence])[0], atol=1e-5, rtol=1e-4)
        assert len(found) == len(sequence) - 1


def test_command_reads_text_and_reports_what_is_missing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(WORDS[i] for i in words(40)))
    assert main(["quality", str(folder), "--text", str(tmp_path / "text.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"]["tokens"] == 39
    assert main(["quality", str(folder)]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err
    assert main(["quality", str(tmp_path), "--text", str(tmp_path / "text.txt")]) == 2
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    assert main(["quality", str(folder), "--text", str(tmp_path / "binary")]) == 2
    assert "UTF-8" in capsys.readouterr().err
    with pytest.raises(QpipeError, match="a text of 1 tokens"):
        perplexity(load_scorer(folder), "w3")


def test_a_local_task_through_the_harness(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which of three words follows? The gold answers are the model's own choices, but for one."""
    pytest.importorskip("lm_eval")
    scorer = load_scorer(folder)
    documents: list[dict[str, Any]] = []
    for number in range(8):
        context = words(6, 100 + number)
        values = [float(scorer.log_probabilities([[*context, answer]])[0][-1]) for answer in (1, 2, 3)]
        best = values.index(max(values))
        gold = (best + 1) % 3 if number == 0 else best
        documents.append({"question": " ".join(WORDS[i] for i in context), "choices": WORDS[1:4], "gold": gold})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "toy.yaml").write_text(
        f"""
task: toy_words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "data.jsonl"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
    )
    arguments = ["quality", str(folder), "--tasks", "toy_words", "--task-path", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["tasks"]["toy_words"]["acc,none"] == pytest.approx(7 / 8)
    assert main([*arguments[:2], "--tasks", "toy_word", "--task-path", str(tmp_path)]) == 2
    assert "did you mean 'toy_words'" in capsys.readouterr().err


def test_documents_of_the_harness_are_predicted_once(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    from qpipe.harness import HarnessModel

    scorer = load_scorer(folder)
    ids = words(100)
    found = HarnessModel(scorer, 0)._document(" ".join(WORDS[i] for i in ids))
    # One token ends the document before; then windows of 64 predictions, the second with what came right before.
    first = scorer.log_probabilities([[0, *ids[:64]]])[0].sum()
    second = scorer.log_probabilities([ids[35:100]])[0][-36:].sum()
    assert found == pytest.approx(float(first + second), rel=1e-5)
    assert SMALL["max_position_embeddings"] == scorer.context == 64
