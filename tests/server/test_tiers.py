"""Resource tiers: who has which LoRA ranks."""

import numpy as np
import pytest

from fedsim.config.loader import load_config
from fedsim.errors import ConfigError
from fedsim.lora.updates import POOLED_CLIENT
from fedsim.server.build import build_tiers
from fedsim.server.tiers import Tiers, draw_tiers, module_ranks

MODULES = ["layers.0.q_proj", "layers.0.fc1", "layers.1.q_proj", "layers.1.fc1"]


def test_exceptions_name_modules_by_the_end_of_their_path():
    ranks = module_ranks(MODULES, 30, {"fc1": 200, "layers.0.q_proj": 7})
    assert list(ranks.values()) == [7, 200, 30, 200]
    assert list(ranks) == MODULES


@pytest.mark.parametrize(
    ("exceptions", "message"),
    [
        ({"fc": 2}, "got 'fc'; adapted are q_proj, fc1"),
        ({"fc1": 2, "layers.1.fc1": 3}, "name each module once"),
    ],
)
def test_wrong_exceptions_are_refused(exceptions, message):
    with pytest.raises(ConfigError, match=message):
        module_ranks(MODULES, 30, exceptions)


def test_shares_are_probabilities_of_independent_draws():
    tiers = draw_tiers([{"m": 8}, {"m": 30}, {"m": 200}], [8.0, 1.0, 1.0], 20_000, seed=4)
    counts = np.array(tiers.num_clients)
    expected = np.array([16_000, 2_000, 2_000])
    assert counts.sum() == 20_000
    assert np.all(np.abs(counts - expected) < 4 * np.sqrt(expected * (1 - expected / 20_000)))
    again = draw_tiers([{"m": 8}, {"m": 30}, {"m": 200}], [8.0, 1.0, 1.0], 20_000, seed=4)
    assert np.array_equal(tiers.tier_of, again.tier_of)
    other = draw_tiers([{"m": 8}, {"m": 30}, {"m": 200}], [8.0, 1.0, 1.0], 20_000, seed=5)
    assert not np.array_equal(tiers.tier_of, other.tier_of)


def test_largest_ranks_are_those_of_tiers_with_clients():
    tiers = Tiers(({"a": 2, "b": 9}, {"a": 5, "b": 3}, {"a": 50, "b": 50}), np.array([0, 1, 1, 0]))
    assert tiers.max_ranks == {"a": 5, "b": 9}
    assert tiers.are_mixed
    assert tiers.lora_ranks(1) == {"a": 5, "b": 3}
    assert tiers.lora_ranks(POOLED_CLIENT) == {"a": 5, "b": 9}
    assert not Tiers(({"a": 2}, {"a": 3}), np.array([1, 1])).are_mixed, "one tier only has clients"


def test_from_the_configuration():
    config = load_config(
        None, ["lora.tiers=[{share: 3, rank: 2}, {share: 1, rank: 4, module_ranks: {v_proj: 6}}]"]
    )
    tiers = build_tiers(config, {"x.q_proj": (8, 8), "x.v_proj": (8, 8)}, 400)
    assert [list(ranks.values()) for ranks in tiers.ranks] == [[2, 2], [4, 6]]
    assert 60 < tiers.num_clients[1] < 140
    plain = build_tiers(load_config(None, ["lora.rank=3"]), {"x.q_proj": (8, 8)}, 4)
    assert not plain.are_mixed
    assert plain.max_ranks == {"x.q_proj": 3}
