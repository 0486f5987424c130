"""`fedkit privacy`: what a site's ledger says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fedkit.cli.edge import Json, edge

__all__ = ["privacy"]

privacy = typer.Typer(
    name="privacy", help="What a site's data has cost in privacy, and what is left.", no_args_is_help=True
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
