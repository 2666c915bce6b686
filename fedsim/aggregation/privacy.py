"""How much privacy a run has spent: the accountant for client-level differential privacy."""

from dataclasses import dataclass
from typing import final

from fedsim.errors import ConfigError

_INTERVAL = 1e-3
"""Grid of privacy losses. Ten times coarser than dp-accounting's default, which costs up to 0.5 % in epsilon (measured:
2.394 instead of 2.385 after 14,100 rounds of q = 256/60000, z = 1.1) and makes it ten times faster."""


@final
@dataclass(frozen=True, slots=True)
class PrivacyAccountant:
    """The (epsilon, delta) of rounds in which each client takes part by itself and Gaussian noise is added once.

    One round is the Gaussian mechanism of the given noise multiplier on a Poisson sample of the clients; neighbouring
    federations differ in one client that is there or not (add or remove one). Rounds are composed by their privacy loss
    distribution (arXiv 2106.08567, connect-the-dots arXiv 2207.04380; library dp-accounting), rounded pessimistically,
    so that what is returned is an upper bound. Renyi accounting is looser: 27.2 instead of 25.2 after 1,000 rounds of
    q = 0.1, z = 1.

    A call takes some 0.1 s for 1,000 rounds, and the first one a second more for the import of the library. Only the
    number of rounds matters, so a resumed run has nothing to restore.

    Attributes:
        sampling_probability: q, probability of a client to be in a round's cohort, in (0, 1].
        noise_multiplier: z, standard deviation of the noise over the clipping norm, >= 0.
        delta: in (0, 1); choose it below 1 / num_clients.
    """

    sampling_probability: float
    noise_multiplier: float
    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.sampling_probability <= 1:
            raise ConfigError(
                f"a client's probability of being drawn must be in (0, 1], got {self.sampling_probability}"
            )
        if not 0 <= self.noise_multiplier < float("inf"):
            raise ConfigError(
                f"aggregation.privacy.noise_multiplier must be >= 0 and finite, got {self.noise_multiplier}"
            )
        if not 0 < self.delta < 1:
            raise ConfigError(f"aggregation.privacy.delta must be in (0, 1), got {self.delta}")

    def epsilon(self, rounds: int) -> float:
        """Epsilon after so many rounds: 0 before the first one, infinite without noise.

        Every round counts, also one whose cohort was empty.
        """
        if rounds == 0:
            return 0.0
        if self.noise_multiplier == 0:
            return float("inf")
        from dp_accounting.pld import privacy_loss_distribution

        one_round = privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=self.noise_multiplier,
            sampling_prob=self.sampling_probability,
            # little noise means large losses: a grid in their proportion keeps time and memory bounded
            value_discretization_interval=_INTERVAL * max(1.0, self.noise_multiplier**-2),
        )
        return float(one_round.self_compose(rounds).get_epsilon_for_delta(self.delta))
