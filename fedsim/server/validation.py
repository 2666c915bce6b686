"""The global model on what the clients of a round keep for their own evaluation, before they train."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.comm.agree import all_or_none
from fedsim.comm.group import Group
from fedsim.evaluation.held_out import ExampleTest
from fedsim.evaluation.rouge import weighted_mean
from fedsim.lora.factors import AdapterState

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Validation:
    """The score by which the code of arXiv 2402.11505 stops early:

        score = sum_k n_k score_k / sum_k n_k       over the clients k of the round that hold examples for it

    with n_k training examples of client k, and score_k the global model's on the examples that k holds but does not
    train on. The clients are others in each round, so that the score also moves when the model does not.

    Attributes:
        name: of the score, in the record of a round.
        examples_of: indices of a client's examples for this, ascending; there may be none.
        sizes: (number of clients,) n_k.
        prepare: the test of some examples, ascending indices.
    """

    name: str
    examples_of: Callable[[int], Ints]
    sizes: Ints
    prepare: Callable[[Ints], ExampleTest]

    def measure(
        self, group: Group, adapter: AdapterState, cohort: Sequence[int], what: str
    ) -> dict[str, float]:
        """Figures of a round; none if no client of the cohort has an example. Equal for any number of processes.

        Args:
            group: the processes, of which each measures a share of the batches.
            adapter: the global one.
            cohort: the clients of the round.
            what: is done, for messages.

        Raises:
            PeerError: some process could not measure its share.
        """
        own = {client_id: examples for client_id in cohort if len(examples := self.examples_of(client_id))}
        if not own:
            return {}
        examples = np.unique(np.concatenate(list(own.values())))  # clients may hold the same ones
        with all_or_none(group, what):
            test = self.prepare(examples)
            measured = test.measure(adapter, range(group.rank, len(test.batches), group.world_size))
        scores = np.zeros(len(examples))
        for share in group.gather_objects(measured):
            for index, part in share.items():
                scores[test.batches[index]] = part
        places = {client_id: np.searchsorted(examples, held) for client_id, held in own.items()}
        return self._figures(
            {client_id: _mean(scores[at], test.counts[at]) for client_id, at in places.items()}, len(examples)
        )

    def _figures(self, means: Mapping[int, float], num_examples: int) -> dict[str, float]:
        weights = {client_id: float(self.sizes[client_id]) for client_id in means}
        return {
            f"validation/{self.name}": weighted_mean(means, weights),
            f"validation/{self.name}_by_client": math.fsum(means.values()) / len(means),
            "validation/num_clients": len(means),
            "validation/num_examples": num_examples,
        }


def _mean(scores: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    return math.fsum(scores * counts) / math.fsum(counts)
