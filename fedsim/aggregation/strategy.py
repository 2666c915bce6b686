"""What a federated method is, to the rest of fedsim.

Strategies are small final classes without inheritance among them; what two share is a function. They are pure: tensors
in, new tensors out, no process group, clock or global generator, and nothing is written into an argument.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule
from fedsim.lora.plan import Client, ClientPlan, Sides, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport

FactorStream = Iterator[tuple[str, tuple[LoraFactors, ...]]]
"""(module, the cohort's factors of that module in client_id order), one module after another."""

ClientWeights = Literal["examples", "tokens", "uniform"]
"""Weight of a client in a mean: its training examples, its label tokens, or 1."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What the rest of fedsim must know about a strategy.

    Attributes:
        reduce: "sum" if the next adapter depends on the updates only through their mean, sum_k p_k x_k, factor by
            factor; then a server optimizer or differential privacy may stand around the strategy. Else "stack".
        takes_mean: `aggregate` may be given the mean of the cohort in place of its clients: one virtual client (see
            `fedsim.aggregation.pack_sums`). Each process then adds up its clients' factors pack by pack, and only the
            sums travel. Implies one LoRA rank, and weights as `aggregation.client_weights` says.
        mixed_ranks: clients may have different LoRA ranks.
        changes_base: `aggregate` may return a `base_update`.
        keeps_client_state: `upload` may return a `client_state`.
        has_global_model: False if no adapter speaks for all clients; the global test loss is then the mean over the
            cohort's own adapters.
        trains_pool: the cohort's clients are replaced by one virtual client with the pooled data of all clients.
        uses_client_weights: `aggregation.client_weights` has an effect.
        takes_empty_cohorts: `aggregate` wants to be called for a round without clients as well.
    """

    reduce: Literal["sum", "stack"]
    takes_mean: bool = False
    mixed_ranks: bool = False
    changes_base: bool = False
    keeps_client_state: bool = False
    has_global_model: bool = True
    trains_pool: bool = False
    uses_client_weights: bool = True
    takes_empty_cohorts: bool = False


@dataclass(frozen=True, slots=True)
class Federation:
    """What strategies may know about a run when they are built.

    Attributes:
        num_clients: of the federation.
        cohort_size: clients of a round, expected ones if they are drawn independently.
        weighting: as in `aggregation.client_weights`.
        scaling: factor on B A as a function of the LoRA rank.
        targets: dotted module path -> (in, out features), in the base's order.
        max_ranks: module -> largest LoRA rank of any client.
        seed: the run's seed.
        tier_ranks: resource tier -> module -> LoRA rank, of those that have clients; empty where all clients are alike.
    """

    num_clients: int
    cohort_size: float
    weighting: ClientWeights
    scaling: ScalingRule
    targets: Mapping[str, tuple[int, int]]
    max_ranks: Mapping[str, int]
    seed: int
    tier_ranks: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def ranks_by_tier(self, module: str) -> dict[int, int]:
        """Resource tier -> LoRA rank of a module."""
        return {tier: ranks[module] for tier, ranks in self.tier_ranks.items()}


@dataclass(frozen=True, slots=True)
class Aggregated:
    """What `Strategy.aggregate` returns.

    Attributes:
        state: of the next round.
        by_module: module -> figure -> value; the record of a round holds the means over modules.
        spectra: module -> singular values of the average update, largest first.
    """

    state: ServerState
    by_module: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class Strategy(Protocol):
    """A federated method.

    Attributes:
        name: as in `strategy.name`.
        traits: see `Traits`.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def traits(self) -> Traits: ...  # noqa: D102

    def sends(self, state: ServerState) -> Sides:
        """The factors that clients return in this round; the others reach `aggregate` as NaN."""
        ...

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:
        """The adapter for clients of some LoRA ranks; called once a round for each set of ranks.

        Args:
            state: before the round.
            lora_ranks: module -> LoRA rank.
        """
        ...

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:
        """What a client does with what it received; see `ClientPlan`.

        Args:
            state: before the round.
            client: who it is, and what was kept for it.
            received: from `download`, shared with other clients.
        """
        ...

    def upload(
        self,
        state: ServerState,
        client: Client,
        plan: ClientPlan,
        trained: AdapterState,
        report: ClientReport,
    ) -> Upload:
        """What a client returns. Called where the client was trained.

        Args:
            state: before the round.
            client: as in `plan`.
            plan: what `plan` returned.
            trained: the adapter after local training.
            report: of the local run.
        """
        ...

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """The state of the next round.

        Each module must be aggregated by itself: when the work is shared by module, a process sees only its own modules
        in the stream, and returns adapters that hold only these.

        Args:
            state: before the round.
            reports: K reports in client_id order.
            factors: the same K clients' uploads, streamed module by module, in any order of the modules.

        Raises:
            AggregationError: the updates cannot be combined.
        """
        ...

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:
        """The adapter to use on top of the (updated) base: the global one, or that of a client."""
        ...
