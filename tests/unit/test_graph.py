"""Who masks with whom: everybody in small cohorts; above, a graph whose numbers keep to the stated probabilities."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import hypergeom

from fedkit.crypto.graph import COMPLETE_UP_TO, Assumptions, neighbours, plan
from fedkit.errors import ConfigError

LIMIT = Fraction(1, 1 << 40)


@pytest.mark.parametrize(("size", "quorum"), [(2, 2), (3, 2), (4, 3), (5, 4), (10, 7), (100, 67), (200, 134)])
def test_up_to_200_everybody_is_a_neighbour_and_two_thirds_open_a_secret(size: int, quorum: int) -> None:
    found = plan(size)
    assert found.is_complete
    assert (found.degree, found.threshold, found.quorum) == (size - 1, quorum, quorum)
    assert (found.collusion, found.failure) == (0, 0)
    graph = neighbours(map(str, range(size)), found.degree, b"seed")
    assert all(set(graph[str(i)]) == {str(j) for j in range(size)} - {str(i)} for i in range(size))


@pytest.mark.parametrize("size", [201, 300, 1000, 4000])
@pytest.mark.parametrize("assumptions", [Assumptions(), Assumptions(0.1, 0.2), Assumptions(0.05, 1 / 3, 60)])
def test_a_sparse_graph_keeps_to_its_probabilities_by_a_second_implementation(
    size: int, assumptions: Assumptions
) -> None:
    found = plan(size, assumptions)
    limit = 2.0**-assumptions.bits
    assert found.degree < size - 1
    assert found.degree % 2 == 0
    tail = hypergeom(size - 1, found.corrupt, found.degree).sf(found.threshold - 1)
    apart = np.prod([(found.corrupt + found.dropouts - i) / (size - i) for i in range(found.degree // 2)])
    assert float(found.collusion) == pytest.approx(size * (tail + apart), rel=1e-6)
    assert found.collusion <= limit
    few = hypergeom(size - 1, size - found.dropouts, found.degree).cdf(found.threshold - 1)
    assert float(found.failure) == pytest.approx(size * few, rel=1e-6, abs=1e-25)
    assert found.failure <= limit


def test_more_to_fear_takes_more_neighbours() -> None:
    easy, usual, hard = (
        plan(1000, one) for one in (Assumptions(0.1, 0.2), Assumptions(), Assumptions(0.3, 0.3, bits=80))
    )
    assert easy.degree < usual.degree < hard.degree
    assert "1000 members, each with 174 neighbours, of which 77 open a secret; 667 must stay" in str(usual)
    assert "2^-40.1" in str(usual)


def test_where_no_sparse_graph_will_do_the_complete_one_is_taken() -> None:
    found = plan(COMPLETE_UP_TO + 1, Assumptions(0.3, 0.3, bits=200))
    assert found.is_complete
    assert found.threshold == 134


def test_each_member_is_its_neighbours_neighbour_and_all_have_as_many() -> None:
    names = [f"m{i}" for i in range(211)]
    graph = neighbours(names, 90, b"seed")
    assert set(graph) == set(names)
    for name, others in graph.items():
        assert len(set(others)) == 90
        assert name not in others
        assert list(others) == sorted(others)
        assert all(name in graph[other] for other in others)


def test_the_graph_depends_on_the_seed_and_the_names_alone() -> None:
    names = [f"m{i}" for i in range(211)]
    one = neighbours(names, 20, b"seed")
    assert one == neighbours(reversed(names), 20, b"seed")
    assert one != neighbours(names, 20, b"other")


def test_the_sparse_graph_stays_in_one_piece_without_the_colluding_and_the_dropped() -> None:
    found, draw = plan(300), np.random.default_rng(3)
    names = [f"m{i}" for i in range(300)]
    for trial in range(20):
        graph = neighbours(names, found.degree, bytes([trial]))
        left = set(draw.permutation(names)[found.corrupt + found.dropouts :].tolist())
        assert reached(graph, left) == left


def reached(graph: dict[str, tuple[str, ...]], left: set[str]) -> set[str]:
    seen, edge = set(), [min(left)]
    while edge:
        name = edge.pop()
        if name not in seen:
            seen.add(name)
            edge += [other for other in graph[name] if other in left]
    return seen


@pytest.mark.parametrize(
    ("size", "quorum", "text"),
    [
        (1, None, "a cohort of 1"),
        (4, 2, "not more than half of a cohort of 4"),
        (10, 5, "not more than half"),
        (10, 11, "quorum of 11"),
        (10, 6, "6 of 10 cannot be with 2 colluding"),
        (10, 8, "3 dropping out"),
    ],
)
def test_a_quorum_that_would_not_protect_or_cannot_be_reached_is_refused(
    size: int, quorum: int | None, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        plan(size, quorum=quorum)


def test_assumptions_that_leave_no_quorum_are_refused() -> None:
    for bad in ({"corrupt": 1 / 3}, {"dropouts": 0.34}, {"corrupt": -0.1}, {"bits": 0}, {"corrupt": float("nan")}):
        with pytest.raises(ConfigError):
            Assumptions(**bad)
    assert plan(10, Assumptions(0.0, 0.0), quorum=6).threshold == 6
