"""Training step on the CPU: qpipe's decoder against transformers' Llama, and representations against dense.

A step is forward, loss, backward, gradient clipping and AdamW on one batch, the same data and optimizer for both. Each
variant is timed in turns, and the fastest of all turns counts, so that other load on the machine disturbs little.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --size 400k 1M --representation w4 w4a4 2:4
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qpipe.formats import resolve
from qpipe.model import Decoder
from qpipe.recipe import RECIPES, ModelShape
from qpipe.train.step import parameter_groups

Step = Callable[[Tensor], Tensor]


def llama(shape: ModelShape) -> nn.Module:
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def stepper(model: nn.Module, loss_of: Step, groups: list[dict[str, object]]) -> Step:
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(tokens: Tensor) -> Tensor:
        loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def variants(shape: ModelShape, representations: list[str], training: object) -> dict[str, Step]:
    reference = llama(shape)
    steps = {
        "transformers": stepper(
            reference,
            lambda tokens: reference(tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous(), labels=tokens).loss,
            [{"params": list(reference.parameters())}],
        )
    }
    for name in ["dense", *representations]:
        decoder = Decoder(shape, resolve(name))
        decoder.initialize(0)
        steps[name] = stepper(
            decoder,
            lambda tokens, decoder=decoder: decoder.loss(tokens[:, :-1], tokens[:, 1:]),
            parameter_groups(decoder, training),
        )
    return steps


def best_times(steps: dict[str, Step], tokens: Tensor, seconds: float) -> dict[str, float]:
    """Fastest step of each variant (seconds), taking turns until the time is up."""
    best = dict.fromkeys(steps, float("inf"))
    # With one thread the processor's time is the step's time, and other programs on the machine do not count.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            begin = clock()
            step(tokens)
            best[name] = min(best[name], clock() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--size", nargs="+", default=["100k", "400k", "1M"])
    parser.add_argument("--representation", nargs="*", default=["w4", "w4a4", "2:4"])
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=20.0, help="time per size")
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for size in options.size:
        shape, training = recipe.shape(size, options.vocab_size), recipe.training(size)
        tokens = torch.randint(0, shape.vocab_size, (training.batch_sequences, shape.context + 1))
        best = best_times(variants(shape, options.representation, training), tokens, options.seconds)
        count = training.batch_sequences * shape.context
        print(f"{size}: {count} tokens per step, vocabulary {shape.vocab_size}")
        for name, seconds in best.items():
            against_llama, against_dense = best["transformers"] / seconds, seconds / best["dense"]
            print(
                f"  {name:<14}{count / seconds:>10,.0f} tokens/s   {against_llama:5.2f}x transformers"
                f"   cost {against_dense:5.2f}x dense"
            )


if __name__ == "__main__":
    main()
