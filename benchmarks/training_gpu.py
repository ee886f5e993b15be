"""Training step on one GPU: qpipe through Lightning, its bare loop, and a reference that follows QuEST's code.

A step is forward, loss, backward, gradient clipping and AdamW on 64 sequences of 512 random tokens, bfloat16 autocast.

reference   the algorithm of the published training code (`quest_reference.py`), compiled as a whole
half ref.   the same with its other quantizer, which leaves operands rotated
bare        qpipe's step in a plain loop
lightning   qpipe's step as `qpipe train` runs it: Lightning's Trainer, its data, history and recorder
uncaptured  the same with `QPIPE_CAPTURE=0`: launch by launch, blocks compiled

Ratios of one size come last. Times of one invocation only are to be divided by each other: machines differ by 3%.

    python benchmarks/training_gpu.py --size 30M --representation dense w4a4 w4 2:4 s50 --reference dense w4a4 w4
    python benchmarks/training_gpu.py --recipe tiny --size 1M 3M --vocab-size 4096 --uncaptured
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from quest_reference import Reference
from torch import Tensor, nn

import qpipe.attention
import qpipe.compress.dense
import qpipe.compress.linear
import qpipe.cross_entropy
import qpipe.model
from qpipe.accounting import training_flops_per_token
from qpipe.formats import resolve
from qpipe.identity import digest
from qpipe.memory import step_memory
from qpipe.model import Decoder
from qpipe.recipe import RECIPES
from qpipe.runs import Run
from qpipe.train.data import Batches
from qpipe.train.history import History
from qpipe.train.lightning_import import LightningEnvironment, lightning
from qpipe.train.module import TrainingModule
from qpipe.train.pretrain import OURS
from qpipe.train.step import TrainingStep, make_optimizer

WARM_STEPS = 12
KERNELS = ("norm", "attention", "rotary", "rounding", "head", "swiglu", "softmax", "embedding", "product")


def make_run(size: str, representation: str, options: argparse.Namespace) -> Run:
    recipe = RECIPES[options.recipe]
    shape = recipe.shape(size, options.vocab_size)
    training = recipe.training(size).model_copy(update={"batch_sequences": options.sequences, "precision": "bf16"})
    resolved = resolve(representation)
    return Run(
        size=size,
        representation_name=resolved.name,
        tokens_per_parameter=1.0,
        shape=shape.model_copy(update={"context": options.context}),
        training=training,
        steps=10 * options.steps,
        representation=resolved.canonical(),
        corpus=digest("random tokens", 12),
        seed=0,
    )


def random_tokens(run: Run) -> Tensor:
    return torch.randint(0, run.shape.vocab_size, (run.training.batch_sequences, run.shape.context + 1), device="cuda")


class Clock:
    """Seconds per step between two synchronised moments, and the time to the first step."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.first = self.mark = self.per_step = 0.0

    def step_done(self, number: int, last: int) -> None:
        """Take note of a finished step, counted from 1."""
        if number == 1:
            torch.cuda.synchronize()
            self.first = time.perf_counter() - self.begin
        elif number == WARM_STEPS:
            torch.cuda.synchronize()
            self.mark = time.perf_counter()
        elif number == last:
            torch.cuda.synchronize()
            self.per_step = (time.perf_counter() - self.mark) / (last - WARM_STEPS)


def loop(step: Callable[[int], object], count: int) -> Clock:
    clock = Clock()
    for number in range(1, count + 1):
        step(number - 1)
        clock.step_done(number, count)
    return clock


def time_reference(run: Run, options: argparse.Namespace, *, half: bool) -> Clock:
    with torch.device("cuda"):
        model: Any = Reference(run.shape, run.representation_name, half=half)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled, tokens = torch.compile(model), random_tokens(run)

    def step(_: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return loop(step, options.steps)


def bare_step(run: Run, options: argparse.Namespace) -> Callable[[int], object]:
    model = Decoder(run.shape, run.format_spec)
    model.initialize(0)
    optimizer, tokens = make_optimizer(model.cuda(), run.training), random_tokens(run)
    training = TrainingStep(model, run, run.training.batch_sequences, single=True)

    def step(number: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            training(tokens, number, optimizer)

    return step


class RandomSplit:
    """A token split of random tokens."""

    def __init__(self, vocab_size: int, count: int = 10_000_000) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, count).astype(np.uint16)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from `start` on."""
        return self.tokens[start : start + count]


class _Timer(lightning.Callback):
    """Clock of a run, and how long it waited for data by the step at which the clock begins to count."""

    def __init__(self, last: int) -> None:
        self.clock, self.last, self.waited_before = Clock(), last, 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.clock.step_done(trainer.global_step, self.last)
        if trainer.global_step == WARM_STEPS:
            self.waited_before = module.seconds_waited


def time_lightning(run: Run, options: argparse.Namespace) -> tuple[Clock, float]:
    """Return the clock and the share of the time it counts in which the host waited for data."""
    timer = _Timer(options.steps)
    split: Any = RandomSplit(run.shape.vocab_size)
    batches = Batches(split, run.shape.context, run.training.batch_sequences, run.seed)
    module = TrainingModule(run, batches, History(run))
    trainer = lightning.Trainer(
        accelerator="gpu",
        devices=1,
        plugins=[LightningEnvironment()],
        precision="bf16-mixed",
        max_steps=options.steps,
        callbacks=[timer],
        logger=False,
        **OURS,
    )
    trainer.fit(module)
    waited = module.seconds_waited - timer.waited_before
    return timer.clock, waited / (timer.clock.per_step * (options.steps - WARM_STEPS))


def leave_out(names: Sequence[str] = KERNELS) -> None:
    """Replace kernels of our own by what they stand for, in this process."""

    def plain_norms(model: Decoder, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        features = F.embedding(tokens, model.embedding.weight)
        for block in model.blocks:
            features = block(features, cosine, sine)
        return model.norm(features)

    def plain_embedding(
        embedding: Tensor, tokens: Tensor, weight: Tensor, epsilon: float, measured: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return qpipe.model.add_norm(F.embedding(tokens, embedding), None, weight, epsilon, measured)

    def plain_parts(qkv: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
        query_key, value = qkv.split([heads + kv_heads, kv_heads], dim=2)
        return (*qpipe.attention.rotate(query_key, cosine, sine).split([heads, kv_heads], dim=2), value)

    def plain_product(total: Tensor, gradient: Tensor, part: Tensor, *, first: bool) -> None:
        product = torch.mm(gradient.T, part, out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)

    def plain_swiglu(gate_up: Tensor, _: bool) -> tuple[Tensor, None]:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up, None

    def plain_gradient(logits: Tensor, target: Tensor, scale: float, losses: Tensor) -> Tensor:
        probability = torch.softmax(logits.float(), dim=-1)
        losses.copy_(-probability.gather(1, target)[:, 0].log())
        return (probability.scatter_add_(1, target, -torch.ones_like(probability[:, :1])) * scale).to(logits)

    changes: dict[str, list[tuple[Any, str, Any]]] = {
        "norm": [(Decoder, "_hidden_with_joined_norms", plain_norms)],
        "attention": [(qpipe.attention, "has_kernel", lambda *_: False)],
        "rotary": [(qpipe.attention, "rotated_parts", plain_parts)],
        "rounding": [(qpipe.compress.linear, "_has_kernel", lambda *_: False)],
        "head": [(qpipe.cross_entropy, "_add_product", plain_product)],
        "swiglu": [(qpipe.model, "swiglu", plain_swiglu)],
        "softmax": [(qpipe.cross_entropy, "_gradient", plain_gradient)],
        "embedding": [(qpipe.model, "embed_norm", plain_embedding), (qpipe.model, "embed", F.embedding)],
        "product": [(qpipe.compress.dense.DenseLinear, "forward", nn.Linear.forward)],
    }
    for change in (change for name in names for change in changes[name]):
        setattr(*change)


def profile(step: Callable[[int], object], trace: Path) -> str:
    """Return a table of kernel times of three steps; write their timeline, which browsers show, to `trace`."""
    for number in range(WARM_STEPS):
        step(number)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as result:
        for number in range(3):
            step(number)
        torch.cuda.synchronize()
    result.export_chrome_trace(str(trace))
    return result.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)


def matmul_ceiling(size: int = 8192) -> tuple[float, float]:
    """FLOP/s of a large bfloat16 product: of a cool device, and while it works on for as long as steps are timed.

    A device that draws its full power lowers its clock; training does, too.
    """
    one, other = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def rate(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            one @ other
        torch.cuda.synchronize()
        return count * 2 * size**3 / (time.perf_counter() - begin)

    rate(3)
    burst = rate(20)
    rate(500)
    return burst, rate(1000)


def ratios(rows: Sequence[dict[str, Any]]) -> str:
    """Speed through Lightning over each other way of the same representation, and time over dense: one line each."""
    speeds = {(row["representation"], row["how"]): row["tokens_per_second"] for row in rows}
    lines = []
    for (name, how), speed in speeds.items():
        if how != "lightning":
            continue
        parts = [f"{speed / other:.3f}x {way}" for (own, way), other in speeds.items() if own == name and way != how]
        if name != "dense" and ("dense", how) in speeds:
            parts.append(f"{speeds['dense', how] / speed:.3f}x the time of dense")
        lines += [f"{name:<14}{', '.join(parts)}"] if parts else []
    return "\n".join(lines)


def fresh() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quest")
    parser.add_argument("--size", nargs="+", default=["30M"])
    parser.add_argument("--representation", nargs="*", default=["dense", "w4a4", "w4"])
    parser.add_argument("--reference", nargs="*", default=[], help="representations to time the reference in")
    parser.add_argument("--half-reference", nargs="*", default=[], help="the same, operands left rotated")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--uncaptured", action="store_true", help="also time the step without capturing it as a graph")
    parser.add_argument("--no-bare", action="store_true")
    parser.add_argument("--profile", help="write kernel times and timeline of each representation into this folder")
    parser.add_argument("--without", nargs="*", default=[], choices=KERNELS, help="kernels to leave out")
    parser.add_argument("--json", help="write the table here")
    options = parser.parse_args()
    leave_out(options.without)
    if "rounding" in options.without:  # what stands in for it is generated code
        os.environ.setdefault("QPIPE_COMPILE", "1")
    ceiling, sustained = matmul_ceiling()
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name()}, "
        f"bf16 product {ceiling / 1e12:.0f} TFLOP/s, {sustained / 1e12:.0f} sustained"
    )
    rows: list[dict[str, Any]] = []

    def add(run: Run, how: str, clock: Clock, **more: Any) -> None:
        speed = run.tokens_per_step / clock.per_step
        rate = speed * training_flops_per_token(run.shape)
        memory = torch.cuda.max_memory_allocated() / 2**30
        predicted = step_memory(run, run.training.batch_sequences if how == "bare" else None).gib
        row = {"size": run.size, "representation": run.representation_name, "how": how, "tokens_per_second": speed}
        rows.append(
            {
                **row,
                "first_step_seconds": clock.first,
                "share_of_ceiling": rate / ceiling,
                "share_of_sustained": rate / sustained,
                "gib": memory,
                "predicted_gib": predicted,
                **more,
            }
        )
        print(
            f"{run.size:>6} {run.representation_name:<14}{how:<11}{speed / 1e6:8.3f} M tokens/s"
            f"  {1e3 * clock.per_step:8.2f} ms  {rate / ceiling:5.1%} of ceiling ({rate / sustained:.1%} of sustained)"
            f"  {memory:5.1f} GiB (of {predicted:.1f})  first step {clock.first:5.1f} s",
            *(f"{key} {value:.4f}" for key, value in more.items()),
            flush=True,
        )

    for size in options.size:
        for name in [*options.representation]:
            run = make_run(size, name, options)
            if name == options.representation[0]:
                print(f"{size}: {run.parameters.non_embedding:,} parameters, {run.tokens_per_step} tokens/step")
            try:
                clock, waited = time_lightning(run, options)
                add(run, "lightning", clock, waited=waited)
                fresh()
                if not options.no_bare:
                    add(run, "bare", loop(bare_step(run, options), options.steps))
                    fresh()
                if options.uncaptured:
                    with patch.dict(os.environ, QPIPE_CAPTURE="0"):
                        clock, waited = time_lightning(run, options)
                    add(run, "uncaptured", clock, waited=waited)
                    fresh()
                if options.profile:
                    folder = Path(options.profile)
                    folder.mkdir(exist_ok=True)
                    stem = folder / f"{size}-{name.replace(':', '-')}"
                    text = profile(bare_step(run, options), stem.with_suffix(".json.gz"))
                    stem.with_suffix(".txt").write_text(text)
                    fresh()
                for how, names in (("reference", options.reference), ("half ref.", options.half_reference)):
                    if name in names:
                        add(run, how, time_reference(run, options, half=how != "reference"))
                        fresh()
            except Exception as error:
                print(f"{size} {name}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
        print(ratios([row for row in rows if row["size"] == size]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
