"""What cannot be sealed is refused before anything is asked of anybody, with the way out."""

from __future__ import annotations

from fedkit.config import Privacy
from fedkit.errors import IncompatibleStrategy
from fedkit.strategy import Strategy

__all__ = ["require_sealable"]


def require_sealable(strategy: Strategy, privacy: Privacy) -> None:
    """Raises `IncompatibleStrategy` unless all that a strategy needs is models that travel from site to site."""
    name, other = type(strategy).__name__, sorted(strategy.uses - {"hop"})
    if other or not strategy.uses:
        raise IncompatibleStrategy(
            f"sealed and {name}, which uses {', '.join(other) or 'no hops'}: sealed protects models that travel from "
            "site to site, as in weight transfer; what is added up is protected by aggregation='masked'"
        )
    if strategy.participation.max_update_norm is not None:
        raise IncompatibleStrategy(
            "sealed and participation.max_update_norm: the coordinator sees no model's norm; with "
            "gate=Gate(max_norm=...) the next site measures it"
        )
    if privacy.dp is not None and privacy.dp.level == "client":
        raise IncompatibleStrategy(
            "sealed and dp at level client: its noise is added by the coordinator, which sees no model; dp at level "
            "example is each site's own"
        )
