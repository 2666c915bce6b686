"""LoRA ranks by a function of the user's own."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.config.loader import load_config
from fedsim.errors import ConfigError
from fedsim.server.build_clients import build_tiers

TARGETS = {"x.q_proj": (16, 16), "x.fc1": (16, 64)}
SIZES = np.array([40, 10, 30, 20], dtype=np.int64)


def use(monkeypatch: pytest.MonkeyPatch, policy: Any) -> list[str]:
    module = types.ModuleType("my_ranks")
    module.policy = policy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_ranks", module)
    return ["lora.rank_policy=my_ranks:policy", "lora.rank=8", "strategy.name=flexlora"]


def test_each_client_gets_the_ranks_that_the_function_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def policy(targets: Any, sizes: Any, lora_rank: int, seed: int) -> list[Any]:
        seen.append((targets, sizes.tolist(), lora_rank, seed))
        return [4, {"x.q_proj": 2, "x.fc1": 8}, 4, np.int64(1)]

    tiers = build_tiers(load_config(None, [*use(monkeypatch, policy), "run.seed=5"]), TARGETS, 4, SIZES)

    assert seen == [(TARGETS, [40, 10, 30, 20], 8, 5)]
    expected = [(4, 4), (2, 8), (4, 4), (1, 1)]
    assert [tuple(tiers.lora_ranks(k, 0).values()) for k in range(4)] == expected
    assert tiers.num_clients == (2, 1, 1)


def test_a_schedule_by_round_goes_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*use(monkeypatch, lambda *_: [8, 4, 2, 1]), "lora.rank_schedule=[{from_round: 3, scale: 0.5}]"]
    tiers = build_tiers(load_config(None, options), TARGETS, 4, SIZES)
    assert [tiers.lora_ranks(k, 2)["x.fc1"] for k in range(4)] == [8, 4, 2, 1]
    assert [tiers.lora_ranks(k, 3)["x.fc1"] for k in range(4)] == [4, 2, 1, 1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1, 2, 3], "must return LoRA ranks of each of 4 clients, got [1, 2, 3]"),
        (None, "must return LoRA ranks of each of 4 clients, got None"),
        ([1, 0, 1, 1], "must give each client a LoRA rank > 0, .* got 0 for client 1"),
        ([1, 1, 1.5, 1], "got 1.5 for client 2"),
        ([1, 1, True, 1], "got True for client 2"),
        ([{"x.q_proj": 1}, 1, 1, 1], "one for each of the modules x.q_proj, x.fc1, got .* for client 0"),
        ([1, 1, 1, 17], "LoRA ranks must be at most 16, the smaller side of x.q_proj"),
    ],
)
def test_what_is_no_rank_is_refused(monkeypatch: pytest.MonkeyPatch, answer: Any, message: str) -> None:
    config = load_config(None, use(monkeypatch, lambda *_: answer))
    with pytest.raises(ConfigError, match=message.replace("[1, 2, 3]", r"\[1, 2, 3\]")):
        build_tiers(config, TARGETS, 4, SIZES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora.rank_policy=no.such:thing"], "lora.rank_policy=no.such:thing cannot be imported"),
        (["lora.rank_policy=sys:path"], "lora.rank_policy must name a function, and sys:path is none"),
        (["lora.rank_policy=nothing"], "lora.rank_policy must be a text package.module:function or null"),
        (
            ["lora.rank_policy=a:b", "lora.distribution=uniform"],
            "lora.distribution must stay at its default null when",
        ),
    ],
)
def test_what_is_no_function_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tiers(load_config(None, options), TARGETS, 4, SIZES)


def test_the_example_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    options = ["lora.rank_policy=examples.ranks:by_quartile", "lora.rank=16", "strategy.name=flexlora"]
    tiers = build_tiers(load_config(None, options), TARGETS, 4, SIZES)
    assert [tuple(tiers.lora_ranks(k, 0).values()) for k in range(4)] == [(16, 8), (2, 1), (8, 4), (4, 2)]
