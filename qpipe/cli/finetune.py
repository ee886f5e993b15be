"""Finetune a Hugging Face Llama-type model under a representation, or round it (--steps 0), and evaluate it.

CHECKPOINT is a folder that save_pretrained has written (llama, mobilellm, mistral or qwen2; anything that would compute
something else is refused by name). TOKENS is a token store made with the model's own tokenizer, its `vocab_size` set to
the rows of the embedding. Defaults are ParetoQ's recipe (2502.02631) for the representation's bits: 128 sequences of
2048 tokens per step, 120,000 steps at 2e-5 for 1 to 2 bits and 40,000 at 1e-5 above, cosine to zero, no weight decay.

The options are written to OUT/run.yaml, which is then trained as any other run: it resumes, it is evaluated by
`qpipe evaluate` and packed by `qpipe export`, also as a folder for transformers. `qpipe train OUT/run.yaml TOKENS OUT
--parent CHECKPOINT` repeats it. D counts the finetuning's tokens alone.

example:
  qpipe finetune models/SmolLM2-135M results/tokens/1f3a9c2e5b7d/ out/ --representation w2-seq --steps 1000 --batch 32
  qpipe export out/ packed.safetensors --transformers exported/
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qpipe.runs import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of the model")
    parser.add_argument("tokens", type=Path, metavar="TOKENS", help="token store: its folder or its manifest.json")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--representation", required=True, help="what to finetune to, e.g. w2-seq; dense trains on")
    parser.add_argument("--steps", type=int, help="optimizer steps; 0 rounds the weights (default: ParetoQ's)")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate (default: ParetoQ's)")
    parser.add_argument("--context", type=int, default=2048, help="tokens per sequence (2048)")
    parser.add_argument("--batch", type=int, default=128, help="sequences per step (128)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="arithmetic of products (bf16)")
    parser.add_argument(
        "--parameters", choices=["fp32", "bf16"], default="fp32", help="master weights; the authors' are bf16 (fp32)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the data (0)")


def run(args: argparse.Namespace) -> int:
    """Write run.yaml, then train it."""
    from qpipe.cli import train

    planned = plan(args)
    planned.write(args.out / "run.yaml")
    return train.run(
        argparse.Namespace(
            run=str(args.out / "run.yaml"), tokens=args.tokens, out=args.out, parent=args.checkpoint, study=None
        )
    )


def plan(args: argparse.Namespace) -> "Run":
    """Return the run that the options describe (errors: the model, the token store, the options; all at once)."""
    from qpipe.accounting import count_parameters
    from qpipe.corpus.store import MANIFEST, TokenStore
    from qpipe.errors import QpipeError
    from qpipe.formats import resolve
    from qpipe.huggingface import read_shape, weights_digest
    from qpipe.identity import digest
    from qpipe.recipe import PARETOQ
    from qpipe.runs import Checkpoint, Run

    problems = [
        f"--{name} {value} must be {least} or more"
        for name, value, least in (("steps", args.steps, 0), ("context", args.context, 2), ("batch", args.batch, 1))
        if value is not None and value < least
    ]
    if args.learning_rate is not None and not args.learning_rate > 0:
        problems.append(f"--learning-rate {args.learning_rate} must be above 0")
    if args.parameters == "bf16" and args.precision != "bf16":
        problems.append("--parameters bf16 needs --precision bf16")
    if problems:
        raise QpipeError(problems)
    shape = read_shape(args.checkpoint, args.context)
    kind = resolve(args.representation)
    grid = None if kind.weights is None else kind.weights.parsed_grid
    bits = 16.0 if grid is None else grid.bits
    store = TokenStore.open(args.tokens.parent if args.tokens.name == MANIFEST else args.tokens)
    training = PARETOQ.training(
        bits,
        batch_sequences=args.batch,
        precision=args.precision,
        learning_rate=args.learning_rate,
        parameters=args.parameters,
    )
    steps = PARETOQ.tokens(bits) // (args.batch * args.context) if args.steps is None else args.steps
    count = count_parameters(shape).non_embedding
    return Run(
        size=re.sub(r"[^A-Za-z0-9.]+", "-", args.checkpoint.resolve().name),
        representation_name=kind.name,
        tokens_per_parameter=max(steps * args.batch * args.context / count, 1e-9),
        shape=shape,
        training=training,
        steps=steps,
        representation=kind.canonical(),
        corpus=digest(store.manifest.get("identity"), 12),
        seed=args.seed,
        checkpoint=Checkpoint(weights=weights_digest(args.checkpoint)),
    )
