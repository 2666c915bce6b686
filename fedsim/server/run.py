"""What a round needs besides the server's state: the pieces of a run, put together once."""

import math
from dataclasses import dataclass, field
from typing import Protocol, final

from fedsim.aggregation.privacy import PrivacyAccountant
from fedsim.aggregation.strategy import Strategy
from fedsim.comm.group import Group
from fedsim.data.build import FederatedData
from fedsim.evaluation.clients import ClientTest
from fedsim.evaluation.losses import LossEvaluator
from fedsim.lora.plan import Client
from fedsim.lora.state import ServerState
from fedsim.models.base_update import UpdatableBase
from fedsim.models.passes import FreePasses, Passes
from fedsim.server.aggregation import Aggregator
from fedsim.server.answers import AnswerEvaluation
from fedsim.server.client_store import ClientStore
from fedsim.server.cohort import CohortPolicy, LocalBudget
from fedsim.server.early_stopping import StoppingRule
from fedsim.server.pack_costs import PackCosts
from fedsim.server.screening import Corruption, Screening
from fedsim.server.tiers import Tiers
from fedsim.server.turnout import Participation
from fedsim.server.validation import Validation
from fedsim.training.settings import LocalSettings, at_round
from fedsim.training.trainer import Trainer


class Watch(Protocol):
    """Is told how a round goes on, on this process."""

    def phase(self, text: str) -> None:
        """What is being done now, in a word or two."""

    def clients_done(self, done: int, of: int, tokens: int) -> None:
        """This process has trained `done` of its `of` clients of the round, on `tokens` label tokens so far."""


@final
class NoWatch:
    """Nobody watches."""

    def phase(self, text: str) -> None:
        """Do nothing."""

    def clients_done(self, done: int, of: int, tokens: int) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Run:
    """Everything a round needs besides the server's state. The same on every rank but for the group's rank.

    Attributes:
        group: the processes.
        data: tokenized examples and their partition.
        strategy: the federated method.
        aggregator: where its mathematics runs.
        tiers: LoRA ranks of each client.
        store: what belongs to single clients.
        base: weights that follow the server's updates of the base.
        trainer: local training on this process.
        global_test: the global test set.
        client_test: the test of a client's adapter before and after local training.
        cohort: how cohorts are chosen.
        budget: how much a client trains in a round.
        local: how a client trains.
        lr_phases: first round and factor on the learning rate of `local` from then on, ascending.
        num_packs: packs of a round.
        rounds: rounds of the whole run.
        evaluate_every: rounds between evaluations.
        seed: the run's seed.
        privacy: what differential privacy has been spent; None without it.
        answers: the test of the global model's answers; None without it.
        participation: how reliable clients are, on a simulated clock; None if all report back.
        screening: which updates the server takes; None for all finite ones, which the trainer sees to.
        corruption: updates that arrive broken; None for none.
        stopping: when to stop before the last round; None for never.
        validation: the test of the global model before a round on its clients' own examples; None without it.
        most_waiting_bytes: of trained adapters that wait on the device for the end of the round; the rest leave it.
        watch: is told how the round goes on.
        costs: what packs have cost so far.
        passes: through which the base is used.
    """

    group: Group
    data: FederatedData
    strategy: Strategy
    aggregator: Aggregator
    tiers: Tiers
    store: ClientStore
    base: UpdatableBase
    trainer: Trainer
    global_test: LossEvaluator
    client_test: ClientTest
    cohort: CohortPolicy
    budget: LocalBudget
    local: LocalSettings
    num_packs: int
    rounds: int
    evaluate_every: int
    seed: int
    lr_phases: tuple[tuple[int, float], ...] = ()
    privacy: PrivacyAccountant | None = None
    answers: AnswerEvaluation | None = None
    participation: Participation | None = None
    screening: Screening | None = None
    corruption: Corruption | None = None
    stopping: StoppingRule | None = None
    validation: Validation | None = None
    most_waiting_bytes: float = math.inf
    watch: Watch = field(default_factory=NoWatch)
    costs: PackCosts = field(default_factory=PackCosts)
    passes: Passes = field(default_factory=FreePasses)

    def evaluates(self, round_index: int) -> bool:
        """Whether a round ends with an evaluation."""
        return self.evaluates_regularly(round_index) or round_index + 1 == self.rounds

    def evaluates_regularly(self, round_index: int) -> bool:
        """Whether it would, if it were not the last round: only that may decide anything, as a run may be extended."""
        return (round_index + 1) % self.evaluate_every == 0

    def is_over(self, state: ServerState) -> bool:
        """Whether no round is left to be run."""
        stops = self.stopping is not None and self.stopping.stops(state.best)
        return stops or state.round_index >= self.rounds

    def local_in(self, round_index: int) -> LocalSettings:
        """How a client trains in a round."""
        return at_round(self.local, self.lr_phases, round_index)

    def client(self, client_id: int, state: ServerState) -> Client:
        """A client with what was kept for it, on the group's device.

        Raises:
            CheckpointError: its file is damaged.
        """
        kept = self.store.load(client_id, state.client_versions)
        on_device = {name: tensor.to(self.group.device) for name, tensor in kept.items()}
        return Client(client_id, self.tiers.lora_ranks(client_id, state.round_index), on_device)
