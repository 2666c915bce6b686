"""Optimizers on the server: FedAvgM (arXiv 1909.06335), and FedAdam, FedYogi, FedAdagrad (arXiv 2003.00295).

Letters: x = a factor of the global adapter, x' = what the wrapped strategy makes of it, delta = x' - x.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from fedsim.aggregation.strategy import Aggregated, FactorStream, Strategy, Traits
from fedsim.errors import ConfigError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import Client, ClientPlan, Sides, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport

ServerOptimizerName = Literal["fedavgm", "fedadam", "fedyogi", "fedadagrad"]

FIRST = "server_optimizer/first"
"""Name in `ServerState.strategy_state` of the running mean of delta: m, or the momentum of FedAvgM."""

SECOND = "server_optimizer/second"
"""Name of the running mean, or sum, of delta^2: v. FedAvgM has none."""


@dataclass(frozen=True, slots=True)
class ServerOptimizerSettings:
    """Which optimizer, and its numbers. `published` gives those of the papers.

    Attributes:
        name: fedavgm, fedadam, fedyogi or fedadagrad.
        lr: server learning rate, > 0.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1); FedAvgM and FedAdagrad do not use it.
        tau: degree of adaptivity, > 0; FedAvgM does not use it.
    """

    name: ServerOptimizerName
    lr: float
    beta1: float
    beta2: float
    tau: float

    def __post_init__(self) -> None:
        key = "aggregation.server_optimizer"
        if self.name not in ("fedavgm", "fedadam", "fedyogi", "fedadagrad"):
            raise ConfigError(
                f"{key}.name must be fedavgm, fedadam, fedyogi or fedadagrad, got '{self.name}'"
            )
        for field, value in (("lr", self.lr), ("tau", self.tau)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"{key}.{field} must be positive, got {value}")
        for field, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ConfigError(f"{key}.{field} must be in [0, 1), got {value}")

    @classmethod
    def published(
        cls,
        name: ServerOptimizerName,
        lr: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> "ServerOptimizerSettings":
        """The papers' numbers where none are given; FedAdagrad always has beta1 = 0.

        A learning rate of None is 1 for FedAvgM, which takes whole steps, and else 1e-2. The latter is our choice:
        arXiv 2003.00295 tunes it for each task.
        """
        if lr is None:
            lr = 1.0 if name == "fedavgm" else 1e-2
        return cls(name, lr, 0.0 if name == "fedadagrad" else beta1, beta2, tau)


@final
@dataclass(frozen=True, slots=True)
class ServerOptimized:
    """A strategy that averages factors, with an optimizer that takes the change of the average as its gradient.

    The wrapped strategy aggregates as ever. Then, for each factor that travelled, with delta = x' - x
    (arXiv 2003.00295, Algorithm 2):

        m <- beta1 m + (1 - beta1) delta                             m starts at 0
        v <- v + delta^2                                             FedAdagrad; v starts at tau^2
        v <- v - (1 - beta2) delta^2 sign(v - delta^2)               FedYogi
        v <- beta2 v + (1 - beta2) delta^2                           FedAdam
        x <- x + lr m / (sqrt(v) + tau)

    without bias correction; or, FedAvgM (arXiv 1909.06335, section 4.3):

        m <- beta1 m + delta,    x <- x + lr m

    Factors that did not travel, and their moments, stay as they are. Moments are kept in the dtype of the factors and
    worked on in float64; what is kept is what the next round reads, so that a resumed run has the same bits.

    The wrapper's own `reduce` is "stack", so that nothing is wrapped around it: the next adapter also depends on the
    moments. Noise for differential privacy goes inside: `ServerOptimized(Private(strategy))`.

    Attributes:
        inner: the wrapped strategy, whose `traits.reduce` is "sum".
        settings: of the optimizer.
    """

    inner: Strategy
    settings: ServerOptimizerSettings

    def __post_init__(self) -> None:
        if self.inner.traits.reduce != "sum":
            raise ConfigError(
                f"aggregation.server_optimizer.name must be none with strategy.name={self.inner.name}, which does not "
                f"average factors, got {self.settings.name}; use a strategy that does, such as fedavg or ffa"
            )

    @property
    def name(self) -> str:
        """That of the wrapped strategy."""
        return self.inner.name

    @property
    def traits(self) -> Traits:
        """Those of the wrapped strategy, but for `reduce`."""
        return replace(self.inner.traits, reduce="stack")

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
        """As the wrapped strategy."""
        return self.inner.upload(state, client, plan, trained, report)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """Let the wrapped strategy aggregate, and take the optimizer's step instead of the whole change."""
        others = {name: entry for name, entry in state.strategy_state.items() if name not in (FIRST, SECOND)}
        result = self.inner.aggregate(replace(state, strategy_state=others), reports, factors)
        step, sides = _STEPS[self.settings.name], self.inner.sends(state)
        moments = (
            {FIRST: 0.0} if self.settings.name == "fedavgm" else {FIRST: 0.0, SECOND: self.settings.tau**2}
        )
        adapter: dict[str, LoraFactors] = {}
        kept: dict[str, dict[str, LoraFactors]] = {name: {} for name in moments}
        for module, after in result.state.adapter.items():
            before = state.adapter[module]
            held = [_moment(state, name, module, start) for name, start in moments.items()]
            moved = {
                side: step(self.settings, *_values(side, before, after, *held)) for side in sorted(sides)
            }
            adapter[module], *new = [
                _with_sides(old, {side: values[position] for side, values in moved.items()})
                for position, old in enumerate((after, *held))
            ]
            for name, moment in zip(moments, new, strict=True):
                kept[name][module] = moment
        entries = {name: AdapterState(modules) for name, modules in kept.items()}
        strategy_state = {**result.state.strategy_state, **entries}
        return replace(
            result,
            state=replace(result.state, adapter=AdapterState(adapter), strategy_state=strategy_state),
        )

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:
        """As the wrapped strategy."""
        return self.inner.export(state, client)


def _fedavgm(settings: ServerOptimizerSettings, x: Tensor, delta: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    m = settings.beta1 * m + delta
    return x + settings.lr * m, m


def _adaptive(second: Callable[[float, Tensor, Tensor], Tensor]) -> "_Step":
    """The step of Algorithm 2 with v <- second(beta2, v, delta^2)."""

    def step(
        settings: ServerOptimizerSettings, x: Tensor, delta: Tensor, m: Tensor, v: Tensor
    ) -> tuple[Tensor, ...]:
        m = settings.beta1 * m + (1 - settings.beta1) * delta
        v = second(settings.beta2, v, delta.square())
        return x + settings.lr * m / (v.sqrt() + settings.tau), m, v

    return step


_Step = Callable[..., tuple[Tensor, ...]]
"""(settings, x, delta, moments) -> (next x, next moments), all float64."""

_STEPS: Mapping[ServerOptimizerName, _Step] = {
    "fedavgm": _fedavgm,
    "fedadam": _adaptive(lambda beta2, v, square: beta2 * v + (1 - beta2) * square),
    "fedyogi": _adaptive(lambda beta2, v, square: v - (1 - beta2) * square * torch.sign(v - square)),
    "fedadagrad": _adaptive(lambda beta2, v, square: v + square),  # noqa: ARG005
}


def _moment(state: ServerState, name: str, module: str, start: float) -> LoraFactors:
    """A moment of one module as the last round left it; all `start` in the first round."""
    if name in state.strategy_state:
        return state.strategy_state[name][module]
    return state.adapter[module].map(lambda factor: torch.full_like(factor, start))


def _values(side: str, before: LoraFactors, after: LoraFactors, *moments: LoraFactors) -> list[Tensor]:
    """One side's x, delta and moments in float64."""
    x = getattr(before, side).double()
    return [x, getattr(after, side).double() - x, *(getattr(moment, side).double() for moment in moments)]


def _with_sides(factors: LoraFactors, new: Mapping[str, Tensor]) -> LoraFactors:
    """Factors with new values, rounded to their dtype, for some sides."""
    return LoraFactors(
        new["A"].to(factors.A.dtype) if "A" in new else factors.A,
        new["B"].to(factors.B.dtype) if "B" in new else factors.B,
        factors.scaling,
    )
