"""Each row's gradient, clipped and summed: by every way the same as by a loop over single rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fedkit
from bench.dp_steps import Ghost
from fedkit.errors import TaskError
from fedkit.privacy import fix
from fedkit.privacy.clipping import BookKeeping, Clipped, ClippedGradients, Hooks, NotKept, row_losses

ROWS = 7
CLOSE = 1e-5


def seeded(shape: tuple[int, ...], seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Words(nn.Module):
    """An embedding, a sequence layer, norms, and a mean over the positions."""

    def __init__(self, length: int = 5, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=padding)
        self.norm = nn.LayerNorm(6)
        self.dense = nn.Linear(6, 8)
        self.rms = nn.RMSNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.rms(torch.tanh(self.dense(self.norm(self.embed(words))))).mean(1))


class Twice(nn.Module):
    """One layer used twice, and one weight under two names."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4) if tied else self.first
        if tied:
            self.second.weight = self.first.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Scaled(nn.Module):
    """A parameter of its own, which no recipe knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 1.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x * self.scale)


class InPlaceSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h += x
        h = torch.relu_(self.second(h))
        return self.out(h)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def pooled(*layers: nn.Module, channels: int, dims: int) -> nn.Module:
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims](1)
    return nn.Sequential(*layers, nn.Tanh(), pool, nn.Flatten(), nn.Linear(channels, 3))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def lstm() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    return fix(Last())


WORDS = torch.randint(9, (ROWS, 5), generator=torch.Generator().manual_seed(1))
CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, str]] = {
    "linear": (lambda: nn.Linear(4, 3), seeded((ROWS, 4)), "BookKeeping"),
    "without bias": (lambda: nn.Linear(4, 3, bias=False), seeded((ROWS, 4)), "BookKeeping"),
    "frozen parts": (frozen, seeded((ROWS, 4)), "BookKeeping"),
    "unused layer": (Unused, seeded((ROWS, 4)), "BookKeeping"),
    "changed in place": (InPlaceSum, seeded((ROWS, 4)), "BookKeeping"),
    "long sequence": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Flatten(), nn.Linear(60, 3)),
        seeded((ROWS, 20, 2)),
        "BookKeeping",
    ),
    "two sequence dimensions": (
        lambda: nn.Sequential(nn.Linear(12, 13), nn.Tanh(), nn.Flatten(), nn.Linear(78, 3)),
        seeded((ROWS, 2, 3, 12)),
        "BookKeeping",
    ),
    "words": (Words, WORDS, "BookKeeping"),
    "padded words": (lambda: Words(padding=int(WORDS[0, 0])), WORDS, "BookKeeping"),
    "conv, few positions": (
        lambda: pooled(nn.Conv2d(6, 8, 3, stride=2), channels=8, dims=2),
        seeded((ROWS, 6, 7, 7)),
        "BookKeeping",
    ),
    "conv, many positions": (
        lambda: pooled(nn.Conv2d(2, 4, 3, padding="same"), channels=4, dims=2),
        seeded((ROWS, 2, 12, 11)),
        "BookKeeping",
    ),
    "conv, all settings": (
        lambda: pooled(
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2), channels=6, dims=2
        ),
        seeded((ROWS, 4, 9, 8)),
        "BookKeeping",
    ),
    "conv, circular, few positions": (
        lambda: pooled(nn.Conv2d(8, 8, 3, stride=3, padding=1, padding_mode="circular", groups=4), channels=8, dims=2),
        seeded((ROWS, 8, 5, 5)),
        "BookKeeping",
    ),
    "depthwise": (
        lambda: pooled(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), channels=8, dims=2),
        seeded((ROWS, 4, 6, 6)),
        "BookKeeping",
    ),
    "conv1d": (
        lambda: pooled(nn.Conv1d(3, 5, 4, padding="same", dilation=2), channels=5, dims=1),
        seeded((ROWS, 3, 11)),
        "BookKeeping",
    ),
    "conv3d": (
        lambda: pooled(nn.Conv3d(2, 3, 2, padding=1), channels=3, dims=3),
        seeded((ROWS, 2, 4, 3, 5)),
        "BookKeeping",
    ),
    "group norm": (
        lambda: pooled(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), channels=6, dims=2),
        seeded((ROWS, 2, 6, 6)),
        "BookKeeping",
    ),
    "instance norm": (
        lambda: pooled(nn.Conv1d(2, 6, 3), nn.InstanceNorm1d(6, affine=True), channels=6, dims=1),
        seeded((ROWS, 2, 8)),
        "BookKeeping",
    ),
    "layer norm over two dimensions": (
        lambda: nn.Sequential(nn.LayerNorm((2, 4)), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
        seeded((ROWS, 2, 4)),
        "BookKeeping",
    ),
    "fixed batch norm": (
        lambda: fix(pooled(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), channels=6, dims=2)),
        seeded((ROWS, 2, 6, 6)),
        "BookKeeping",
    ),
    "layer used twice": (lambda: Twice(tied=False), seeded((ROWS, 4)), "Hooks"),
    "tied weights": (lambda: Twice(tied=True), seeded((ROWS, 4)), "Hooks"),
    "own parameter": (lambda: nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 3)), seeded((ROWS, 4)), "Hooks"),
    "transposed convolution": (
        lambda: pooled(nn.ConvTranspose2d(2, 4, 3), channels=4, dims=2),
        seeded((ROWS, 2, 4, 4)),
        "Hooks",
    ),
    "fixed LSTM": (lstm, seeded((ROWS, 4, 4)), "Hooks"),
}
TARGETS = torch.randint(3, (ROWS,), generator=torch.Generator().manual_seed(2))


def task_of(model: Callable[[], nn.Module], **fields: Any) -> fedkit.Task:
    settings = {"name": "toy", "model": model, "data": lambda client: None, "loss": nn.CrossEntropyLoss()}
    return fedkit.Task(**settings | fields)


def one_by_one(
    task: fedkit.Task, module: nn.Module, batch: Any, clip: float
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The naive loop: a pass a row, clipped, added up in float64."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    sums, norms = [torch.zeros_like(p, dtype=torch.float64) for p in parameters], []
    for row in range(len(batch[0])):
        loss = task.mean_loss(module, tuple(column[row : row + 1] for column in batch))
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        norm = sum(g.double().square().sum() for g in grads).sqrt()
        for total, grad in zip(sums, grads, strict=True):
            total += grad * min(1.0, clip / float(norm))
        norms.append(norm)
    return sums, torch.stack(norms)


def assert_same(found: Clipped, expected: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    sums, norms = expected
    assert torch.allclose(found.norms, norms, rtol=CLOSE, atol=0)
    scale = max(float(total.abs().max()) for total in sums)
    for mine, theirs in zip(found.sums, sums, strict=True):
        assert float((mine - theirs).abs().max()) <= CLOSE * scale


def clip_between(task: fedkit.Task, module: nn.Module, batch: Any) -> float:
    """A clip that is shorter than some of the gradients and longer than the others."""
    return float(one_by_one(task, module, batch, 1.0)[1].median())


@pytest.mark.parametrize("name", CASES)
def test_every_layer_gives_what_a_loop_over_single_rows_gives(name: str) -> None:
    make, inputs, way = CASES[name]
    task, batch = task_of(make), (inputs, TARGETS)
    module = task.build(0)
    clip = clip_between(task, module, batch)
    clipped = ClippedGradients(task, module)
    with clipped:
        clipped.prove(lambda chosen: (inputs[chosen], TARGETS[chosen]), ROWS)
        found = clipped.sums(batch, ROWS, clip)
    assert_same(found, one_by_one(task, module, batch, clip))
    assert clipped.way == way


NOT_BY_OPACUS = {
    "conv, circular, few positions",
    "padded words",
    "changed in place",
}  # it takes zeros, trains the padding, and raises


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("conv")])
def test_windows_of_a_few_rows_at_a_time_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedkit.privacy.layers._CHUNK", 1)
    test_every_layer_gives_what_a_loop_over_single_rows_gives(name)


@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_BY_OPACUS))
def test_opacus_hooks_give_the_same(name: str) -> None:
    make, inputs, _ = CASES[name]
    task, batch = task_of(make), (inputs, TARGETS)
    module = task.build(0)
    clip = clip_between(task, module, batch)
    with Hooks(module) as hooks:
        found = hooks.sums(row_losses(task, module), batch, ROWS, clip)
    assert_same(found, one_by_one(task, module, batch, clip))


def test_the_ghost_clipping_that_the_bench_measures_gives_the_same() -> None:
    for name in ("conv, many positions", "linear"):
        make, inputs, _ = CASES[name]
        task, batch = task_of(make), (inputs, TARGETS)
        module = task.build(0)
        with Ghost(module) as ghost:
            found = ghost.sums(row_losses(task, module), batch, ROWS, 1.0)
        assert_same(found, one_by_one(task, module, batch, 1.0))


def test_a_way_can_be_attached_again_and_leaves_nothing_behind() -> None:
    task = task_of(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    module = task.build(0)
    before = {name: set(vars(part)) for name, part in module.named_modules()}
    names = list(module.state_dict())
    for way in (Hooks(module), BookKeeping(module), Hooks(module)):
        for _ in range(2):
            with way:
                way.sums(row_losses(task, module), (seeded((ROWS, 4)), TARGETS), ROWS, 1.0)
    assert list(module.state_dict()) == names
    assert {name: set(vars(part)) for name, part in module.named_modules()} == before
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in module.parameters())
    assert not any(part._forward_hooks or part._backward_hooks for part in module.modules())


LOSSES: dict[str, tuple[Any, torch.Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), TARGETS),
    "some rows ignored": (nn.CrossEntropyLoss(ignore_index=1), TARGETS.where(TARGETS != 1, 2)),
    "shares of classes": (nn.CrossEntropyLoss(), torch.softmax(seeded((ROWS, 3), 9), 1)),
    "squares": (nn.MSELoss(), seeded((ROWS, 3), 5)),
    "squares of other shape": (nn.MSELoss(), seeded((ROWS, 1, 3), 5)),
    "logits": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0])), (seeded((ROWS, 3), 5) > 0).float()),
    "weighted logits": (nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 2.0, 3.0])), torch.ones(ROWS, 3)),
    "absolute": (nn.L1Loss(), seeded((ROWS, 3), 5)),
    "of one's own": (lambda out, t: (out.softmax(1)[:, 0] - t[:, 0]).abs().mean(), seeded((ROWS, 3), 5)),
    "looks at values": (
        lambda out, t: out.mean() * 3 if float(t.sum()) > 0 else out.square().mean(),
        seeded((ROWS, 3)),
    ),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", LOSSES)
def test_each_row_has_the_loss_that_it_has_alone(name: str) -> None:
    loss, targets = LOSSES[name]
    task, batch = task_of(lambda: nn.Linear(4, 3), loss=loss), (seeded((ROWS, 4)), targets)
    module = task.build(0)
    with ClippedGradients(task, module) as clipped:
        clipped.prove(lambda chosen: (batch[0][chosen], targets[chosen]), ROWS)
        found = clipped.sums(batch, ROWS, 0.7)
    assert_same(found, one_by_one(task, module, batch, 0.7))


def test_a_row_of_many_labels_has_the_mean_of_those_that_are_not_ignored() -> None:
    targets = torch.randint(3, (ROWS, 5), generator=torch.Generator().manual_seed(4))
    targets[0, :3] = -100
    task = task_of(lambda: nn.Sequential(nn.Linear(4, 15), nn.Unflatten(1, (3, 5))))
    module, batch = task.build(0), (seeded((ROWS, 4)), targets)
    with ClippedGradients(task, module) as clipped:
        found = clipped.sums(batch, ROWS, 0.7)
    assert_same(found, one_by_one(task, module, batch, 0.7))


def stepped(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]) + model(2 * batch[0]), batch[1])


def test_a_step_of_ones_own_may_use_the_model_twice() -> None:
    task, batch = task_of(lambda: nn.Linear(4, 3), loss=None, step=stepped), (seeded((ROWS, 4)), TARGETS)
    module = task.build(0)
    with ClippedGradients(task, module) as clipped:
        found = clipped.sums(batch, ROWS, 0.5)
    assert_same(found, one_by_one(task, module, batch, 0.5))
    assert clipped.way == "Hooks"


class Centred(nn.Module):
    """Rows minus the mean of their batch."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x - x.mean(0))


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.first(x)) @ self.first.weight)


class Flat(nn.Module):
    """Puts positions and rows into one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x.reshape(-1, 4)).reshape(len(x), -1, 3).mean(1)


def by_words(model: nn.Module, batch: Any) -> torch.Tensor:
    """The mean over all words of all rows: rows of few words have a smaller share of it."""
    words = model(batch[0])
    mask = torch.arange(words.shape[1]) <= batch[1].unsqueeze(1)
    return (words.square().sum(2) * mask).sum() / mask.sum()


def summed(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize(
    ("model", "fields", "inputs"),
    [
        (Centred, {}, seeded((ROWS, 4))),
        (Functional, {}, seeded((ROWS, 4))),
        (lambda: nn.Linear(4, 3), {"loss": None, "step": summed}, seeded((ROWS, 4))),
        (lambda: nn.Linear(4, 3), {"loss": None, "step": by_words}, seeded((ROWS, 3, 4))),
    ],
    ids=["mixes rows", "weights used elsewhere", "sum of the rows", "mean of the words"],
)
def test_rows_that_depend_on_each_other_are_refused_before_the_first_step(model, fields, inputs) -> None:
    task = task_of(model, **fields)
    with ClippedGradients(task, task.build(0)) as clipped, pytest.raises(TaskError, match="rows in one batch do not"):
        clipped.prove(lambda chosen: (inputs[chosen], TARGETS[chosen]), ROWS)


def test_rows_that_are_not_in_the_first_dimension_are_refused() -> None:
    task = task_of(Flat)
    with ClippedGradients(task, task.build(0)) as clipped, pytest.raises(TaskError, match="first dimension"):
        clipped.sums((seeded((ROWS, 2, 4)), TARGETS), ROWS, 1.0)


class Counting(nn.Module):
    def __init__(self, *, anew: bool) -> None:
        super().__init__()
        self.anew = anew
        self.register_buffer("seen", torch.zeros(4))
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.anew:
            self.seen = self.seen + x.detach().sum(0)
        else:
            self.seen += x.detach().sum(0)
        return self.out(x)


@pytest.mark.parametrize("anew", [True, False])
def test_a_pass_that_changes_a_buffer_is_refused(anew: bool) -> None:
    task = task_of(lambda: Counting(anew=anew))
    with ClippedGradients(task, task.build(0)) as clipped, pytest.raises(TaskError, match=r"buffers \(seen\)"):
        clipped.sums((seeded((ROWS, 4)), TARGETS), ROWS, 1.0)


def test_dropout_does_not_stand_in_the_way_of_the_proof_and_is_on_afterwards() -> None:
    task = task_of(lambda: nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)))
    module, inputs = task.build(0), seeded((ROWS, 4))
    with ClippedGradients(task, module) as clipped:
        clipped.prove(lambda chosen: (inputs[chosen], TARGETS[chosen]), ROWS)
        assert all(part.training for part in module.modules())
        first, second = (clipped.sums((inputs, TARGETS), ROWS, 1.0) for _ in range(2))
    assert not torch.equal(first.norms, second.norms)


def test_rows_without_finite_gradients_prove_nothing_and_are_no_mistake() -> None:
    task = task_of(lambda: nn.Linear(4, 3))
    nan = torch.full((ROWS, 4), float("nan"))
    with ClippedGradients(task, task.build(0)) as clipped:
        clipped.prove(lambda chosen: (nan[chosen], TARGETS[chosen]), ROWS)
        assert not clipped.sums((nan, TARGETS), ROWS, 1.0).norms.isfinite().any()


def test_an_input_that_is_changed_after_its_layer_is_not_kept() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.out(x)
            x.mul_(2)
            return found

    task = task_of(Late)
    module = task.build(0)
    with BookKeeping(module) as way, contextlib.suppress(RuntimeError), pytest.raises(NotKept, match="in place"):
        way.sums(row_losses(task, module), (seeded((ROWS, 4)), TARGETS), ROWS, 1.0)


def test_the_physical_batch_is_as_large_as_memory_allows() -> None:
    task = task_of(lambda: nn.Linear(4, 3))
    with ClippedGradients(task, task.build(0)) as clipped:
        assert clipped.most_rows == 1
        clipped.sums((seeded((ROWS, 4)), TARGETS), ROWS, 1.0)
        assert clipped.most_rows == 256
