"""`fedkit privacy audit`."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedkit.cli import show
from fedkit.config import DP, Privacy
from fedkit.demo import compare, heart
from fedkit.errors import ConfigError
from fedkit.privacy.audit import Inversion, Members, Membership, allowed_advantage, canaries, inversion, membership
from fedkit.privacy.dpsgd import PrivateSteps
from fedkit.privacy.onerun import Bound
from fedkit.privacy.plan import planned
from fedkit.registry import find_task, import_task
from fedkit.rounds.assignment import Private
from fedkit.simulation import simulate
from fedkit.strategies import FedAvg
from fedkit.task import Task
from fedkit.trainer.batches import row_count
from fedkit.trainer.trainer import Watch
from fedkit.work import Fit

__all__ = ["Attack", "Audit", "audited", "chosen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What is audited: private training of one task on one client's rows, as it is planned to keep to `dp`."""

    task: Task
    client: str
    dp: DP
    fit: Fit
    canaries: int
    seed: int
    threads: int

    def plan(self, rows: int) -> PrivateSteps:
        """The canaries' steps: as large a share of them takes part as of the client's `rows` rows.

        Raises `ConfigError` where delta is too large for so many canaries.
        """
        if self.canaries * self.dp.delta > 1.0:
            most = int(1.0 / self.dp.delta)
            raise ConfigError(f"delta {self.dp.delta:g} is audited by {most} canaries at most, got {self.canaries}")
        q = PrivateSteps.of(self.fit, rows, noise_multiplier=0.0, max_grad_norm=self.dp.max_grad_norm).q
        work = self.fit.replace(batch_size="all" if q == 1.0 else max(round(q * self.canaries), 1))
        found = planned(Private(self.dp, visits=1), work, self.canaries).training
        assert found is not None  # a Fit is training
        return found

    def train(self, task: Task, private: bool) -> nn.Module:
        """The module after one round at the client, preprocessing included."""
        return simulate(
            task,
            FedAvg(rounds=1, local=self.fit),
            clients=[self.client],
            seed=self.seed,
            privacy=Privacy(dp=self.dp) if private else Privacy(),
            threads=self.threads,
            device="cpu",
            progress=False,
        ).model


def chosen(task: str | None, client: str | None, fit: Fit) -> tuple[Task, str, Fit]:
    """The task of this name or at this module:attr; without one the demo's, at its first hospital and rate.

    Raises `ConfigError` where there is no such task, or it is not said whose rows.
    """
    if task is None:
        rate = fit.lr or compare.PRIVATE["FedAvg"].local.lr
        return heart.task, client or heart.HOSPITALS[0], fit.replace(lr=rate)
    if client is None:
        raise ConfigError(f"--client: say whose rows of {task}")
    return import_task(task) if ":" in task else find_task(task), client, fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """What one attack found, and what it finds without noise; the epsilon that follows; what that means."""

    attack: str
    found: str
    found_without_noise: str
    epsilon_at_least: float | None = None
    epsilon_claimed: float | None = None
    means: str
    figures: dict[str, Any]

    @property
    def is_within(self) -> bool:
        """Whether nothing beyond the claim was found."""
        return (self.epsilon_at_least or 0.0) <= (self.epsilon_claimed or 0.0)


def audited(audit: Audit, as_json: bool) -> bool:
    """Attacks, and shows what was found; whether all of it is within the claim."""
    began = time.monotonic()
    members = Members.of(audit.task, audit.client, audit.canaries)
    plan = audit.plan(row_count(members.data.train))
    with show.stages(as_json) as begin, _threads(audit.threads):
        attacks = list(_attacks(audit, members, plan, begin))
    if as_json:
        show.print_json(_facts(audit, plan, attacks, time.monotonic() - began))
    else:
        _show(audit, plan, attacks, time.monotonic() - began)
    return all(attack.is_within for attack in attacks)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _facts(audit: Audit, plan: PrivateSteps, attacks: list[Attack], seconds: float) -> dict[str, Any]:
    return {
        "task": audit.task.name,
        "client": audit.client,
        "epsilon": audit.dp.epsilon,
        "delta": audit.dp.delta,
        "max_grad_norm": plan.max_grad_norm,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_rate": plan.q,
        "steps": plan.steps,
        "attacks": [dataclasses.asdict(attack) for attack in attacks],
        "holds": all(attack.is_within for attack in attacks),
        "seconds": round(seconds, 1),
    }


def _show(audit: Audit, plan: PrivateSteps, attacks: list[Attack], seconds: float) -> None:
    dp, rows = audit.dp, "all rows" if plan.q == 1.0 else f"{100 * plan.q:.3g} % of the rows"
    show.say(f"{audit.task.name} at {audit.client}: {plan.steps} steps of {rows}, clipped to {plan.max_grad_norm:g},")
    show.say(
        f"noise of {plan.noise_multiplier:g} clips, for which epsilon {dp.epsilon:g} at delta {dp.delta:g} is claimed\n"
    )
    claims = ["-" if one.epsilon_claimed is None else f"epsilon <= {one.epsilon_claimed:g}" for one in attacks]
    both = zip(attacks, claims, strict=True)
    show.audit([(one.attack, one.found, claim, one.found_without_noise, one.means) for one, claim in both])
    refuted = [one for one in attacks if not one.is_within]
    for one in refuted:
        text = f"by {one.attack}, epsilon is {one.epsilon_at_least:.2f} or more (95 % confidence)"
        show.say(f"\nThe claim of {dp.epsilon:g} does not hold: {text}. Train nothing that is private with this.")
    if not refuted:
        show.say("\nNothing contradicts the claim. What is found is a lower bound (95 % confidence), and no proof.")
    show.say(f"Took {seconds:.0f} s")


def _attacks(audit: Audit, members: Members, plan: PrivateSteps, begin: Callable[[str], Watch]) -> Iterator[Attack]:
    delta, silent = audit.dp.delta, replace(plan, noise_multiplier=0.0)
    bounds = [canaries(plan, delta, begin("canaries")), canaries(silent, delta, begin("canaries without noise"))]
    yield _of_canaries(audit, plan, *bounds)
    begin("membership")
    modules = [audit.train(members.training, private) for private in (True, False)]
    yield _of_members(audit, *(membership(members, module, delta) for module in modules))
    begin("gradient inversion")
    yield _of_inversion(inversion(members, modules[0], plan))


def _of_canaries(audit: Audit, plan: PrivateSteps, noisy: Bound, plain: Bound) -> Attack:
    claim = audit.dp.epsilon
    assert claim is not None  # what Audit is made with
    where = "within" if noisy.epsilon <= claim else "beyond"
    means = f"the update gives worst-case rows away as epsilon {noisy.epsilon:.2f} would: {where} the claim"
    if plan.q < 1.0:
        means += "; with sampling one run shows far less than there may be"
    if plain.epsilon <= claim:
        means += "; it cannot refute this claim, as it finds too little even without noise: try more steps or canaries"
    return Attack(
        attack="canaries",
        found=f"epsilon >= {noisy.epsilon:.2f}",
        found_without_noise=f"epsilon >= {plain.epsilon:.2f}",
        epsilon_at_least=noisy.epsilon,
        epsilon_claimed=claim,
        means=means,
        figures={"with_noise": dataclasses.asdict(noisy), "without_noise": dataclasses.asdict(plain)},
    )


def _of_members(audit: Audit, private: Membership, plain: Membership) -> Attack:
    claim = audit.dp.epsilon
    assert claim is not None  # what Audit is made with
    most = allowed_advantage(claim, audit.dp.delta)
    found, found_plain = (f"epsilon >= {one.bound.epsilon:.2f}, AUC {one.auc:.2f}" for one in (private, plain))
    return Attack(
        attack="membership",
        found=found,
        found_without_noise=found_plain,
        epsilon_at_least=private.bound.epsilon,
        epsilon_claimed=claim,
        means=f"guessing by its loss whether a row was trained on beats a coin by {private.advantage:.2f}; "
        f"the claim allows {most:.2f}",
        figures={"with_noise": dataclasses.asdict(private), "without_noise": dataclasses.asdict(plain)},
    )


def _of_inversion(found: Inversion) -> Attack:
    means = "rows read off the gradient of a batch of one: a smoke test, which far less noise passes too"
    return Attack(
        attack="gradient inversion",
        found=f"{found.recovered_private} of {found.rows} rows",
        found_without_noise=f"{found.recovered} of {found.rows} rows",
        means=means if found.layer is not None else "not tried: the model has no linear layer with a bias",
        figures=dataclasses.asdict(found),
    )
