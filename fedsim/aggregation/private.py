"""Client-level differential privacy around a strategy that averages factors: DP-FedAvg (arXiv 1710.06963).

Letters: C = clipping norm, z = noise multiplier, m = expected cohort, x = the factors of all modules that travel.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fedsim.aggregation.pack_sums import virtual_report
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Strategy, Traits
from fedsim.errors import AggregationError, ConfigError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import Client, ClientPlan, Sides, Upload, absent
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport
from fedsim.seeding import torch_generator


@dataclass(frozen=True, slots=True)
class PrivacySettings:
    """The mechanism's numbers.

    Attributes:
        clip_norm: C, > 0.
        noise_multiplier: z, >= 0; 0 clips only, without any guarantee.
    """

    clip_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        key = "aggregation.privacy"
        if not 0 < self.clip_norm < float("inf"):
            raise ConfigError(f"{key}.clip_norm must be positive and finite, got {self.clip_norm}")
        if not 0 <= self.noise_multiplier < float("inf"):
            raise ConfigError(f"{key}.noise_multiplier must be >= 0 and finite, got {self.noise_multiplier}")


@final
@dataclass(frozen=True, slots=True)
class Private:
    """A strategy that averages factors, made differentially private with respect to whole clients.

    Arithmetic (arXiv 1710.06963, Algorithm 1 with flat clipping and the fixed-denominator estimator, weights 1):

        client:  u_k = (x_k - x) * min(1, C / ||x_k - x||_2)       all modules and travelling sides as one vector
        server:  mean = x + (sum_k u_k + N(0, (z C)^2)) / m        noise once per value, m = q * num_clients

    The wrapped strategy then aggregates one virtual client of weight 1 that holds `mean`, which is post-processing.

    Sensitivity: a client that joins or leaves changes sum_k u_k by its own u_k, of norm at most C; m is a constant, not
    the size of the cohort drawn. So a round is one Gaussian mechanism of noise multiplier z, subsampled at
    q if clients are drawn independently (`cohort.sampling=poisson`); see `PrivacyAccountant`. A cohort may be empty:
    then noise alone is added, as the mechanism demands.

    Protected, against whoever sees the global adapters of all rounds: whether a client took part at all in the run.

    Not protected:
      * what stays with a client, such as FedSA-LoRA's B: it does not travel, and gets neither clipped nor noise;
      * client reports (number of examples, losses), the list of drawn clients and all figures made from them, which are
        in the run's own records, and the clients' updates from the server itself, which is trusted;
      * choices made by looking at results, such as the best round or C.
    The start, which is public, and a public global test set need no protection.

    Noise comes from the run's seed, in float64, and so is reproducible: whoever knows the seed can subtract it, and
    floating-point Gaussian noise leaks a little by its rounding (Mironov, CCS 2012). The guarantee is that of the
    simulated method; to release an adapter of private data, draw the noise in secret and exactly.

    Attributes:
        inner: the wrapped strategy, whose `traits.reduce` is "sum" and whose clients share one LoRA rank.
        federation: `cohort_size` is m, the expected size of a cohort; noise is drawn from `seed`.
        settings: C and z.
    """

    inner: Strategy
    federation: Federation
    settings: PrivacySettings

    def __post_init__(self) -> None:
        traits = self.inner.traits
        if traits.reduce != "sum" or traits.mixed_ranks or traits.trains_pool:
            raise ConfigError(
                f"aggregation.privacy.clip_norm must be null with strategy.name={self.inner.name}; "
                "use one that averages the factors of clients of one LoRA rank, such as fedavg or ffa"
            )
        if not self.federation.cohort_size > 0:
            raise ConfigError(
                "aggregation.privacy needs a positive expected cohort size, got "
                f"{self.federation.cohort_size}"
            )

    @property
    def name(self) -> str:
        """That of the wrapped strategy."""
        return self.inner.name

    @property
    def traits(self) -> Traits:
        """Those of the wrapped strategy, but that clients are seen one by one, with equal weights, or not at all."""
        return replace(
            self.inner.traits, takes_mean=False, uses_client_weights=False, takes_empty_cohorts=True
        )

    def sends(self, state: ServerState) -> Sides:
        """As the wrapped strategy."""
        return self.inner.sends(state)

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:
        """As the wrapped strategy."""
        return self.inner.download(state, lora_ranks)

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:
        """As the wrapped strategy."""
        return self.inner.plan(state, client, received)

    def upload(
        self,
        state: ServerState,
        client: Client,
        plan: ClientPlan,
        trained: AdapterState,
        report: ClientReport,
    ) -> Upload:
        """What the wrapped strategy uploads, clipped; see `clip_update`.

        The change is counted from the global adapter, which is what the server subtracts, whatever the plan's start.
        """
        whole = self.inner.upload(state, client, plan, trained, report)
        clipped = clip_update(state.adapter, whole.adapter, self.inner.sends(state), self.settings.clip_norm)
        return replace(whole, adapter=clipped)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """Give the wrapped strategy one virtual client that holds the noisy mean. Cohorts may be empty."""
        virtual = [virtual_report(state.adapter)]
        return self.inner.aggregate(state, virtual, self._noisy_means(state, len(reports), factors))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:
        """As the wrapped strategy."""
        return self.inner.export(state, client)

    def _noisy_means(
        self, state: ServerState, num_clients: int, factors: FactorStream
    ) -> Iterator[tuple[str, tuple[LoraFactors, ...]]]:
        sides = self.inner.sends(state)
        for module, cohort in factors:
            start = state.adapter[module]
            shape = (start.A.shape, start.B.shape, start.scaling)
            if len(cohort) != num_clients or any((f.A.shape, f.B.shape, f.scaling) != shape for f in cohort):
                raise AggregationError(
                    f"differential privacy needs {num_clients} clients with the LoRA rank {start.rank} and scaling of "
                    f"the server for {module}, got LoRA ranks {[f.rank for f in cohort[:8]]} of {len(cohort)}"
                )
            means = {}
            for side in ("A", "B"):
                value: Tensor = getattr(start, side)
                means[side] = absent(tuple(value.shape), value.dtype, value.device)
                if side in sides:
                    noise = self._noise(value, f"{module}/{side}", state.round_index)
                    means[side] = self._mean(value, [getattr(f, side) for f in cohort], noise)
            yield module, (LoraFactors(means["A"], means["B"], start.scaling),)

    def _mean(self, start: Tensor, cohort: Sequence[Tensor], noise: Tensor) -> Tensor:
        """x + (sum_k (x_k - x) + noise) / m in float64, in the order given, rounded once."""
        origin = start.double()
        total = torch.zeros_like(origin)
        for value in cohort:
            total += value.double() - origin
        return (origin + (total + noise) / self.federation.cohort_size).to(start.dtype)

    def _noise(self, like: Tensor, factor: str, round_index: int) -> Tensor:
        """N(0, (z C)^2) in float64; drawn on the CPU, so that it does not depend on where the server computes."""
        generator = torch_generator(self.federation.seed, f"privacy_noise/{factor}", round_index)
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (drawn * (self.settings.noise_multiplier * self.settings.clip_norm)).to(like.device)


def clip_update(start: AdapterState, trained: AdapterState, sides: Sides, clip_norm: float) -> AdapterState:
    """Pull an adapter towards `start` until the change has at most the norm `clip_norm`.

        x_k' = x + (x_k - x) * min(1, C / ||x_k - x||_2)

    over the factors named in `sides` of all modules together, unscaled by lora_alpha / r. The norm is that of the
    result after rounding to its dtype, seen in float64: where rounding has pushed it over C, the change shrinks again.

    Args:
        start: what the server subtracts; the same modules and shapes, on any device.
        trained: the client's factors.
        sides: that travel; the others are returned as they are.
        clip_norm: C, > 0.

    Returns:
        Factors of the dtype and device of `trained`; `trained` itself if it is within C.

    Raises:
        AggregationError: the change has no finite norm, or modules or shapes differ.
    """
    _check_same_shapes(start, trained)
    start = start.to(next(iter(trained.values())).A.device)
    norm = _change_norm(start, trained, sides)
    if not norm < float("inf"):
        raise AggregationError(f"aggregation.privacy.clip_norm needs an update of finite norm, got {norm}")
    share, clipped = 1.0, trained
    while norm > clip_norm:
        # 1e-6 settles it in one or two turns where C is far above the rounding errors; below them the change ends at 0
        share *= clip_norm / norm * (1.0 if clipped is trained else 1 - 1e-6)
        clipped = _towards(start, trained, sides, share)
        norm = _change_norm(start, clipped, sides)
    return clipped


def _check_same_shapes(start: AdapterState, trained: AdapterState) -> None:
    shapes, expected = (
        [(module, tuple(factors.A.shape), tuple(factors.B.shape)) for module, factors in adapter.items()]
        for adapter in (trained, start)
    )
    if shapes != expected:
        raise AggregationError(
            "differential privacy needs clients with the server's modules and LoRA ranks, got LoRA ranks "
            f"{sorted({f.rank for f in trained.values()})} for {sorted({f.rank for f in start.values()})}"
        )


def _change_norm(start: AdapterState, end: AdapterState, sides: Sides) -> float:
    """||end - start||_2 over some sides of all modules, in float64."""
    squares = [
        (getattr(end[module], side).double() - getattr(factors, side).double()).square().sum()
        for module, factors in start.items()
        for side in sorted(sides)
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _towards(start: AdapterState, end: AdapterState, sides: Sides, share: float) -> AdapterState:
    """start + share * (end - start) for some sides, in the dtype of `end`; its other sides as they are."""

    def between(old: Tensor, new: Tensor) -> Tensor:
        origin = old.double()
        return (origin + share * (new.double() - origin)).to(new.dtype)

    return AdapterState(
        {
            module: LoraFactors(
                between(start[module].A, factors.A) if "A" in sides else factors.A,
                between(start[module].B, factors.B) if "B" in sides else factors.B,
                factors.scaling,
            )
            for module, factors in end.items()
        }
    )
