"""Resource tiers: who has which LoRA ranks.

What arXiv 2402.11505 gives is taken from its published code, its README and its figures.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fedsim.config.loader import load_config
from fedsim.config.model_section import LoraConfig
from fedsim.errors import ConfigError
from fedsim.lora.updates import POOLED_CLIENT
from fedsim.main import main
from fedsim.models.architecture import empty_model
from fedsim.models.targets import find_targets
from fedsim.server.build_clients import build_tiers
from fedsim.server.flexlora_tiers import DISTRIBUTIONS, TYPES
from fedsim.server.tiers import Tier, Tiers, distributed_types, draw_tiers, module_ranks, tiers_by_size
from tests.helpers import random_texts, tiny_opt, word_tokenizer

MODULES = ["layers.0.q_proj", "layers.0.fc1", "layers.1.q_proj", "layers.1.fc1"]
OPT_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LLAMA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLIENTS = 1613
PERCENT = {
    "homogeneous": [100, 0, 0, 0],
    "uniform": [25, 25, 25, 25],
    "heavy_tail_light": [80, 5, 5, 10],
    "heavy_tail_light_readme": [85, 5, 5, 5],
    "normal": [5.75, 44.25, 44.25, 5.75],
    "normal_code": [5.75, 5.75, 44.25, 44.25],
    "heavy_tail_strong": [5, 5, 10, 80],
    "heavy_tail_strong_readme": [5, 5, 5, 85],
}
"""Types 1, 2, 3 and 4 of arXiv 2402.11505."""

MIXING = "strategy.name=flexlora"


def opt_targets(hidden: int = 768, layers: int = 12) -> dict[str, tuple[int, int]]:
    from transformers import OPTConfig

    sizes = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden}
    config = OPTConfig(num_hidden_layers=layers, num_attention_heads=hidden // 64, **sizes)
    return find_targets(empty_model(config, "OPT", False), OPT_MODULES)


def llama_targets() -> dict[str, tuple[int, int]]:
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    return find_targets(empty_model(LlamaConfig(**sizes), "Llama", False), LLAMA_MODULES)


def num_trainable(ranks: Mapping[str, int], targets: Mapping[str, tuple[int, int]]) -> int:
    return sum(rank * sum(targets[module]) for module, rank in ranks.items())


def within_three_sigma(counts: tuple[int, ...], percent: list[float]) -> bool:
    shares = np.array([share for share in percent if share > 0]) / 100
    return bool(
        np.all(np.abs(np.array(counts) - CLIENTS * shares) <= 3 * np.sqrt(CLIENTS * shares * (1 - shares)))
    )


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
    kinds = [Tier("a", {"m": 8}, 8.0), Tier("b", {"m": 30}, 1.0), Tier("c", {"m": 200}, 1.0)]
    tiers = draw_tiers(kinds, 20_000, seed=4)
    counts = np.array(tiers.num_clients)
    expected = np.array([16_000, 2_000, 2_000])
    assert counts.sum() == 20_000
    assert np.all(np.abs(counts - expected) < 4 * np.sqrt(expected * (1 - expected / 20_000)))
    assert tiers.names == ("a", "b", "c")
    assert np.array_equal(tiers.tier_of, draw_tiers(kinds, 20_000, seed=4).tier_of)
    assert not np.array_equal(tiers.tier_of, draw_tiers(kinds, 20_000, seed=5).tier_of)


def test_largest_ranks_are_those_of_tiers_with_clients():
    tiers = Tiers(({"a": 2, "b": 9}, {"a": 5, "b": 3}, {"a": 50, "b": 50}), np.array([0, 1, 1, 0]))
    assert tiers.max_ranks == {"a": 5, "b": 9}
    assert tiers.are_mixed
    assert tiers.lora_ranks(1, 0) == {"a": 5, "b": 3}
    assert tiers.lora_ranks(POOLED_CLIENT, 0) == {"a": 5, "b": 9}
    assert not Tiers(({"a": 2}, {"a": 3}), np.array([1, 1])).are_mixed, "one tier only has clients"


def test_ranks_by_round():
    config = load_config(
        None,
        [
            MIXING,
            "lora.tiers=[{share: 1, rank: 2}, {share: 1, rank: 8}]",
            "lora.rank_schedule=[{from_round: 1, scale: 0.25}, {from_round: 3, scale: 1.0}]",
        ],
    )
    tiers = build_tiers(config, {"a": (16, 16)}, 40)
    large = int(np.flatnonzero(tiers.tier_of == 1)[0])
    small = int(np.flatnonzero(tiers.tier_of == 0)[0])
    assert [tiers.lora_ranks(large, t)["a"] for t in range(5)] == [8, 2, 2, 8, 8]
    assert [tiers.lora_ranks(small, t)["a"] for t in range(5)] == [2, 1, 1, 2, 2]
    assert tiers.lora_ranks(large, 1) is tiers.lora_ranks(large, 2)
    assert tiers.max_ranks == tiers.lora_ranks(POOLED_CLIENT, 1) == {"a": 8}
    one = build_tiers(
        load_config(None, [MIXING, "lora.rank_schedule=[{from_round: 0, scale: 0.5}]"]), {"a": (4, 4)}, 3
    )
    assert one.are_mixed, "a strategy must be able to work with other ranks than the adapter's"
    with pytest.raises(ConfigError, match="ascending values of from_round, got"):
        load_config(None, ["lora.rank_schedule=[{from_round: 2, scale: 0.5}, {from_round: 2, scale: 1}]"])


def test_from_the_configuration():
    config = load_config(
        None, [MIXING, "lora.tiers=[{share: 3, rank: 2}, {share: 1, rank: 4, module_ranks: {v_proj: 6}}]"]
    )
    tiers = build_tiers(config, {"x.q_proj": (8, 8), "x.v_proj": (8, 8)}, 400)
    assert [list(ranks.values()) for ranks in tiers.ranks] == [[2, 2], [4, 6]]
    assert 60 < tiers.num_clients[1] < 140
    plain = build_tiers(load_config(None, ["lora.rank=3"]), {"x.q_proj": (8, 8)}, 4)
    assert not plain.are_mixed
    assert plain.max_ranks == {"x.q_proj": 3}


@pytest.mark.parametrize(("name", "percent"), PERCENT.items())
def test_distributions_of_the_paper_over_its_clients(name, percent):
    config = load_config(None, [MIXING, f"lora.distribution={name}", "lora.rank_scale=0.1"])
    tiers = build_tiers(config, {"x.q_proj": (64, 64), "x.fc1": (64, 64)}, CLIENTS)
    assert sum(tiers.num_clients) == CLIENTS
    assert within_three_sigma(tiers.num_clients, percent)
    assert list(DISTRIBUTIONS[name]) == percent
    assert list(tiers.names) == [f"type {number}" for number in (1, 2, 3, 4) if percent[number - 1] > 0]


def test_each_distribution_has_a_name_in_the_configuration():
    literal, _ = get_args(LoraConfig.model_fields["distribution"].annotation)
    assert [*DISTRIBUTIONS, "by_size"] == list(get_args(literal))
    assert list(DISTRIBUTIONS) == list(PERCENT)


def test_normal_is_a_density_at_the_types_in_order():
    density = [math.exp(-(((value - 1.5) / 0.7) ** 2) / 2) for value in range(4)]
    expected = [100 * value / sum(density) for value in density]
    assert DISTRIBUTIONS["normal"] == pytest.approx(expected, abs=0.005)
    in_code = [
        expected[value] for value in (0, 3, 2, 1)
    ]  # types 1 to 4 are its Type_0, Type_3, Type_2, Type_1
    assert DISTRIBUTIONS["normal_code"] == pytest.approx(in_code, abs=0.005)


def test_the_order_of_the_types_in_the_code_is_not_that_of_the_paper():
    config = load_config(None, [MIXING, "lora.distribution=normal", "lora.rank_scale=0.1"])
    counts = build_tiers(config, {"x.q_proj": (64, 64)}, CLIENTS).num_clients
    assert not within_three_sigma(counts, PERCENT["normal_code"])


def test_types_of_the_paper():
    assert [tuple(kind) for kind in TYPES] == [(8, 8), (30, 30), (30, 200), (200, 200)]
    tiers = distributed_types("uniform", opt_targets(layers=1), 1.0)
    by_name = [{module.rpartition(".")[2]: rank for module, rank in tier.ranks.items()} for tier in tiers]
    third = {"q_proj": 30, "k_proj": 30, "v_proj": 30, "out_proj": 30, "fc1": 200, "fc2": 200}
    assert by_name == [
        dict.fromkeys(third, 8),
        dict.fromkeys(third, 30),
        third,
        dict.fromkeys(third, 200),
    ]


def test_trainable_parameters_of_the_types_on_opt_and_llama():
    cases = [
        (opt_targets(), [1_327_104, 4_976_640, 20_643_840, 33_177_600]),  # OPT-125M
        (llama_targets(), [7_495_680, 28_108_800, 120_545_280, 187_392_000]),  # the paper's base
    ]
    for targets, expected in cases:
        tiers = distributed_types("uniform", targets, 1.0)
        assert [num_trainable(tier.ranks, targets) for tier in tiers] == expected
    large = opt_targets(2048, 24)  # OPT-1.3B
    millions = [num_trainable(tier.ranks, large) / 1e6 for tier in distributed_types("uniform", large, 1.0)]
    assert millions == pytest.approx([7.08, 26.5, 110.1, 176.9], abs=0.05)


def test_ranks_are_scaled_to_a_small_model():
    targets = {"x.q_proj": (64, 64), "x.k_proj": (64, 32), "x.down_proj": (172, 64)}
    tiers = distributed_types("uniform", targets, 0.05)
    assert [list(tier.ranks.values()) for tier in tiers] == [[1, 1, 1], [2, 2, 2], [2, 2, 10], [10, 10, 10]]
    assert distributed_types("homogeneous", targets, 0.3125)[0].ranks["x.q_proj"] == 3, "halves go up"
    with pytest.raises(ConfigError) as caught:
        distributed_types("uniform", targets, 1.0)
    assert str(caught.value) == (
        "lora.distribution=uniform, type 3: LoRA ranks must be at most 64, the smaller side of x.down_proj (64 x 172), "
        "got 200; set lora.rank_scale to 0.16 or less"
    )
    assert distributed_types("uniform", targets, 0.16)[3].ranks["x.k_proj"] == 32, "the remedy helps"
    assert len(distributed_types("homogeneous", targets, 1.0)) == 1, "types without clients need not fit"


def test_modules_of_neither_kind_are_refused():
    with pytest.raises(
        ConfigError, match=r"lora.target_modules must be of attention .* got x.query_key_value; use"
    ):
        distributed_types("uniform", {"x.query_key_value": (64, 64)}, 1.0)


def test_a_tier_of_the_user_must_fit_the_model_even_without_clients():
    config = load_config(
        None, [MIXING, "lora.tiers=[{rank: 4}, {rank: 4, share: 1.0e-9, module_ranks: {fc1: 17}}]"]
    )
    with pytest.raises(
        ConfigError, match=r"^lora.tiers\[1\]: LoRA ranks must be at most 16, .* x.fc1 .* got 17$"
    ):
        build_tiers(config, {"x.q_proj": (16, 16), "x.fc1": (16, 32)}, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["lora.distribution=uniform", "lora.rank=8"],
            "lora.rank must stay at its default 2 when lora.distribution is uniform, whose types have ranks of",
        ),
        (
            ["lora.distribution=uniform", "lora.tiers=[{rank: 8}]"],
            "lora.distribution must stay at its default null when lora.tiers is set, got 'uniform'",
        ),
        (
            ["lora.rank_scale=0.5"],
            "lora.rank_scale must stay at its default 1.0 when lora.distribution is null, got 0.5",
        ),
        (
            ["lora.distribution=by_size", "lora.rank_scale=0.5"],
            "lora.rank_scale must stay at its default 1.0 when lora.distribution is by_size, which takes lora.rank",
        ),
        (["lora.distribution=heavy_tail_ligth"], "did you mean 'heavy_tail_light'?"),
        (["lora.rank_scale=0"], "lora.rank_scale must be a number in (0, 100], got 0"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)


def test_ranks_by_size_follow_hlora():
    sizes = np.array([50, 10, 70, 10, 30, 90, 20, 60, 40, 80])
    config = load_config(None, ["lora.distribution=by_size", "lora.rank=8"])
    tiers = build_tiers(config, {"a": (16, 16), "b": (16, 16)}, 10, sizes)
    order = [sum(other < size for other in sizes) for size in sizes]
    assert [tiers.lora_ranks(k, 0)["b"] for k in range(10)] == [max(int(o / 10 * 8), 1) for o in order]
    assert tiers.lora_ranks(1, 0) is tiers.lora_ranks(3, 0), "one object for all clients of a tier"
    assert tiers.max_ranks == {"a": 7, "b": 7}
    assert sum(tiers.num_clients) == 10
    equal = tiers_by_size(["a"], np.full(6, 4), 8)
    assert equal.ranks == ({"a": 1},)
    assert not equal.are_mixed


def test_tiers_as_they_are_saved():
    tiers = Tiers(({"0.q": 2, "1.q": 2}, {"0.q": 5, "1.q": 3}), np.array([1, 0, 1]), ("small", "large"))
    saved = json.loads(json.dumps(tiers.to_json()))
    assert saved == {
        "tiers": [
            {"name": "small", "num_clients": 1, "lora_ranks": {"q": [2]}},
            {"name": "large", "num_clients": 2, "lora_ranks": {"q": [3, 5]}},
        ],
        "tier_of": [1, 0, 1],
    }
    plain: Any = Tiers(({"a": 2},), np.zeros(2, dtype=np.int64)).to_json()
    assert plain["tiers"][0]["name"] == "tier 0"


def test_clients_train_the_ranks_of_their_tiers(tmp_path, capsys):
    tiny_opt().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": text}) for text in random_texts(120)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    settings = {
        "run.output_dir": tmp_path,
        "run.name": "tiers",
        "run.rounds": 1,
        "data.source": tmp_path / "texts.jsonl",
        "data.max_tokens": 24,
        "model.name_or_path": tmp_path / "model",
        "data.partition.name": "iid",
        "data.partition.num_clients": 16,
        "cohort.size": 16,
        "training.batch_size": 4,
        "strategy.name": "flexlora",
        "lora.distribution": "uniform",
        "lora.rank_scale": 0.08,
        "lora.target_modules": f"[{','.join(OPT_MODULES)}]",
        "tracking.wandb.mode": "disabled",
        "tracking.progress": "off",
    }
    threads = torch.get_num_threads()
    arguments = [f"{key}={value}" for key, value in settings.items()]
    assert main(arguments) == 0
    torch.set_num_threads(threads)

    targets = find_targets(tiny_opt(), OPT_MODULES)
    tiers = build_tiers(load_config(None, arguments), targets, 16)
    of_type = [2 * (4 * r * (16 + 16) + 2 * f * (16 + 32)) for r, f in ((1, 1), (2, 2), (2, 16), (16, 16))]
    table = pq.read_table(tmp_path / "tiers" / "clients.parquet").to_pydict()
    trained = dict(zip(table["client_id"], table["trained_parameters"], strict=True))
    assert trained == {k: of_type[tier] for k, tier in enumerate(tiers.tier_of.tolist())}
    assert len(set(trained.values())) == 4, "the seed gives all types clients"
