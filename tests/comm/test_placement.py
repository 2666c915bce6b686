"""Placement of packs onto ranks."""

import hypothesis.strategies as st
from hypothesis import given

from fedsim.comm.placement import place

costs = st.lists(st.integers(1, 1000), max_size=40)


@given(costs, st.integers(1, 8))
def test_each_pack_is_placed_once(costs, world_size):
    placed = place(costs, world_size)
    assert len(placed) == world_size
    assert sorted(index for packs in placed for index in packs) == list(range(len(costs)))


@given(costs, st.integers(1, 8))
def test_longest_first_is_within_four_thirds_of_the_best_possible(costs, world_size):
    """Graham's bound for longest-processing-time-first, against a lower bound of the optimum."""
    loads = [sum(costs[index] for index in packs) for packs in place(costs, world_size)]
    ranked = sorted(costs, reverse=True)
    pair = ranked[world_size - 1] + ranked[world_size] if len(ranked) > world_size else 0
    optimum_at_least = max(sum(costs) / world_size, max(costs, default=0), pair)
    assert max(loads) <= (4 / 3) * optimum_at_least + max(costs, default=0) / 3


def test_more_ranks_than_packs_leaves_the_last_ranks_idle():
    assert place([5, 9], 4) == ((1,), (0,), (), ())


def test_ties_go_to_the_lower_index():
    assert place([3, 3, 3], 2) == ((0, 2), (1,))
