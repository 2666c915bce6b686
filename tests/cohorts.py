"""What tests of strategies need: random adapters, cohorts, and one round of a strategy without any training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from hypothesis import strategies as st

from fedsim.aggregation.strategy import Aggregated, Federation, Strategy
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule
from fedsim.lora.plan import NO_STATE, Client, ClientPlan, ClientState, absent
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport

TARGETS = {"layers.0.q_proj": (12, 10), "layers.1.fc1": (9, 14)}
"""Module -> (in, out features)."""


def make_federation(
    max_rank: int = 4, targets: Mapping[str, tuple[int, int]] = TARGETS, **changes: Any
) -> Federation:
    """A federation of ten clients with lora_alpha 16 and client weights by examples."""
    values: dict[str, Any] = {
        "num_clients": 10,
        "cohort_size": 4,
        "weighting": "examples",
        "scaling": ScalingRule(16.0),
        "targets": dict(targets),
        "max_ranks": dict.fromkeys(targets, max_rank),
        "seed": 3,
    }
    return Federation(**{**values, **changes})


def make_report(client_id: int, num_examples: int = 10, **changes: Any) -> ClientReport:
    """A report of five steps of SGD with learning rate 0.1 in all."""
    values: dict[str, Any] = {
        "client_id": client_id, "num_examples": num_examples, "num_tokens": 7 * num_examples, "lora_rank": 1,
        "steps": 5, "train_loss_first": 2.0, "train_loss_last": 1.0, "train_loss_mean": 1.5, "trained_tokens": 70,
        "trained_parameters": 1, "lr_sum": 0.1, "uplink_bytes": 1, "downlink_bytes": 1, "pack": 0,
        "process_rank": 0, "seconds": 0.1,
    }  # fmt: skip
    return ClientReport(**{**values, **changes})


def random_adapter(
    seed: int,
    lora_rank: int | Mapping[str, int] = 4,
    targets: Mapping[str, tuple[int, int]] = TARGETS,
    scaling: ScalingRule = ScalingRule(16.0),  # noqa: B008
    dtype: torch.dtype = torch.float64,
) -> AdapterState:
    """Standard normal factors."""
    generator = torch.Generator().manual_seed(seed)
    ranks = lora_rank if isinstance(lora_rank, Mapping) else dict.fromkeys(targets, lora_rank)
    return AdapterState(
        {
            module: LoraFactors(
                torch.randn(ranks[module], i, generator=generator, dtype=dtype),
                torch.randn(o, ranks[module], generator=generator, dtype=dtype),
                scaling(ranks[module]),
            )
            for module, (i, o) in targets.items()
        }
    )


@dataclass(frozen=True)
class CohortCase:
    """One module and the clients of one round.

    Attributes:
        out_features, in_features: of the module.
        largest: largest LoRA rank of any client of the federation; nobody in the cohort need have it.
        ranks: LoRA rank of each client; may exceed both sides of the module.
        examples: of each client.
        alike: all clients end with the same factors, of rank `largest`.
        content: what they end with: random factors, B = 0, or products of rank 1 at most with one A among all.
        size: of the values.
        fresh: B of the server's adapter is 0, as in round 0.
        seed: of the values.
    """

    out_features: int
    in_features: int
    largest: int
    ranks: tuple[int, ...]
    examples: tuple[int, ...]
    alike: bool
    content: Literal["random", "zero B", "rank one"]
    size: float
    fresh: bool
    seed: int

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """Module -> (in, out features)."""
        return {"layers.0.q_proj": (self.in_features, self.out_features)}

    def with_one_rank(self) -> "CohortCase":
        """The same with `largest` as everybody's rank."""
        return replace(self, ranks=(self.largest,) * len(self.ranks))

    def within_the_module(self) -> "CohortCase":
        """The same without ranks above the module's smaller side."""
        most = min(self.out_features, self.in_features)
        return replace(
            self, largest=min(self.largest, most), ranks=tuple(min(rank, most) for rank in self.ranks)
        )

    def train(self, client_id: int, start: AdapterState) -> AdapterState:
        """What a client ends with, wherever it started."""
        return self.values(start, 0 if self.alike else client_id)

    def values(self, like: AdapterState, key: int) -> AdapterState:
        """Factors with the shapes and scalings of `like`."""
        generator = torch.Generator().manual_seed(1000 * self.seed + key)
        common = torch.Generator().manual_seed(1000 * self.seed + 999)

        def draw(rows: int, columns: int, source: torch.Generator = generator) -> torch.Tensor:
            return self.size * torch.randn(rows, columns, generator=source, dtype=torch.float64)

        modules = {}
        for module, factors in like.items():
            (rank, i), o = factors.A.shape, factors.B.shape[0]
            down, up = draw(rank, i), draw(o, rank)
            if self.content == "zero B":
                up = torch.zeros_like(up)
            elif self.content == "rank one":
                down = draw(1, i, common).expand(rank, i).clone()
            modules[module] = LoraFactors(down, up, factors.scaling)
        return AdapterState(modules)


@st.composite
def cohort_cases(draw: Callable[..., Any]) -> CohortCase:
    """Cohorts of one to five clients on a module of 1 to 9 features on each side, with LoRA ranks up to 12."""
    num_clients, largest = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    alike = draw(st.booleans())

    def each(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(st.lists(values, min_size=num_clients, max_size=num_clients)))

    return CohortCase(
        out_features=draw(st.integers(1, 9)),
        in_features=draw(st.integers(1, 9)),
        largest=largest,
        ranks=(largest,) * num_clients if alike else each(st.integers(1, largest)),
        examples=each(st.integers(1, 30)),
        alike=alike,
        content=draw(st.sampled_from(["random", "zero B", "rank one"])),
        size=draw(st.sampled_from([1.0, 1e-5, 1e5])),
        fresh=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def stream(
    adapters: Sequence[AdapterState], modules: Sequence[str] | None = None
) -> Iterator[tuple[str, tuple]]:
    """The factors of a cohort, module by module."""
    for module in modules or list(adapters[0]):
        yield module, tuple(adapter[module] for adapter in adapters)


Training = Callable[[int, AdapterState], AdapterState]
"""(client_id, start) -> trained adapter."""


def nothing_learned(client_id: int, start: AdapterState) -> AdapterState:
    """A client that returns what it received."""
    return start


def one_round(
    strategy: Strategy,
    state: ServerState,
    ranks: Mapping[int, Mapping[str, int]],
    train: Training = nothing_learned,
    num_examples: Mapping[int, int] | None = None,
    client_states: dict[int, ClientState] | None = None,
) -> Aggregated:
    """Download, plan, `train`, upload and aggregate, as the server does it, for the clients in `ranks`.

    Args:
        strategy: under test.
        state: before the round.
        ranks: client_id -> module -> LoRA rank.
        train: stands for local training; sides that the plan does not train are put back.
        num_examples: client_id -> weight; equal by default.
        client_states: what was kept for each client; written to.
    """
    kept = {} if client_states is None else client_states
    uploads, reports = [], []
    for client_id in sorted(ranks):
        client = Client(client_id, ranks[client_id], kept.get(client_id, NO_STATE))
        plan = strategy.plan(state, client, strategy.download(state, client.lora_ranks))
        trained = settled(plan, train(client_id, plan.start))
        report = make_report(client_id, 10 if num_examples is None else num_examples[client_id])
        upload = strategy.upload(state, client, plan, trained, report)
        if upload.client_state is not None:
            kept[client_id] = upload.client_state
        uploads.append(_sent(upload.adapter, strategy.sends(state)))
        reports.append(report)
    return strategy.aggregate(state, reports, stream(uploads))


def settled(plan: ClientPlan, trained: AdapterState) -> AdapterState:
    """What training ends with: values that the plan does not train are those of its start."""

    def of_module(module: str, factors: LoraFactors) -> LoraFactors:
        start = plan.start[module]
        sides = {side: getattr(factors if side in plan.trains else start, side) for side in ("A", "B")}
        if plan.mask is not None:
            mask = plan.mask[module]
            sides = {
                side: torch.where(getattr(mask, side), tensor, getattr(start, side))
                for side, tensor in sides.items()
            }
        return LoraFactors(sides["A"], sides["B"], factors.scaling)

    return AdapterState({module: of_module(module, factors) for module, factors in trained.items()})


def _sent(adapter: AdapterState, sides: frozenset) -> AdapterState:
    """What arrives: factors that do not travel are NaN."""

    def hidden(tensor: torch.Tensor, side: str) -> torch.Tensor:
        return tensor if side in sides else absent(tuple(tensor.shape), tensor.dtype, tensor.device)

    return AdapterState(
        {m: LoraFactors(hidden(f.A, "A"), hidden(f.B, "B"), f.scaling) for m, f in adapter.items()}
    )


def products(adapter: AdapterState) -> dict[str, Any]:
    """Module -> scaling * B A as a float64 numpy array: what tests compare, for factors are not unique."""
    return {m: f.scaling * (f.B.double().numpy() @ f.A.double().numpy()) for m, f in adapter.items()}


def restated(adapter: AdapterState, factor: float) -> AdapterState:
    """The same products with another lora_alpha: scaling times `factor`, B divided by it."""
    return AdapterState({m: LoraFactors(f.A, f.B / factor, f.scaling * factor) for m, f in adapter.items()})


def learns_noise(seed: int, restate: Mapping[int, float] | None = None) -> Training:
    """Training that adds standard normal noise of the client to both factors; some return it `restated`."""

    def train(client_id: int, start: AdapterState) -> AdapterState:
        generator = torch.Generator().manual_seed(1000 * seed + client_id)
        trained = start.map(
            lambda x: x + torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        )
        return restated(trained, (restate or {}).get(client_id, 1.0))

    return train
