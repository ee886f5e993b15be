"""Perplexity of a model on any text, and zero-shot tasks of the lm-evaluation-harness.

MODEL is a run's output folder (with --tokens, where its tokenizer lies) or a Hugging Face Llama-type folder. --text
reads UTF-8 files as they are and joins them. --tasks needs the extra `eval` (pip install 'qpipe[eval]') and the data
sets of the tasks, or descriptions of tasks with local data in the folder --task-path.

example:
  qpipe quality results/demo/runs/n100k-d20x-w4-s0-1f3a9c2e/ --tokens results/tokens/1f3a9c2e5b7d/ --text wiki.test.raw
  qpipe quality exported/ --tasks arc_easy hellaswag piqa winogrande --json
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run's output folder or a Hugging Face folder")
    parser.add_argument("--tokens", type=Path, help="token store of the run, for its tokenizer")
    parser.add_argument("--context", type=int, help="tokens per sequence of a Hugging Face model (up to 2048)")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text to predict")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of the harness")
    parser.add_argument("--task-path", type=Path, metavar="DIR", help="further task descriptions")
    parser.add_argument("--limit", type=int, help="documents per task (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from qpipe.errors import QpipeError
    from qpipe.quality import load_scorer, perplexity

    if not args.text and not args.tasks:
        raise QpipeError("nothing to evaluate: give --text FILE or --tasks TASK")
    text = "".join(_read(path) for path in args.text)
    scorer = load_scorer(args.model, args.tokens, args.context)
    result: dict[str, Any] = {"model": scorer.name}
    if args.text:
        result["text"] = {key: value for key, value in asdict(perplexity(scorer, text)).items() if key != "name"}
    if args.tasks:
        result["tasks"] = _tasks(scorer, args)
    print(json.dumps(result, indent=1, default=str) if args.json else _text(result))
    return 0


def _read(path: Path) -> str:
    from qpipe.errors import QpipeError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QpipeError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _tasks(scorer: Any, args: argparse.Namespace) -> dict[str, Any]:
    from qpipe.errors import QpipeError

    try:
        from qpipe.harness import HarnessModel, run_tasks
    except ImportError as error:
        raise QpipeError(f"--tasks needs the lm-evaluation-harness ({error}): pip install 'qpipe[eval]'") from error
    return run_tasks(HarnessModel(scorer, _end(scorer, args)), args.tasks, args.task_path, args.limit)


def _end(scorer: Any, args: argparse.Namespace) -> int:
    """Return the token that ends a document: the token store's, or a Hugging Face model's."""
    if args.tokens is not None:
        from qpipe.corpus.store import MANIFEST

        store = args.tokens if args.tokens.name == MANIFEST else args.tokens / MANIFEST
        return int(json.loads(store.read_text(encoding="utf-8"))["eos"])
    end = json.loads((args.model / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    return int(end[0] if isinstance(end, list) else end or 0)


def _text(result: dict[str, Any]) -> str:
    lines = [str(result["model"])]
    if "text" in result:
        found = result["text"]
        lines.append(
            f"  perplexity {found['perplexity']:.4f}, {found['loss']:.4f} nats/token over {found['tokens']:,} tokens, "
            f"{found['bits_per_byte']:.4f} bits/byte"
        )
    for name, values in result.get("tasks", {}).items():
        shown = (f"{key.split(',')[0]} {value:.4f}" for key, value in values.items() if isinstance(value, float))
        lines.append(f"  {name}: {', '.join(shown)}")
    return "\n".join(lines)
