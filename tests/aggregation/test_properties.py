"""The property matrix of docs/strategies.md: every cell is measured here, and compared with what is printed.

`pytest tests/aggregation/test_properties.py --refresh-golden` writes the table anew. Products are float64, so that
"exact" means 1e-9 relative; what is random is drawn from seeds.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.aggregation.build import build_strategy
from fedsim.aggregation.strategy import Strategy
from fedsim.comm.group import Group, SoloGroup
from fedsim.config.loader import load_config
from fedsim.config.strategy_section import STRATEGY_NAMES
from fedsim.config.strategy_traits import KNOWN, LARGEST_TYPE, SMALLEST_TYPE, known_traits
from fedsim.errors import ConfigError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule
from fedsim.lora.lowrank import combine
from fedsim.lora.plan import BOTH, NEITHER, Client, ClientState
from fedsim.lora.state import ServerState
from fedsim.lora.updates import POOLED_CLIENT
from fedsim.server.build_clients import build_tiers
from fedsim.server.build_strategy import build_federated_strategy
from fedsim.server.checkpoint import load_newest_checkpoint, save_checkpoint
from fedsim.server.flexlora_tiers import TYPES
from tests.cohorts import (
    TARGETS,
    Training,
    learns_noise,
    make_federation,
    one_round,
    products,
    random_adapter,
    restated,
)
from tests.helpers import run_ranks
from tests.server.test_strategy_rounds import case_rounds

DOCS = Path(__file__).resolve().parents[2] / "docs" / "strategies.md"
BEGIN, END = "<!-- property matrix: begin -->", "<!-- property matrix: end -->"

LARGEST = 4
TIERS = (1, 4, 2)
EXAMPLES = {0: 10, 1: 30, 2: 20, 3: 5, 4: 15}
SHARES = {client: count / sum(EXAMPLES.values()) for client, count in EXAMPLES.items()}
ARGUMENTS: Mapping[str, dict[str, Any]] = {
    "florist": {"energy": 1.0},
    "slora": {"rounds": 1, "density": 0.2, "then": "flexlora"},
    "hetlora": {"pruning_factor": 0.99, "tail_penalty": 0.0, "min_rank": 1},
}


def make(name: str, lora_alpha: float = 16.0) -> Strategy:
    weighting = "uniform" if name == "scaffold" else "examples"
    federation = make_federation(
        LARGEST, num_clients=5, weighting=weighting, scaling=ScalingRule(lora_alpha), cohort_size=5
    )
    return build_strategy(name, federation, ARGUMENTS.get(name))


def ranks_of(strategy: Strategy, clients: tuple[int, ...] = (0, 1, 2, 3, 4)) -> dict[int, dict[str, int]]:
    if strategy.traits.trains_pool:
        return {POOLED_CLIENT: dict.fromkeys(TARGETS, LARGEST)}
    mixed = strategy.traits.mixed_ranks
    return {client: dict.fromkeys(TARGETS, TIERS[client % 3] if mixed else LARGEST) for client in clients}


def shares(strategy: Strategy) -> dict[int, float]:
    if strategy.traits.trains_pool:
        return {POOLED_CLIENT: 1.0}
    return dict.fromkeys(SHARES, 0.2) if strategy.name == "scaffold" else SHARES


def play(
    strategy: Strategy,
    state: ServerState,
    train: Training,
    kept: dict[int, ClientState],
    ranks: Mapping[int, Mapping[str, int]] | None = None,
) -> ServerState:
    examples = {**EXAMPLES, POOLED_CLIENT: 1}
    return one_round(strategy, state, ranks or ranks_of(strategy), train, examples, kept).state


def start(strategy: Strategy, kept: dict[int, ClientState], rounds: int = 2) -> ServerState:
    """A state with something in it: two rounds of noise from a random adapter; scaffold's steps are 0.1 long."""
    state = ServerState(0, random_adapter(5, LARGEST, scaling=strategy_scaling(strategy)))
    for index in range(rounds):
        state = play(strategy, state, learns_noise(index), kept)
    return state


def strategy_scaling(strategy: Strategy) -> ScalingRule:
    return ScalingRule(16.0)


def total(strategy: Strategy, state: ServerState, client: Client | None = None) -> dict[str, np.ndarray]:
    """Module -> what the model's weights have gained: the exported adapter on the updated base."""
    return products(combine(strategy.export(state, client), state.base_update))


def worst(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    return max(
        float(np.linalg.norm(one[m] - other[m]) / max(1e-300, np.linalg.norm(other[m]))) for m in other
    )


def personal(strategy: Strategy, client_id: int, kept: Mapping[int, ClientState]) -> Client | None:
    """The client whose model is looked at, where there is no global one."""
    if strategy.traits.has_global_model:
        return None
    return Client(client_id, ranks_of(strategy)[client_id], kept.get(client_id, {}))


# --- the properties, one function each, from the name of a strategy to the text of its cell --------------------------


def no_op_round(name: str) -> str:
    """Every client returns what it received."""
    strategy, kept = make(name), {}
    state = start(strategy, kept)
    before = total(strategy, state, personal(strategy, 1, kept))
    starts: dict[int, AdapterState] = {}

    def remember(client_id: int, received: AdapterState) -> AdapterState:
        starts[client_id] = received
        return received

    after = total(strategy, play(strategy, state, remember, kept), personal(strategy, 1, kept))
    if worst(after, before) < 1e-9:
        return "kept"
    p = shares(strategy)
    holders = {
        module: np.array([sum(p[k] for k, s in starts.items() if s[module].rank > j) for j in range(LARGEST)])
        for module in TARGETS
    }
    values = {m: np.linalg.svd(before[m], full_matrices=False) for m in TARGETS}
    decayed = {
        m: (u[:, :LARGEST] * (s[:LARGEST] * holders[m])) @ v[:LARGEST] for m, (u, s, v) in values.items()
    }
    if worst(after, decayed) < 1e-9:
        return "sv j x P(r >= j)"
    squared = {m: f.scaling * (f.B.numpy() * holders[m] ** 2) @ f.A.numpy() for m, f in state.adapter.items()}
    if worst(after, squared) < 1e-9:
        return "row j x P(r >= j)^2"
    if name == "hetlora":
        norms = {m: {k: np.linalg.norm(products(s)[m]) for k, s in starts.items()} for m in TARGETS}
        by_norm = {}
        for m, f in state.adapter.items():
            weights = {k: n / sum(norms[m].values()) for k, n in norms[m].items()}
            share = np.array(
                [sum(w for k, w in weights.items() if starts[k][m].rank > j) for j in range(LARGEST)]
            )
            by_norm[m] = f.scaling * (f.B.numpy() * share**2) @ f.A.numpy()
        if worst(after, by_norm) < 1e-9:
            return "row j x P(r >= j)^2, P by norms"
    return "changed"


def average(name: str) -> str:
    """The next model against what there was, plus the weighted mean of the clients' products."""
    strategy, kept = make(name), {}
    state = start(strategy, kept)
    if strategy.sends(state) == NEITHER or not strategy.traits.has_global_model:
        return "-"
    trained: dict[int, AdapterState] = {}
    starts: dict[int, AdapterState] = {}
    noise = learns_noise(77)

    def learn(client_id: int, received: AdapterState) -> AdapterState:
        starts[client_id] = received
        new = noise(client_id, received)
        sides = strategy.sends(state)
        trained[client_id] = AdapterState(
            {
                m: LoraFactors(
                    f.A if "A" in sides else received[m].A, f.B if "B" in sides else received[m].B, f.scaling
                )
                for m, f in new.items()
            }
        )
        return new

    next_state = play(strategy, state, learn, kept)
    after = total(strategy, next_state)
    base = products(state.base_update) if state.base_update is not None else dict.fromkeys(TARGETS, 0.0)
    p = shares(strategy)
    mean = {m: base[m] + sum(p[k] * products(adapter)[m] for k, adapter in trained.items()) for m in TARGETS}
    if worst(after, mean) < 1e-9:
        return "exact"
    if worst(after, {m: best_of_rank(mean[m], LARGEST) for m in TARGETS}) < 1e-9:
        return "best of rank r_max"
    if "full" in state.strategy_state:
        full, new = products(state.strategy_state["full"]), products(next_state.strategy_state["full"])
        change = {
            m: sum(p[k] * (products(adapter)[m] - products(starts[k])[m]) for k, adapter in trained.items())
            for m in TARGETS
        }
        if worst(new, {m: full[m] + change[m] for m in TARGETS}) < 1e-9:
            return "change exact; best of rank r_max travels"
    return "no"


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def one_client(name: str) -> str:
    """A cohort of one client of the largest rank: the next model against the client's own."""
    strategy, kept = make(name), {}
    state = start(strategy, kept)
    who = POOLED_CLIENT if strategy.traits.trains_pool else 1
    own: dict[str, np.ndarray] = {}

    def learn(client_id: int, received: AdapterState) -> AdapterState:
        new = learns_noise(9)(client_id, received)
        client = Client(client_id, ranks_of(strategy)[who], kept.get(client_id, {}))
        plan = strategy.plan(state, client, strategy.download(state, client.lora_ranks))
        factors = {
            m: LoraFactors(
                f.A if "A" in plan.trains else plan.start[m].A,
                f.B if "B" in plan.trains else plan.start[m].B,
                f.scaling,
            )
            for m, f in new.items()
        }
        own.update(products(combine(AdapterState(factors), state.base_update)))
        return new

    next_state = play(strategy, state, learn, kept, {who: ranks_of(strategy)[who]})
    after = total(strategy, next_state, personal(strategy, who, kept))
    return "yes" if worst(after, own) < 1e-9 else "no"


def relabelled(name: str) -> str:
    """The same clients under other numbers, and so in another order of summation."""
    if make(name).traits.trains_pool:
        return "-"
    order = {0: 3, 3: 0, 1: 4, 4: 1, 2: 2}
    results = []
    for mapping in ({k: k for k in order}, order):
        strategy, kept = make(name), {}
        ranks = {mapping[k]: r for k, r in ranks_of(strategy).items()}
        back = {new: old for old, new in mapping.items()}
        examples = {mapping[k]: n for k, n in EXAMPLES.items()}
        state = ServerState(0, random_adapter(5, LARGEST))
        # strategies that give each client a start of its own are compared from a common one
        common = strategy.download(state, dict.fromkeys(TARGETS, LARGEST))
        for index in range(2):
            train = under_other_numbers(index, back, common if name == "flora" else None)
            state = one_round(strategy, state, ranks, train, examples, kept).state
        who = personal(strategy, mapping[1], kept)
        if who is not None:
            who = Client(who.client_id, ranks[who.client_id], kept[who.client_id])
        results.append(total(strategy, state, who))
    return "same" if worst(results[1], results[0]) < 1e-8 else "differs"


def under_other_numbers(seed: int, back: Mapping[int, int], common: AdapterState | None) -> Training:
    """`learns_noise` of the client that had the number before; from `common`, cut to its rank, if that is given."""

    def train(client: int, received: AdapterState) -> AdapterState:
        own = received
        if common is not None:
            own = AdapterState({m: first(common[m], factors) for m, factors in received.items()})
        return learns_noise(seed)(back[client], own)

    return train


def first(whole: LoraFactors, like: LoraFactors) -> LoraFactors:
    return LoraFactors(whole.A[: like.rank], whole.B[:, : like.rank] * 0, like.scaling)


def kept_apart(name: str) -> str:
    """What client 1 does not send, changed: nobody else may notice."""
    strategy = make(name)
    state = start(strategy, {})
    hidden = BOTH - strategy.sends(state)
    if not hidden:
        return "all is sent"
    seen = []
    for shift in (0.0, 1.0):
        kept: dict[int, ClientState] = {}
        state = start(strategy, kept)

        def learn(client_id: int, received: AdapterState, shift: float = shift) -> AdapterState:
            new = learns_noise(3)(client_id, received)
            if client_id != 1:
                return new
            return AdapterState(
                {
                    m: LoraFactors(
                        f.A + (shift if "A" in hidden else 0),
                        f.B + (shift if "B" in hidden else 0),
                        f.scaling,
                    )
                    for m, f in new.items()
                }
            )

        after = play(strategy, state, learn, kept)
        others = {k: {n: t.numpy().tobytes() for n, t in s.items()} for k, s in kept.items() if k != 1}
        seen.append((bits(after), others))
    return "stays" if seen[0] == seen[1] else "leaks"


def bits(state: ServerState) -> dict[str, bytes]:
    return {
        f"{name}|{m}": f.A.numpy().tobytes() + f.B.numpy().tobytes()
        for name, adapter in state.adapters().items()
        for m, f in adapter.items()
    }


def honours_scaling(name: str) -> str:
    """Twice the lora_alpha and half of every B: the same products throughout."""
    results = []
    for factor in (1.0, 2.0):
        strategy, kept = make(name, 16.0 * factor), {}
        state = ServerState(0, restated(random_adapter(5, LARGEST), factor))
        for index in range(2):
            noise = learns_noise(index)

            def train(
                client: int, received: AdapterState, noise: Training = noise, factor: float = factor
            ) -> AdapterState:
                return restated(noise(client, restated(received, 1.0 / factor)), factor)

            def plain(client: int, received: AdapterState, noise: Training = noise) -> AdapterState:
                return noise(client, received)

            in_stage_one = name == "slora" and state.round_index < 1  # full weights have no lora_alpha
            state = play(strategy, state, plain if in_stage_one else train, kept)
        results.append(total(strategy, state, personal(strategy, 1, kept)))
    return "yes" if worst(results[1], results[0]) < 1e-9 else "no"


def resumes(name: str, folder: Path) -> str:
    """A round from a checkpoint that was written and read, against the round without."""
    strategy, kept = make(name), {}
    state = start(strategy, kept)
    save_checkpoint(state, folder / name, 1)
    loaded = load_newest_checkpoint(folder / name)
    assert loaded is not None
    again = {client: {n: t.clone() for n, t in tensors.items()} for client, tensors in kept.items()}
    one = play(strategy, state, learns_noise(8), kept)
    other = play(strategy, loaded, learns_noise(8), again)
    return "same bits" if bits(one) == bits(other) else "differs"


def whole_rounds(group: Group, folder: Path) -> dict[str, Any]:
    """Strategy -> everything that three rounds with real local training leave and report."""
    return {name: case_rounds(group, name, folder, False) for name in STRATEGY_NAMES}


def on_two_processes(folder: Path) -> dict[str, str]:
    alone = whole_rounds(SoloGroup(), folder)
    ranks = run_ranks(whole_rounds, 2, folder, folder, timeout_s=280.0)
    return {
        name: "same bits" if all(rank[name] == found for rank in ranks) else "differ"
        for name, found in alone.items()
    }


COLUMNS: Mapping[str, Callable[[str], str]] = {
    "no-op round": no_op_round,
    "mean of products": average,
    "one client = local": one_client,
    "renumbered clients": relabelled,
    "what is not sent": kept_apart,
    "alpha / r honoured": honours_scaling,
}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    processes = on_two_processes(tmp_path_factory.mktemp("processes"))
    return {
        name: {column: measure(name) for column, measure in COLUMNS.items()}
        | {"resume": resumes(name, folder), "1 or 2 processes": processes[name]}
        for name in STRATEGY_NAMES
    }


def printed(matrix: Mapping[str, Mapping[str, str]]) -> str:
    columns = [*COLUMNS, "resume", "1 or 2 processes"]
    lines = [f"| strategy | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    lines += [f"| `{name}` | {' | '.join(cells[c] for c in columns)} |" for name, cells in matrix.items()]
    return "\n".join(lines)


def test_the_printed_matrix_is_the_measured_one(matrix, refresh_golden):
    text = DOCS.read_text(encoding="utf-8")
    found = re.search(f"{BEGIN}\n(.*?)\n?{END}", text, re.DOTALL)
    assert found, f"{DOCS.name} must have the marks {BEGIN} and {END}"
    if refresh_golden:
        rewritten = text[: found.start()] + f"{BEGIN}\n{printed(matrix)}\n{END}" + text[found.end() :]
        DOCS.write_text(rewritten, encoding="utf-8")
        return
    assert found[1].splitlines() == printed(matrix).splitlines()


def test_the_table_of_methods_names_their_tests():
    rows = re.findall(
        r"^\| `(\w+)` \|.*\]\(\.\./(tests/aggregation/\w+\.py)\) \|$", DOCS.read_text(encoding="utf-8"), re.M
    )
    assert [name for name, _ in rows] == sorted(STRATEGY_NAMES, key=[name for name, _ in rows].index)
    for name, path in rows:
        text = (DOCS.parents[1] / path).read_text(encoding="utf-8")
        module = f"fedsim.aggregation.{'hetlora' if name == 'hetlora_naive' else name} import"
        assert module in text or f'"{name}"' in text, f"{path} does not test {name}"


def test_no_strategy_may_fail_these(matrix):
    for name, cells in matrix.items():
        assert cells["no-op round"] != "changed", name
        assert cells["alpha / r honoured"] == "yes", name
        assert cells["resume"] == cells["1 or 2 processes"] == "same bits", name
        assert cells["what is not sent"] in ("stays", "all is sent"), name
        assert cells["renumbered clients"] in ("same", "-"), name


def test_the_matrix_can_tell_a_wrong_strategy(monkeypatch):
    """The measurements themselves: a mean of factors is not FlexLoRA, and a lost alpha/r shows."""
    assert average("fedavg") == "no"
    assert average("ffa") == "exact"
    assert average("flexlora") == "best of rank r_max"

    from fedsim.aggregation import averaging

    def forgets_scaling(cohort: Any, weights: Any) -> LoraFactors:
        mean = averaging.weighted_sum([f.B for f in cohort], weights)
        return LoraFactors(averaging.weighted_sum([f.A for f in cohort], weights), mean, 1.0)

    monkeypatch.setattr("fedsim.aggregation.fedavg.average_factors", forgets_scaling)
    assert honours_scaling("fedavg") == "no"


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_mixed_ranks_are_refused_where_they_cannot_be_combined(name):
    wanted = ["lora.tiers=[{share: 0.5, rank: 1}, {share: 0.5, rank: 3}]", f"strategy.name={name}"]
    if name == "scaffold":
        wanted += [
            "training.optimizer.name=sgd",
            "training.max_grad_norm=null",
            "aggregation.client_weights=uniform",
        ]
    alike = load_config(None, wanted[1:])
    if build_federated_strategy(alike, TARGETS, build_tiers(alike, TARGETS, 20), 20).traits.mixed_ranks:
        config = load_config(None, wanted)
        assert build_federated_strategy(config, TARGETS, build_tiers(config, TARGETS, 20), 20).name == name
        return
    with pytest.raises(
        ConfigError, match=f"lora.tiers must give all clients the same LoRA ranks with .*{name}, got 2 tiers"
    ):
        load_config(None, wanted)
    with pytest.raises(ConfigError, match=f"lora.distribution must give .*{name}, got 'uniform'"):
        load_config(None, ["lora.distribution=uniform", *wanted[1:]])
    with pytest.raises(ConfigError, match=f"lora.rank_schedule must not change .*{name}.*, got 1 phases"):
        load_config(None, ["lora.rank_schedule=[{from_round: 1, scale: 0.5}]", *wanted[1:]])
    # formally different, but the same ranks
    for formal in (
        ["lora.rank_schedule=[{from_round: 1, scale: 0.9}]", "lora.rank=2"],
        ["lora.tiers=[{rank: 2}, {rank: 4, module_ranks: {q_proj: 2, fc1: 2}}]"],
        ["lora.distribution=uniform", "lora.rank_scale=0.001"],
    ):
        if name == "fedsa" and "schedule" in formal[0]:
            continue  # whose clients keep their adapters, so that it takes no schedule at all
        config = load_config(None, [*formal, *wanted[1:]])
        tiers = build_tiers(config, TARGETS, 20)
        assert not tiers.are_mixed
        build_federated_strategy(config, TARGETS, tiers, 20)
    # which ranks clients come to have by their data, or by a function, is known later
    config = load_config(None, ["lora.distribution=by_size", "lora.rank=4", *wanted[1:]])
    mixed = build_tiers(config, TARGETS, 20, np.arange(1, 21))
    assert mixed.are_mixed
    with pytest.raises(ConfigError, match=f"lora.distribution must give all clients .*{name}"):
        build_federated_strategy(config, TARGETS, mixed, 20)


@pytest.mark.parametrize("name", [*KNOWN, "slora"])
@pytest.mark.parametrize("then", ["fedavg", "flexlora", "hetlora", "hetlora_naive"])
def test_the_configuration_knows_the_traits_of_strategies(name, then):
    """What it refuses before any code of a strategy is loaded is what the strategy would refuse."""
    arguments = {"then": then, "rounds": 1, "density": 0.2} if name == "slora" else None
    traits = build_strategy(
        name, make_federation(LARGEST, num_clients=5, weighting="uniform"), arguments
    ).traits
    known = known_traits(name, then)
    for field in fields(known):
        assert getattr(traits, field.name) == getattr(known, field.name), field.name
    assert set(KNOWN) | {"slora"} == set(STRATEGY_NAMES)
    ranks = {rank for kind in TYPES for rank in (kind.attention, kind.feed_forward)}
    assert (min(ranks), max(ranks)) == (SMALLEST_TYPE, LARGEST_TYPE)


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_on_a_gpu_as_on_the_cpu(name, cuda):
    """Two rounds on tensors of either device; products agree to rounding."""

    def on(device: torch.device) -> dict[str, np.ndarray]:
        strategy, kept = make(name), {}
        state = ServerState(0, random_adapter(5, LARGEST)).to(device)
        for index in range(2):
            noise = learns_noise(index)

            def train(client: int, received: AdapterState, noise: Training = noise) -> AdapterState:
                return noise(client, received.to("cpu")).to(device)

            state = play(strategy, state, train, kept)
        assert all(f.A.device == device for entry in state.adapters().values() for f in entry.values())
        cpu = {k: {n: t.cpu() for n, t in s.items()} for k, s in kept.items()}
        return total(strategy, state.to("cpu"), personal(strategy, 1, cpu))

    assert worst(on(cuda), on(torch.device("cpu"))) < 1e-9
