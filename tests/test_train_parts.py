"""Schedule, order of the data, validation windows, parameter groups: pure functions against independent oracles."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import make_store, small_run, small_shape

from qpipe.corpus.store import TokenStore
from qpipe.errors import QpipeError
from qpipe.formats import resolve
from qpipe.memory import sequences_at_once
from qpipe.model import Decoder
from qpipe.recipe import QUEST, TINY
from qpipe.train.data import Batches, BatchStream, permute
from qpipe.train.schedule import learning_rate
from qpipe.train.seeds import step_seed
from qpipe.train.step import TrainingStep, make_optimizer, parameter_groups
from qpipe.train.validation import Validation, all_windows, some_windows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data") / "tokens")


@pytest.mark.parametrize("steps", [20, 199, 1000])
@pytest.mark.parametrize("warmup", [0.1, 0.25])
def test_cosine_equals_one_cycle(steps: int, warmup: float) -> None:
    training = QUEST.training("30M").model_copy(update={"warmup_fraction": warmup})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=training.learning_rate,
        total_steps=steps,
        pct_start=warmup,
        div_factor=100,
        final_div_factor=0.1,
        cycle_momentum=False,
    )
    for step in range(steps):
        assert learning_rate(training, step, steps) == pytest.approx(oracle.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        if step < steps - 1:
            oracle.step()
    assert learning_rate(training, steps - 1, steps) == pytest.approx(1.2e-4)


def test_wsd_warms_up_holds_and_decays_linearly() -> None:
    training = TINY.training("1M").model_copy(update={"schedule": "wsd", "decay_fraction": 0.2, "final_fraction": 0.05})
    rates = np.array([learning_rate(training, step, 100) for step in range(100)]) / training.learning_rate
    assert rates[0] == pytest.approx(0.01)
    assert np.all(np.diff(rates[:10]) > 0)
    assert rates[10:80] == pytest.approx(1.0)
    assert np.diff(rates[79:]) == pytest.approx(-0.95 / 20)
    assert rates[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 5, 11])
def test_short_runs_have_a_finite_schedule(schedule: str, warmup: float, steps: int) -> None:
    training = TINY.training("1M").model_copy(update={"schedule": schedule, "warmup_fraction": warmup})
    peak = training.learning_rate
    assert all(0 < learning_rate(training, step, steps) <= peak * (1 + 1e-12) for step in range(steps))


@given(size=st.integers(1, 400), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_is_one(size: int, key: int) -> None:
    found = permute(np.arange(size, dtype=np.uint64), size, np.full(size, key, np.uint64))
    assert sorted(found.tolist()) == list(range(size))


def test_permutations_look_random() -> None:
    """Over many keys each element comes evenly to each place, and pairs to pairs of places (chi-square, 5 sigma)."""
    size, keys = 10, 20_000
    place = np.tile(np.arange(size, dtype=np.uint64), keys)
    found = permute(place, size, np.repeat(np.arange(keys, dtype=np.uint64), size)).astype(int).reshape(keys, size)
    for place_of in range(size):
        counts = np.bincount(found[:, place_of], minlength=size)
        chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
        assert chi_square < (size - 1) + 5 * np.sqrt(2 * (size - 1))
    pairs = Counter(zip(found[:, 0].tolist(), found[:, 1].tolist(), strict=True))
    expected = keys / (size * (size - 1))
    chi_square = sum((count - expected) ** 2 / expected for count in pairs.values())
    assert len(pairs) == size * (size - 1)
    assert chi_square < 89 + 5 * np.sqrt(2 * 89)


def test_batches_visit_every_window_once_an_epoch(store: TokenStore) -> None:
    batches = Batches(store.train, context=16, size=7, seed=5)
    windows = len(store.train) // 17
    assert batches.windows == windows
    seen = np.concatenate([batches.order(step) for step in range(2 * windows // 7 + 1)])
    first, second = seen[:windows], seen[windows : 2 * windows]
    assert sorted(first) == sorted(second) == list(range(windows))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[:7], Batches(store.train, context=16, size=7, seed=6).order(0))


def test_batches_hold_the_tokens_of_their_windows(store: TokenStore) -> None:
    batches = Batches(store.train, context=16, size=8, seed=0)
    everything = store.train.read(0, len(store.train)).astype(np.int64)
    for step in (0, 3, 1000):
        expected = [everything[17 * window : 17 * window + 17] for window in batches.order(step)]
        assert np.array_equal(batches.read(step), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_global_batch(store: TokenStore, processes: int) -> None:
    batches = Batches(store.train, context=16, size=8, seed=0)
    parts = [batches.read(9, rank, processes) for rank in range(processes)]
    assert np.array_equal(np.concatenate(parts), batches.read(9))


def test_stream_starts_anywhere_and_reads_ahead(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # there may be no GPU to pin for
    batches = Batches(store.train, context=16, size=8, seed=0)
    for prefetch in (False, True):
        found = list(BatchStream(batches, start=5, stop=16, prefetch=prefetch))
        assert len(found) == 11
        assert all(np.array_equal(part, batches.read(5 + number)) for number, part in enumerate(found))


def test_too_short_splits_are_refused(store: TokenStore) -> None:
    with pytest.raises(QpipeError, match=r"training split has 5,000 tokens, one sequence needs 6,001"):
        Batches(store.train, context=6000, size=8, seed=0)
    with pytest.raises(QpipeError, match=r"validation split has 10 tokens, one sequence needs 17"):
        all_windows(10, 16)


@given(tokens=st.integers(2, 200), context=st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_validation_predicts_each_token_once(tokens: int, context: int) -> None:
    if tokens < context + 1:
        return
    windows = all_windows(tokens, context)
    predicted: list[int] = []
    for start, counted in zip(windows.starts.tolist(), windows.counted.tolist(), strict=True):
        assert start >= 0
        assert start + context + 1 <= tokens
        targets = range(start + 1, start + context + 1)
        predicted.extend(targets[context - counted :])
    assert predicted == list(range(1, tokens))
    assert windows.tokens == tokens - 1


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_validation_loss_equals_a_loop_over_tokens(store: TokenStore, batch: int) -> None:
    decoder = Decoder(small_shape(), resolve("dense"))
    decoder.initialize(0)
    validation = Validation(store.validation, 16, batch, "fp32", seed=0)
    tokens = torch.from_numpy(store.validation.read(0, len(store.validation)).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for target in range(1, len(tokens)):
            start = min((target - 1) // 16 * 16, len(tokens) - 17)
            logits = decoder(tokens[None, start:target])[0, -1].double()
            total -= torch.log_softmax(logits, -1)[tokens[target]].item()
    found = validation.loss(decoder, validation.windows)
    assert found == pytest.approx(total / (len(tokens) - 1), rel=1e-6)


def test_part_of_the_windows_is_spread_over_all() -> None:
    windows = all_windows(16 * 100 + 1, 16)
    assert some_windows(windows, 4).starts.tolist() == [0, 33 * 16, 66 * 16, 99 * 16]
    assert some_windows(windows, 1000).tokens == windows.tokens


def test_weight_decay_is_for_linear_weights_of_blocks_only() -> None:
    decoder = Decoder(small_shape(), resolve("w4-lsq"))
    decayed, others = parameter_groups(decoder, TINY.training("1M"))
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed["params"]} == {"qkv", "out", "gate_up", "down"}
    assert all(names[id(p)].endswith(".weight") for p in decayed["params"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    rest = {names[id(p)] for p in others["params"]}
    assert {"embedding.weight", "head.weight", "norm.weight", "blocks.0.attention.qkv.weight_scale"} <= rest
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_a_parameter_without_a_gradient_is_noticed_in_the_first_step() -> None:
    run = small_run("w2-lsq")
    model = Decoder(run.shape, run.format_spec)
    model.initialize(0)
    model.blocks[1].attention.forgotten = torch.nn.Parameter(torch.ones(3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "scale" not in name}
    step, tokens = TrainingStep(model, run, 4, single=True), torch.randint(0, 64, (4, 17))
    with pytest.raises(RuntimeError, match=r"at 1 of \d+ parameters, at blocks\.1\.attention\.forgotten"):
        step(tokens, 0, make_optimizer(model, run.training))
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)


def test_step_seeds_are_pure_and_distinct() -> None:
    seeds = {step_seed(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500
    assert step_seed(3, 4) == step_seed(3, 4)


@pytest.mark.parametrize("size", list(QUEST.rungs))
def test_micro_batches_divide_the_batch(size: str) -> None:
    shape = QUEST.shape(size, 32_000)
    count = sequences_at_once(shape, 512)
    assert 512 % count == 0
    assert 8192 <= count * shape.context <= 32768
    assert sequences_at_once(small_run().shape, 8) == 8
