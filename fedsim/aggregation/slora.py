"""SLoRA (arXiv 2308.06522): sparse full-weight rounds first, then LoRA from the decomposition of what they learned.

Shapes: o / i = out / in features of a module, r = its largest LoRA rank, n = its weights that train in stage 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from fedsim.aggregation.averaging import client_weights, weighted_sum
from fedsim.aggregation.spectrum import factors_of
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Strategy, Traits
from fedsim.errors import ConfigError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.lowrank import full_rank
from fedsim.lora.plan import BOTH, ONLY_A, ONLY_B, Client, ClientPlan, Sides, Upload, sides_bytes
from fedsim.lora.state import ServerState
from fedsim.lora.svd import product_svd
from fedsim.lora.updates import POOLED_CLIENT, ClientReport
from fedsim.seeding import numpy_generator

SPARSE = "sparse"
"""Name in `ServerState.strategy_state` of what stage 1 has learned so far: one value for each weight that trains."""


@final
@dataclass(frozen=True, slots=True)
class SLoRA:
    """Stage 1, rounds 0 to `rounds` - 1: clients train a random, fixed and common choice M of each module's weights.

        W_k = W_0 + M * D_k,    D = sum_k p_k D_k                 full weights, without LoRA; D = 0 at first

    All clients and rounds have the same M, so that the mean has the density of one update (our reading of the paper,
    whose text was not at hand). Where clients have densities of their own, M is that of the largest, and a client
    trains a part of M: that of a smaller density lies within that of every larger one. It receives all of D, keeps
    the values outside its part, with which it enters the mean, and sends the others. Stage 2 starts from the best
    approximation of rank r, U S V^T = svd(M * D):

        A = V_r^T,    B = U_r S_r / scaling(r)                    so that scaling(r) B A = svd_r(M * D)

    on the base as it was loaded, and goes on as another strategy: FedAvg where all have one LoRA rank, FlexLoRA or
    HetLoRA where they do not; as components are sorted by singular value, the first r of them are the best
    approximation for a client of any smaller rank r. Where the rank of D is below r, rows of A are those of a fresh
    adapter, and columns of B are zero.

    For the trainer a full weight is LoRA of full rank with the identity on the smaller side, frozen, and scaling 1. The
    values of D at M travel, in both directions; their positions follow from the run's seed.

    Departs from the published code (FlexLoRA's repository), which draws another M for each client and round, so that
    the mean is nearly dense and the values in it shrink; decays weights outside of M; and for mixed ranks drops what
    stage 1 has learned. The weights of modules without adapter stay as they are, while the paper's stage 1 may train
    them. Weight decay, if there is any, pulls D towards 0, and dropout on adapters' inputs also applies to D x.

    Attributes:
        federation: what the run looks like.
        rounds: of stage 1, > 0.
        density: n / (o i), in (0, 1]; rounded to whole weights, at least one of each module.
        then: the strategy of stage 2, one that starts from `ServerState.adapter` alone.
        client_densities: client -> its density, in place of `density`; empty for one density. The virtual client of
            pooled data has the largest.
        positions: module -> (n,) sorted indices of M in the row-major (o, i) weight, int64 on the CPU.
        parts: density -> module -> (n,) bool on the CPU: which entries of `positions` a client of that density trains.
    """

    federation: Federation
    rounds: int
    density: float
    then: Strategy
    client_densities: tuple[float, ...] = ()
    name: str = "slora"
    positions: Mapping[str, Tensor] = field(init=False, repr=False, compare=False)
    parts: Mapping[float, Mapping[str, Tensor]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"strategy.slora.rounds must be positive, got {self.rounds}")
        for density in (self.density, *self.client_densities):
            if not 0 < density <= 1:
                raise ConfigError(f"strategy.slora.density must be in (0, 1], got {density}")
        if len(self.client_densities) not in (0, self.federation.num_clients):
            raise ConfigError(
                f"strategy.slora: {self.federation.num_clients} clients must have a density each, or none of them, got "
                f"{len(self.client_densities)}"
            )
        densities = sorted({*self.client_densities} or {self.density}, reverse=True)
        seed, sizes = self.federation.seed, {m: i * o for m, (i, o) in self.federation.targets.items()}
        positions = {
            m: draw_positions(m, num_weights, densities[0], seed) for m, num_weights in sizes.items()
        }
        parts = {
            density: {m: draw_part(m, len(positions[m]), sizes[m], density, seed) for m in sizes}
            for density in densities
        }
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "parts", parts)

    @property
    def traits(self) -> Traits:
        """Those of stage 2, but that nothing is wrapped around it, for the change of stages is no mean.

        That change also happens in a round without clients. Stage 1 has use for client weights in any case.
        """
        return replace(
            self.then.traits,
            reduce="stack",
            takes_mean=False,
            takes_empty_cohorts=True,
            uses_client_weights=True,
        )

    def sends(self, state: ServerState) -> Sides:
        """In stage 1 the values, which travel as A."""
        return ONLY_A if self._is_sparse(state) else self.then.sends(state)

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:
        """In stage 1 the masked weights as factors of full rank, the same for all ranks."""
        return self._dense(state) if self._is_sparse(state) else self.then.download(state, lora_ranks)

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:
        """In stage 1: train the client's part of M, and send that; the server has the other values at M."""
        if not self._is_sparse(state):
            return self.then.plan(state, client, received)
        part = self._part(client)
        mask = {module: self._mask(module, factors, part[module]) for module, factors in received.items()}
        dense_sides = {_dense_side(factors) for factors in received.values()}
        trains = BOTH if len(dense_sides) > 1 else (ONLY_A if dense_sides == {"A"} else ONLY_B)
        return ClientPlan(
            received,
            trains=trains,
            mask=AdapterState(mask),
            downlink_bytes=sides_bytes(self._sparse(state), ONLY_A),
            uplink_bytes=sum(
                int(part[module].count_nonzero()) * factors.A.element_size()
                for module, factors in received.items()
            ),
        )

    def upload(
        self,
        state: ServerState,
        client: Client,
        plan: ClientPlan,
        trained: AdapterState,
        report: ClientReport,
    ) -> Upload:
        """In stage 1 the values at M, (1, n) in place of A; B says nothing and does not travel."""
        if not self._is_sparse(state):
            return self.then.upload(state, client, plan, trained, report)
        values = {
            module: _as_values(getattr(factors, _dense_side(factors)).take(self._at(module, factors)))
            for module, factors in trained.items()
        }
        return Upload(AdapterState(values))

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """In stage 1 average the values; after its last round, decompose them and go over to stage 2.

        A round without clients changes no value. Figure of the last round: `slora/energy_kept`, the share of ||D||_F^2
        that the approximation of rank r keeps.
        """
        following = replace(state, round_index=state.round_index + 1)
        if not self._is_sparse(state):
            is_idle = not reports and not self.then.traits.takes_empty_cohorts
            return Aggregated(following) if is_idle else self.then.aggregate(state, reports, factors)
        weights = client_weights(reports, self.federation.weighting) if reports else ()
        held = self._sparse(state)
        means = {
            module: weighted_sum([update.A for update in cohort], weights) if cohort else held[module].A
            for module, cohort in factors
        }
        entries = {name: entry for name, entry in state.strategy_state.items() if name != SPARSE}
        if self._is_sparse(following):
            entries[SPARSE] = AdapterState({module: _as_values(values) for module, values in means.items()})
            return Aggregated(replace(following, strategy_state=entries))
        found = {module: self._low_rank(module, values) for module, values in means.items()}
        adapter = AdapterState({module: factors for module, (factors, _) in found.items()})
        return Aggregated(
            replace(following, adapter=adapter, strategy_state=entries),
            {module: {"slora/energy_kept": share} for module, (_, share) in found.items()},
        )

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:
        """In stage 1 the masked weights as factors of full rank."""
        return self._dense(state) if self._is_sparse(state) else self.then.export(state, client)

    def _is_sparse(self, state: ServerState) -> bool:
        return state.round_index < self.rounds

    def _sparse(self, state: ServerState) -> AdapterState:
        """Module -> the values of D at M, (1, n) as A; zeros before the first round."""
        if SPARSE in state.strategy_state:
            return state.strategy_state[SPARSE]
        return AdapterState(
            {
                module: _as_values(factors.A.new_zeros(self.positions[module].numel()))
                for module, factors in state.adapter.items()
            }
        )

    def _dense(self, state: ServerState) -> AdapterState:
        return AdapterState(
            {
                module: full_rank(self._scatter(module, values.A))
                for module, values in self._sparse(state).items()
            }
        )

    def _scatter(self, module: str, values: Tensor) -> Tensor:
        """(o, i) of zeros, but for the values at M."""
        in_features, out_features = self.federation.targets[module]
        dense = values.new_zeros(out_features * in_features)
        dense[self.positions[module].to(values.device)] = values.reshape(-1)
        return dense.view(out_features, in_features)

    def _part(self, client: Client) -> Mapping[str, Tensor]:
        """Module -> which entries of `positions` the client trains."""
        if not self.client_densities:
            return self.parts[self.density]
        if client.client_id == POOLED_CLIENT:
            return self.parts[max(self.parts)]
        return self.parts[self.client_densities[client.client_id]]

    def _mask(self, module: str, factors: LoraFactors, part: Tensor) -> LoraFactors:
        """True where a part of M trains, in the factor that holds the weight; the identity's mask has no memory."""
        side = _dense_side(factors)
        chosen = self._scatter(module, part)
        other = getattr(factors, "A" if side == "B" else "B")
        nothing = torch.zeros((), dtype=torch.bool, device=other.device).expand(other.shape)
        chosen = chosen.to(other.device)
        return LoraFactors(*((chosen, nothing) if side == "A" else (nothing, chosen)), factors.scaling)

    def _at(self, module: str, factors: LoraFactors) -> Tensor:
        return self.positions[module].to(factors.A.device)

    def _low_rank(self, module: str, values: Tensor) -> tuple[LoraFactors, float]:
        """The best approximation of M * D by factors of rank r, and its share of the squared norm."""
        rank = self.federation.max_ranks[module]
        full = full_rank(self._scatter(module, values.double()))
        svd = product_svd(full.B, full.A, rank)
        share = float(svd.S.square().sum()) / svd.energy if svd.energy > 0 else 1.0
        return factors_of(svd, self.federation, module, rank, values.dtype), min(share, 1.0)


def draw_positions(module: str, num_weights: int, density: float, seed: int) -> Tensor:
    """(n,) int64, sorted: which weights of a module train, without replacement; n = density * num_weights, at least 1.

    From the stream (seed, module), so that clients, rounds and other modules have no say in it.
    """
    count = max(1, round(density * num_weights))
    drawn = numpy_generator(seed, f"slora_mask/{module}").choice(
        num_weights, size=count, replace=False, shuffle=False
    )
    drawn.sort()
    return torch.from_numpy(drawn)


def draw_part(module: str, num_positions: int, num_weights: int, density: float, seed: int) -> Tensor:
    """(num_positions,) bool: which of the drawn weights also train at a density that is no larger.

    From the stream (seed, module): the first n of one random order of them, so that parts are nested; all of them at
    the density of `draw_positions` itself.
    """
    count = max(1, round(density * num_weights))
    if count >= num_positions:
        return torch.ones(num_positions, dtype=torch.bool)
    order = numpy_generator(seed, f"slora_part/{module}").permutation(num_positions)
    part = torch.zeros(num_positions, dtype=torch.bool)
    part[torch.from_numpy(order[:count])] = True
    return part


def _dense_side(factors: LoraFactors) -> str:
    """Which factor of `full_rank` holds the matrix."""
    return "A" if factors.B.shape[0] <= factors.A.shape[1] else "B"


def _as_values(values: Tensor) -> LoraFactors:
    return LoraFactors(values.reshape(1, -1), values.new_ones(1, 1), 1.0)
