"""Private steps: what is sampled, clipped and added, that nobody can foresee it, and what a trainer makes of it.

Statistical tests state how often chance alone fails them: at most once in 10^9 runs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, norm
from torch import nn
from torch.utils.data import Dataset

import fedkit
from fedkit import rng
from fedkit.errors import ConfigError, IncompatibleStrategy, Reason, Refused, TaskError
from fedkit.gate import Gate
from fedkit.privacy import clipping
from fedkit.privacy.accounting import Steps
from fedkit.privacy.clipping import ClippedGradients
from fedkit.privacy.dpsgd import NoisyGradients, PrivateSteps
from fedkit.privacy.randomness import Randomness
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.trainer.trainer import Trainer
from fedkit.weights import Weights
from fedkit.work import Evaluate, Fit, Gradient, Update, Work

CHANCE = 1e-9  # of a false alarm, each test
CPU = torch.device("cpu")
ROWS = 40
CLIP = 1.5  # between the lengths of the toy's gradients


def load(client: str) -> fedkit.Data:
    source = torch.Generator().manual_seed(sum(map(ord, client)))
    rows = torch.randn(ROWS, 4, generator=source), torch.randint(3, (ROWS,), generator=source)
    return fedkit.Data(rows, rows, valid=rows)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def task_of(**fields: Any) -> fedkit.Task:
    return fedkit.Task(**{"name": "toy", "model": net, "data": load, "loss": nn.CrossEntropyLoss()} | fields)


def plan_of(work: Fit | Gradient, rows: int = ROWS, noise: float = 0.0, clip: float = CLIP) -> PrivateSteps:
    return PrivateSteps.of(work, rows, noise_multiplier=noise, max_grad_norm=clip)


def at(work: Work, *, returns: str = "update") -> Assignment:
    return Assignment("1", "run", 7, 1, "a", work, returns)


def model_of(task: fedkit.Task) -> Weights:
    return Weights.from_module(task.build(0), task.travels)


def done(
    task: fedkit.Task, work: Fit | Gradient, plan: PrivateSteps | None = None, *, state: Any = None, **extra: Any
) -> tuple[Update, dict[str, Any], Trainer]:
    trainer = Trainer(task, 7, device="cpu")
    model = extra.pop("model", None) or model_of(task)
    update, after = trainer.perform(at(work), Parcel(model, extra), state or {}, plan or plan_of(work))
    return update, after, trainer


def sums_by_hand(task: fedkit.Task, model: Weights, index: torch.Tensor, clip: float) -> Weights:
    """The clipped gradients of these rows, one pass each, added up."""
    module = model.to_module(task.build(0), task.travels)
    x, y = load("a").train.tensors
    total = np.zeros(model.manifest.size)
    for row in index.tolist():
        module.zero_grad()
        task.mean_loss(module, (x[row : row + 1], y[row : row + 1])).backward()
        flat = np.concatenate([p.grad.reshape(-1).numpy() for p in module.parameters()]).astype(np.float64)
        total += flat * min(1.0, clip / np.linalg.norm(flat))
    return model.with_vector(total)


def apart(mine: Weights, theirs: Weights) -> float:
    return float(np.abs((mine - theirs).vector).max() / np.abs(theirs.vector).max())


class Told(Randomness):
    """A sample that the test knows."""

    samples: list[list[int]] = []

    def chosen(self, rows: int, q: float) -> torch.Tensor:
        return torch.tensor(self.samples.pop(0), dtype=torch.int64)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    monkeypatch.setattr("fedkit.privacy.dpsgd.Randomness", Told)
    Told.samples = []
    return Told.samples


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "rows", "steps", "q", "expected"),
    [
        (Fit(epochs=2, batch_size=8), 40, 10, 0.2, 8),
        (Fit(epochs=2, batch_size=32), 40, 4, 0.8, 32),
        (Fit(steps=5, batch_size=64), 40, 5, 1.0, 40),
        (Fit(steps=5, batch_size="all"), 40, 5, 1.0, 40),
        (Gradient(), 98, 1, 1.0, 98),
        (Gradient(batch_size=2), 98, 1, 2 / 98, 2),
    ],
)
def test_a_plan_is_what_the_work_means_on_so_many_rows(work, rows, steps, q, expected) -> None:
    plan = plan_of(work, rows, noise=1.5)
    assert (plan.steps, plan.q, plan.expected_rows) == (steps, q, expected)
    assert plan.cost == Steps(1.5, q, steps)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be a number from 0, got -1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number above 0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1, got 0"),
        ({"steps": 0}, "steps"),
        ({"rows": 0}, "rows"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PrivateSteps(**{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "batch_size": 2, "steps": 1, "rows": 9} | fields)


def test_work_that_cannot_be_private_is_refused() -> None:
    with pytest.raises(IncompatibleStrategy, match="bfloat16"):
        plan_of(Fit(mixed_precision=True))
    with pytest.raises(IncompatibleStrategy, match="quantize_from ties each row"):
        plan_of(Fit(quantize_from=1))
    with pytest.raises(IncompatibleStrategy, match="a gate"):
        plan_of(Fit(gate=Gate(max_norm=1.0)))
    with pytest.raises(ConfigError, match="Evaluate is not done in private steps"):
        Trainer(task_of(), 7, device="cpu").perform(at(Evaluate()), Parcel(model_of(task_of())), {}, plan_of(Fit()))


@pytest.mark.parametrize(
    ("planned", "rows", "said"),
    [
        (Gradient(batch_size=8), 41, "planned for rows 41, but the work has rows 40"),
        (Gradient(batch_size=9), 40, "planned for batch_size 9, but the work has batch_size 8"),
        (Fit(steps=2, batch_size=8), 40, "planned for steps 2, but the work has steps 1"),
    ],
)
def test_another_plan_than_the_work_needs_is_refused_before_anything_is_computed(planned, rows, said) -> None:
    with pytest.raises(Refused, match=said) as refused:
        done(task_of(), Gradient(batch_size=8), plan_of(planned, rows))
    assert refused.value.reason is Reason.PRIVACY


# -- without noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [None, 1, 3, 40])
def test_a_gradient_is_the_clipped_sum_over_the_expected_rows_however_it_is_split(
    monkeypatch: pytest.MonkeyPatch, at_once: int | None
) -> None:
    if at_once is not None:
        monkeypatch.setattr(clipping, "_MOST_ROWS", at_once)
    task, work = task_of(), Gradient()
    update, _, trainer = done(task, work, PrivateSteps(0.0, CLIP, "all", 1, ROWS))
    expected = sums_by_hand(task, model_of(task), torch.arange(ROWS), CLIP)
    assert apart(ROWS * update.weights, expected) <= 1e-5
    assert (update.examples, update.loss) == (ROWS, None)
    assert (trainer.done.steps, trainer.done.sampled) == (1, ROWS)
    assert 0 < trainer.done.clipped < ROWS


def test_sums_are_divided_by_the_expected_rows_whatever_the_sample(told: list[list[int]]) -> None:
    task, work = task_of(), Gradient(batch_size=8)
    told.append([1, 3, 5])
    update, _, _ = done(task, work)
    assert apart(8 * update.weights, sums_by_hand(task, model_of(task), torch.tensor([1, 3, 5]), CLIP)) <= 1e-5


def test_steps_follow_one_another_and_an_empty_one_counts(told: list[list[int]]) -> None:
    task, work = task_of(), Fit(steps=3, batch_size=8, lr=0.3)
    samples = [[1, 3, 5], [], [0, 39]]
    told.extend(list(map(list, samples)))
    update, _, trainer = done(task, work)
    model = model_of(task)
    for sample in samples:
        if sample:
            model = model - 0.3 / 8 * sums_by_hand(task, model, torch.tensor(sample), CLIP)
    assert apart(update.weights, model - model_of(task)) <= 1e-5
    assert (trainer.done.steps, trainer.done.sampled, update.loss) == (3, 5, None)


def test_an_empty_step_adds_noise_and_moves_momentum(told: list[list[int]]) -> None:
    told.append([])
    update, _, trainer = done(task_of(), Gradient(batch_size=8), plan_of(Gradient(batch_size=8), noise=1.0))
    assert update.weights.vector.all()
    assert (trainer.done.steps, trainer.done.sampled, trainer.done.clipped) == (1, 0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_rows_without_a_finite_gradient_contribute_nothing(bad: float) -> None:
    def broken(client: str) -> fedkit.Data:
        x, y = load(client).train.tensors
        x = x.clone()
        x[[3, 17]] = bad
        return fedkit.Data((x, y))

    update, _, trainer = done(task_of(data=broken, model=lambda: nn.Linear(4, 3)), Gradient())
    task = task_of(model=lambda: nn.Linear(4, 3))
    others = torch.tensor([row for row in range(ROWS) if row not in (3, 17)])
    assert apart(ROWS * update.weights, sums_by_hand(task, model_of(task), others, CLIP)) <= 1e-5
    assert trainer.done.clipped >= 2


def test_a_model_that_is_not_finite_brings_noise_alone() -> None:
    task, work = task_of(), Gradient()
    model = model_of(task)
    update, _, trainer = done(task, work, plan_of(work, noise=1.0), model=model * float("nan"))
    assert update.weights.is_finite()
    assert trainer.done.clipped == ROWS


class Dicts(Dataset[Any]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = load("a").train.tensors
        return {"x": x[index], "y": y[index]}


def test_rows_of_any_kind_are_trained_by_a_step_of_ones_own(told: list[list[int]]) -> None:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    told.append([2, 4, 7])
    task = task_of(loss=None, step=step, data=lambda client: fedkit.Data(Dicts()))
    update, _, _ = done(task, Gradient(batch_size=8))
    plain = task_of()
    assert apart(8 * update.weights, sums_by_hand(plain, model_of(plain), torch.tensor([2, 4, 7]), CLIP)) <= 1e-5


class Augmented(Dicts):
    """Rows that are changed at random whenever they are read."""

    def __getitem__(self, index: int) -> Any:
        x, y = load("a").train.tensors
        return x[index] + torch.randn(4), y[index]


def test_rows_that_are_augmented_at_random_prove_that_they_do_not_mix() -> None:
    first, second = (done(task_of(data=lambda client: fedkit.Data(Augmented())), Gradient())[0] for _ in range(2))
    assert first.weights != second.weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_computes_the_same_and_adds_the_same_noise() -> None:
    task, work = task_of(), Gradient()
    trainer, model = Trainer(task, 7, device="cuda"), model_of(task)
    update = trainer.perform(at(work), Parcel(model), {}, plan_of(work))[0]
    assert apart(ROWS * update.weights, sums_by_hand(task, model, torch.arange(ROWS), CLIP)) <= 1e-4
    found = Randomness().normal(100_000, "cuda")
    assert found.device.type == "cuda"
    assert chi2.ppf(CHANCE / 2, len(found)) < float(found.square().sum()) < chi2.isf(CHANCE / 2, len(found))


# -- what strategies add -----------------------------------------------------------------------------------------------


def test_the_proximal_pull_is_added_after_the_clip(told: list[list[int]]) -> None:
    task, work = task_of(), Fit(steps=2, batch_size=8, lr=0.3, proximal=0.7)
    told.extend([[1, 3, 5], [2, 39]])
    update, _, _ = done(task, work)
    start = model = model_of(task)
    for sample in ([1, 3, 5], [2, 39]):
        gradient = (1 / 8) * sums_by_hand(task, model, torch.tensor(sample), CLIP) + 0.7 * (model - start)
        model = model - 0.3 * gradient
    assert apart(update.weights, model - start) <= 1e-5


def test_control_variates_are_made_of_noisy_updates() -> None:
    task, work = task_of(), Fit(steps=2, batch_size=8, lr=0.3, control_variates=True)
    zeros = np.zeros(model_of(task).manifest.size, dtype=np.float32)
    update, state, _ = done(task, work, plan_of(work, noise=1.0), control=zeros)
    assert np.allclose(state["control"], -update.weights.vector / (2 * 0.3), atol=1e-5)
    assert np.array_equal(update.extra["control"], state["control"])


def test_parameters_that_stay_are_clipped_and_noised_like_those_that_travel() -> None:
    task, work = task_of(exchange=lambda name: name.startswith("0.")), Fit(steps=1, batch_size="all", lr=1.0)
    module = task.build(7)  # as the trainer's, whose own tensors are those that stay
    start = {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}
    update, state, _ = done(task, work, model=Weights.from_module(module, task.travels))
    both = done(task_of(), work, model=Weights.from_module(module))[0].weights
    assert np.allclose(update.weights.vector, both.vector[: update.weights.manifest.size], atol=1e-6)
    assert set(state) == {"local/2.weight", "local/2.bias"}
    assert np.allclose(state["local/2.weight"] - start["2.weight"], both["2.weight"], atol=1e-6)
    noisy = done(task, work, plan_of(work, noise=1.0), model=Weights.from_module(module, task.travels))[1]
    assert (noisy["local/2.weight"] != state["local/2.weight"]).all()


def test_a_trainer_that_was_private_is_as_it_was() -> None:
    task = task_of()
    trainer = Trainer(task, 7, device="cpu")
    model, work = model_of(task), Fit(steps=2, batch_size=8, lr=0.1)
    before = trainer.perform(at(work), Parcel(model), {})[0]
    trainer.perform(at(work), Parcel(model), {}, plan_of(work, noise=1.0))
    after = trainer.perform(at(work), Parcel(model), {})[0]
    assert after.weights == before.weights
    assert after.loss == before.loss is not None


def test_work_that_is_called_off_says_how_far_it_came() -> None:
    def watch(begun: int, of: int) -> None:
        assert of == 9
        if begun == 4:
            raise InterruptedError

    trainer, work = Trainer(task_of(), 7, device="cpu", watch=watch), Fit(steps=9, batch_size=8)
    with pytest.raises(InterruptedError):
        trainer.perform(at(work), Parcel(model_of(task_of())), {}, plan_of(work))
    assert trainer.done.steps == 4
    assert not any(part._forward_hooks for part in trainer._module.modules())


def test_a_model_that_cannot_be_private_is_refused_at_the_client_too() -> None:
    task = task_of(model=lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    with pytest.raises(IncompatibleStrategy, match=r"fedkit\.privacy\.fix"):
        done(task, Gradient())
    mixing = task_of(loss=lambda out, t: nn.functional.cross_entropy(out - out.mean(), t))
    done(mixing, Gradient())  # the criterion sees each row alone, so it cannot mix them
    summed = task_of(loss=None, step=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="sum"))
    with pytest.raises(TaskError, match="rows in one batch do not"):
        done(summed, Gradient())


def test_a_device_without_float64_is_refused() -> None:
    task = task_of()
    clipped = ClippedGradients(task, task.build(0))
    data = load("a")
    with pytest.raises(ConfigError, match="use cpu or cuda"):
        NoisyGradients(clipped, plan_of(Gradient()), data, data.train, torch.device("mps"))


# -- randomness --------------------------------------------------------------------------------------------------------


def noise_of(count: int, sigma: float, clip: float, batch_size: int) -> torch.Tensor:
    """The noise alone, as it is sent: a model whose gradients are all zero."""
    task = task_of(
        model=lambda: nn.Linear(count, 2, bias=False),
        data=lambda client: fedkit.Data((torch.zeros(ROWS, count), torch.zeros(ROWS, dtype=torch.int64))),
    )
    work = Gradient(batch_size=batch_size)
    update, _, _ = done(task, work, plan_of(work, noise=sigma, clip=clip))
    return torch.from_numpy(update.weights.vector.astype(np.float64))


def test_the_noise_has_the_planned_deviation_and_is_normal() -> None:
    """Bounds of the chi-squared and normal distributions, each at a quarter of the chance."""
    found = noise_of(50_000, sigma=1.7, clip=0.3, batch_size=8) * 8 / (1.7 * 0.3)
    count, share = len(found), CHANCE / 4
    assert chi2.ppf(share / 2, count) < float(found.square().sum()) < chi2.isf(share / 2, count)
    assert abs(float(found.mean())) * math.sqrt(count) < norm.isf(share / 2)
    within = int((found.abs() < 1.0).sum())
    middle = norm.cdf(1.0) - norm.cdf(-1.0)
    assert binom.ppf(share / 2, count, middle) <= within <= binom.isf(share / 2, count, middle)
    halves = float(found[::2] @ found[1::2]) / math.sqrt(count / 2)  # of independent numbers about normal
    assert abs(halves) < 1.1 * norm.isf(share / 2)


def test_normal_numbers_are_normal_in_their_tails() -> None:
    """Kolmogorov's distance; P(D > x / sqrt(n)) <= 2 exp(-2 x²) (Dvoretzky, Kiefer, Wolfowitz; Massart 1990)."""
    found = np.sort(Randomness().normal(200_001).numpy())
    share = np.arange(len(found) + 1) / len(found)
    cdf = norm.cdf(found)
    distance = max(np.abs(cdf - share[1:]).max(), np.abs(cdf - share[:-1]).max())
    assert distance < math.sqrt(math.log(2 / CHANCE) / 2 / len(found))
    assert np.abs(found).max() < 8.5
    assert found.dtype == np.float64


@pytest.mark.parametrize(("rows", "q"), [(50, 0.1), (2000, 0.013), (7, 0.9)])
def test_sample_sizes_are_binomial_and_each_row_is_as_likely(rows: int, q: float) -> None:
    draws, source = 3000, Randomness()
    samples = [source.chosen(rows, q) for _ in range(draws)]
    sizes = np.array([len(sample) for sample in samples])
    total, share = draws * rows, CHANCE / 3
    assert binom.ppf(share / 2, total, q) <= sizes.sum() <= binom.isf(share / 2, total, q)
    empty = (1 - q) ** rows
    assert binom.ppf(share / 2, draws, empty) <= (sizes == 0).sum() <= binom.isf(share / 2, draws, empty)
    counts = np.bincount(torch.cat(samples).numpy(), minlength=rows)
    assert binom.ppf(share / 2 / rows, draws, q) <= counts.min()
    assert counts.max() <= binom.isf(share / 2 / rows, draws, q)


def test_a_sample_of_all_is_every_row_and_of_none_is_empty() -> None:
    source = Randomness()
    assert source.chosen(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert source.chosen(5, 0.0).tolist() == []
    assert source.chosen(0, 0.5).tolist() == []
    assert len(source.normal(0)) == 0
    assert len(source.normal(7)) == 7


def test_long_draws_do_not_repeat_themselves() -> None:
    words = Randomness()._words(100_000)
    assert len(torch.unique(words)) == len(words)  # by chance two are equal once in 10^9 such draws


def test_two_runs_with_one_seed_draw_other_batches_and_other_noise() -> None:
    """Equal samples of 4,000 rows at q = 1/2 have a chance of 2^-4000."""
    drawn = []
    for _ in range(2):
        rng.seed_all(7)
        source = Randomness()
        drawn.append((source.chosen(4000, 0.5), source.normal(20)))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert not (drawn[0][1] == drawn[1][1]).any()
    task, work = task_of(), Fit(steps=2, batch_size=8, lr=0.1)
    silent = [done(task, work)[0].weights for _ in range(4)]  # no noise: the batches alone differ
    assert len(set(silent)) == 4
    whole = Fit(steps=1, batch_size="all", lr=0.1)
    noisy = [done(task, whole, plan_of(whole, noise=1.0))[0].weights for _ in range(2)]  # the noise alone
    assert not (noisy[0].vector == noisy[1].vector).all()


def test_dropout_is_not_drawn_from_the_seed_of_the_run() -> None:
    task = task_of(model=lambda: nn.Sequential(nn.Linear(4, 60), nn.Dropout(0.5), nn.Linear(60, 3)))
    found = [done(task, Gradient())[0].weights for _ in range(2)]  # every row, no noise: only the masks differ
    assert found[0] != found[1]


def test_torch_keeps_32_bits_of_a_seed_on_a_cpu_so_that_it_must_not_make_the_noise() -> None:
    first, second = (torch.randn(9, generator=torch.Generator().manual_seed(s)) for s in (7, 7 + (5 << 32)))
    if not torch.equal(first, second):
        pytest.skip("this version of torch keeps more")
    assert len({Randomness().seed() >> 32 for _ in range(5)}) == 5
