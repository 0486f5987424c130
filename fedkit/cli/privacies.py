"""`fedkit privacy`: what a site's ledger says, and what attacks on its private training find."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fedkit.cli.edge import Json, edge

__all__ = ["privacy"]

privacy = typer.Typer(
    name="privacy",
    help="What a site's data has cost in privacy, what is left, and whether the claim holds.",
    no_args_is_help=True,
)

LedgerFile = Annotated[Path, typer.Argument(metavar="LEDGER.db", help="ledger.db of an agent's folder.")]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="The site's policy, for its budgets.")
]
Delta = Annotated[float, typer.Option("--delta", min=1e-300, max=0.5, help="For data sets without a budget.")]


@privacy.command("report")
def report(ledger: LedgerFile, policy: PolicyFile = None, delta: Delta = 1e-5, as_json: Json = False) -> None:
    """Show each data set with its runs: epsilon by two accountants, steps, rates, noise, what is not covered."""
    _show(ledger, policy, delta, as_json, with_runs=True)


@privacy.command("budget")
def budget(ledger: LedgerFile, policy: PolicyFile = None, delta: Delta = 1e-5, as_json: Json = False) -> None:
    """Show what is spent and left of each data set's budget, and how many more rounds it affords."""
    _show(ledger, policy, delta, as_json, with_runs=False)


@privacy.command("audit")
def audit(
    task: Annotated[
        str | None, typer.Option("--task", help="A registered task, or module:attr; the demo's without it.")
    ] = None,
    client: Annotated[str | None, typer.Option("--client", help="Whose rows, as the task names its clients.")] = None,
    epsilon: Annotated[float, typer.Option("--epsilon", min=1e-3, help="The claim.")] = 3.0,
    delta: Annotated[float, typer.Option("--delta", min=1e-300, max=0.5, help="The claim's delta.")] = 1e-5,
    max_grad_norm: Annotated[float, typer.Option("--max-grad-norm", min=1e-6, help="The clip.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Noisy steps in all.")] = 20,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Rows a step on average; all without it.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="The rate of training; the task's own without it.")] = None,
    canaries: Annotated[int, typer.Option("--canaries", min=20, max=5000, help="Also the most rows used.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of first weights; noise and coins have none.")] = 42,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Torch threads.")] = 1,
    as_json: Json = False,
) -> None:
    """Attack private training on a client's rows, and set what leaks beside the claim; exit code 1 where it is more."""
    from fedkit.cli.audited import Audit, audited, chosen
    from fedkit.config import DP
    from fedkit.work import Fit

    with edge():
        dp = DP(epsilon=epsilon, delta=delta, max_grad_norm=max_grad_norm)
        found, whose, fit = chosen(task, client, Fit(steps=steps, batch_size=batch_size or "all", lr=lr))
        asked = Audit(task=found, client=whose, dp=dp, fit=fit, canaries=canaries, seed=seed, threads=threads)
        if not audited(asked, as_json):
            raise typer.Exit(1)


def _show(path: Path, policy: Path | None, delta: float, as_json: bool, *, with_runs: bool) -> None:
    from fedkit.cli import show
    from fedkit.policy import Policy, read
    from fedkit.privacy.ledger import Budget, Ledger
    from fedkit.privacy.report import report as reported

    with edge():
        rules = Policy() if policy is None else read(policy)
        budgets = {data: Budget(rule.epsilon, rule.delta) for data, rule in rules.budgets.items()}
        ledger = Ledger(path, look=True)
        known = {account.data: account for account in ledger.accounts()}
        accounts = [known.get(data, ledger.account(data)) for data in sorted({*known, *budgets})]
        found = [reported(account, budgets.get(account.data), delta) for account in accounts]
        if as_json:
            show.print_json([dataclasses.asdict(one) for one in found])
        else:
            show.privacy(found, ledger.head, with_runs=with_runs)
        ledger.close()
