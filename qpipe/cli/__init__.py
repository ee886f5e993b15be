"""The command line: one verb per pipeline step, and the only place that prints or exits.

Each verb is a module of this package with `add_arguments(parser)` and `run(args) -> int`; it is imported only when
called, so that `qpipe --help` and the cheap verbs never pay for torch.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from qpipe import __version__
from qpipe.errors import QpipeError, nearest

VERBS: dict[str, str] = {
    "plan": "list a study's runs: size, tokens, FLOPs, bits/weight, state",
    "status": "how a study is getting on: done, running, failed runs, time left",
    "capacity": "bits/weight, Gaussian error and predicted multiplier of representations",
    "tokenize": "corpus -> token store + manifest",
    "train": "one run -> record, final weights, curve",
    "finetune": "finetune a Hugging Face Llama-type model under a representation",
    "ptq": "quantize a dense checkpoint after training to any average bits per weight",
    "evaluate": "reload a trained run and reproduce its validation loss",
    "quality": "perplexity on any text, and zero-shot tasks of the lm-evaluation-harness",
    "export": "pack a trained run to its stated bits and reload it",
    "collect": "records -> loss table",
    "fit": "fit a scaling law to a loss table, ours or anyone's",
    "multipliers": "fit -> efficiency-multiplier table (parquet, csv, md, tex)",
    "predict": "fit -> predicted loss at any size, tokens and representation",
    "advise": "fit -> best size, tokens and representation for a budget; which runs to do next",
    "splits": "losses -> best split of a budget between dense training and finetuning",
    "changes": "how far finetuning moved the weights, latent and quantized",
    "front": "losses -> front of loss against size, with how sure each model's place on it is",
    "damage": "losses -> what quantization after training costs, and until when it is enough",
    "figures": "fit + losses -> figures",
    "report": "tables and figures -> one self-contained HTML page",
    "track": "log the multiplier table to Weights & Biases",
    "sync": "upload what runs logged to Weights & Biases offline",
    "worker": "train runs back to back in one process (started by itself)",
    "schema": "write the JSON schema of study files for editors",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the process's exit code: 0 done, 2 wrong input, 1 anything else (as a traceback)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, VERBS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    top = argparse.ArgumentParser(
        prog="qpipe",
        description="Find out what compressed language models are worth.",
        epilog=f"verbs:\n{listing}\n\n`qpipe VERB --help` explains one, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"qpipe {__version__}")
    top.add_argument("verb", nargs="?", metavar="VERB")
    options = top.parse_args(arguments[:1])
    if options.verb is None:
        top.print_help()
        return 0
    if options.verb not in VERBS:
        print(f"qpipe: no verb '{options.verb}'{nearest(options.verb, VERBS)}; see qpipe --help", file=sys.stderr)
        return 2
    verb = importlib.import_module(f"qpipe.cli.{options.verb}")
    parser = argparse.ArgumentParser(
        prog=f"qpipe {options.verb}",
        description=verb.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(parser)
    try:
        return int(verb.run(parser.parse_args(arguments[1:])))
    except QpipeError as error:
        bullet = "\n  - " if len(error.problems) > 1 else " "
        print(f"qpipe {options.verb}:{bullet}" + bullet.join(error.problems), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
