"""Random numbers are a function of seeds and labels, and the global generators are put back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkit import rng

LABELS = st.lists(st.text(max_size=5) | st.integers(), max_size=3)
SEEDS = st.integers(-(2**80), 2**80)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


@given(SEEDS, LABELS)
def test_a_seed_is_a_function_of_its_arguments_that_any_generator_takes(seed, labels):
    found = rng.seed_for(seed, *labels)
    assert found == rng.seed_for(seed, *labels)
    assert 0 <= found < 2**63
    rng.torch_generator(seed, *labels)
    rng.generator(seed, *labels)


def test_seeds_are_the_same_on_every_machine_and_for_ever():
    assert rng.seed_for(42, "batches", 3, "va") == 6151269157089649018


def test_seeds_differ_with_the_seed_the_labels_their_number_and_their_order():
    seeds = [
        rng.seed_for(0),
        rng.seed_for(1),
        rng.seed_for(0, "a"),
        rng.seed_for(0, "a", "b"),
        rng.seed_for(0, "b", "a"),
        rng.seed_for(0, "ab"),
        rng.seed_for(0, "a", 1),
        rng.seed_for(0, "a", 11),
        rng.seed_for(0, "", "a"),
    ]
    assert len(set(seeds)) == len(seeds)


def test_labels_that_hold_the_separator_are_told_apart():
    assert rng.seed_for(0, "a\x1fb") != rng.seed_for(0, "a", "b")


def test_equal_arguments_give_equal_numbers_and_others_do_not():
    assert rng.generator(1, "x").random(3).tolist() == rng.generator(1, "x").random(3).tolist()
    assert rng.generator(1, "x").random(3).tolist() != rng.generator(1, "y").random(3).tolist()
    one, same = (torch.rand(3, generator=rng.torch_generator(1, "x")) for _ in range(2))
    assert torch.equal(one, same)


def test_generators_do_not_touch_the_global_ones():
    rng.seed_all(5)
    expected = drawn()
    rng.seed_all(5)
    rng.generator(1, "x").random(3)
    torch.rand(3, generator=rng.torch_generator(1, "x"))
    assert drawn() == expected


@given(st.integers(-(2**63), 2**63 - 1))
def test_inside_the_block_numbers_depend_on_the_seed_and_outside_they_go_on_as_before(seed):
    rng.seed_all(5)
    expected = drawn()
    rng.seed_all(5)
    with rng.seeded(seed):
        first = drawn()
    assert drawn() == expected
    with rng.seeded(seed):
        assert drawn() == first


def test_an_error_inside_the_block_puts_the_generators_back_too():
    rng.seed_all(5)
    expected = drawn()
    rng.seed_all(5)
    with pytest.raises(KeyError), rng.seeded(1):
        drawn()
        raise KeyError
    assert drawn() == expected


def test_blocks_may_be_nested():
    with rng.seeded(1):
        drawn()
        expected = drawn()
    with rng.seeded(1):
        drawn()
        with rng.seeded(2):
            drawn()
        assert drawn() == expected


@pytest.mark.parametrize("seed", [2**64, -(2**70)])
def test_any_whole_number_seeds_a_block(seed):
    with rng.seeded(seed):
        first = drawn()
    with rng.seeded(seed):
        assert drawn() == first
