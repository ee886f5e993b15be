"""Training step on the CPU: qpipe's decoder against transformers' Llama, and representations against dense.

A step is forward, loss, backward, gradient clipping and AdamW on one batch, the same data and optimizer for both. The
Llama is timed as it is and with its loss under `torch.compile`, and so is qpipe's decoder (`QPIPE_COMPILE=1` of a run).
Variants take turns. A rate is that of the fastest turn, a ratio the median over turns of both times in the same turn,
so that other load on the machine disturbs little. Without a C++ compiler, compiled variants are left out.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --size 400k 1M --representation w4 w4a4 2:4
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import LlamaConfig, LlamaForCausalLM

from qpipe.formats import resolve
from qpipe.model import Decoder
from qpipe.recipe import RECIPES, ModelShape, Training
from qpipe.train.step import compile_model, parameter_groups

Step = Callable[[Tensor], Tensor]
LLAMA, COMPILED = "transformers", ", compiled"


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


def stepper(
    model: nn.Module, loss_of: Step, groups: list[dict[str, object]], precision: torch.dtype = torch.float32
) -> Step:
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def llama_step(shape: ModelShape, precision: torch.dtype, *, compiled: bool) -> Step:
    model = llama(shape)

    def loss_of(tokens: Tensor) -> Tensor:
        return model(tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous(), labels=tokens).loss

    loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    return stepper(model, loss_of, [{"params": list(model.parameters())}], precision)


def decoder_step(shape: ModelShape, name: str, training: Training, precision: torch.dtype, *, compiled: bool) -> Step:
    decoder = Decoder(shape, resolve(name))
    decoder.initialize(0)
    if compiled:
        compile_model(decoder)
    groups = parameter_groups(decoder, training)
    return stepper(decoder, lambda tokens: decoder.loss(tokens[:, :-1], tokens[:, 1:]), groups, precision)


def variants(
    shape: ModelShape, names: list[str], training: Training, precision: torch.dtype, tokens: Tensor
) -> dict[str, Step]:
    """Steps by name, each taken twice so that all is compiled and in place."""
    torch._dynamo.reset()
    steps: dict[str, Step] = {}
    for mark in ("", COMPILED):
        made = {LLAMA: llama_step(shape, precision, compiled=bool(mark))}
        made |= {name: decoder_step(shape, name, training, precision, compiled=bool(mark)) for name in names}
        try:
            for step in made.values():
                step(tokens)
                step(tokens)
        except TorchDynamoException as error:
            print(f"compiled variants left out: {str(error).strip().splitlines()[0]}")
            break
        steps |= {name + mark: step for name, step in made.items()}
    return steps


def times(steps: dict[str, Step], tokens: Tensor, seconds: float) -> dict[str, list[float]]:
    """Seconds of each variant's steps, taking turns until the time is up."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    # With one thread the processor's time is the step's time, and other programs on the machine do not count.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            begin = clock()
            step(tokens)
            found[name].append(clock() - begin)
    return found


def ratio(upper: list[float], lower: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def table(found: dict[str, list[float]], tokens: int) -> str:
    """One line per variant: rate, rate against the Llama plain and compiled, cost against dense of the same kind."""
    lines = []
    for name, own in found.items():
        peers = [f"{ratio(found[peer], own):5.2f}x {peer}" for peer in (LLAMA, LLAMA + COMPILED) if peer in found]
        if not name.startswith(LLAMA):
            peers.append(f"cost {ratio(own, found['dense' + COMPILED * name.endswith(COMPILED)]):5.2f}x dense")
        lines.append(f"  {name:<24}{tokens / min(own):>10,.0f} tokens/s   " + "   ".join(peers))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--size", nargs="+", default=["30k", "200k", "400k", "1M", "3M"])
    parser.add_argument("--representation", nargs="*", default=["w4", "w4a4", "2:4"])
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--seconds", type=float, default=60.0, help="time per size")
    options = parser.parse_args()
    recipe, precision = RECIPES[options.recipe], getattr(torch, options.precision)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {options.precision}")
    for size in options.size:
        shape, training = recipe.shape(size, options.vocab_size), recipe.training(size)
        tokens = torch.randint(0, shape.vocab_size, (training.batch_sequences, shape.context + 1))
        count = training.batch_sequences * shape.context
        print(f"{size}: {count} tokens per step, vocabulary {shape.vocab_size}")
        steps = variants(shape, ["dense", *options.representation], training, precision, tokens)
        print(table(times(steps, tokens, options.seconds), count), flush=True)


if __name__ == "__main__":
    main()
