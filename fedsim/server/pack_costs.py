"""What a pack will cost, learned from the rounds so far: packs are placed by it, and nothing else depends on it."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.lora.updates import ClientReport
from fedsim.training.packs import ClientJob, Pack

_KEPT = 256
"""Packs that are remembered; older ones are forgotten."""
_ENOUGH = 8
"""Packs from which on the model is used."""


class PackCosts:
    """Seconds of a pack as a sum of what its tokens, its tokens times LoRA ranks, and its optimizer steps take.

    Tokens alone decide until enough packs are known: `cost_tokens` of the pack. Rates are fitted by least squares and
    are not negative. What a rank measures differs from run to run, so the placement may differ too; packs and their
    results do not.
    """

    def __init__(self) -> None:
        self._features: deque[NDArray[np.float64]] = deque(maxlen=_KEPT)
        self._seconds: deque[float] = deque(maxlen=_KEPT)

    def expected(self, packs: Sequence[Pack], lora_ranks: Mapping[int, int]) -> list[float]:
        """Cost of each pack, in seconds, or in tokens while too little is known.

        Args:
            packs: of a round.
            lora_ranks: client_id -> largest LoRA rank of its adapter.
        """
        by_tokens = [float(pack.cost_tokens) for pack in packs]
        if not packs or len(self._seconds) < _ENOUGH:
            return by_tokens
        features = np.stack([_features(pack.jobs, lora_ranks) for pack in packs])
        seconds = features @ self._rates()
        # a client that needs no time at all is a sign of rates that mean nothing
        return [float(value) for value in seconds] if bool((seconds > 0).all()) else by_tokens

    def learn(self, packs: Sequence[Pack], reports: Sequence[ClientReport]) -> None:
        """Remember what the packs of a round have taken.

        Args:
            packs: of the round.
            reports: of its clients; a pack of which one is missing is left out.
        """
        by_client = {report.client_id: report for report in reports}
        for pack in packs:
            own = [by_client[job.client_id] for job in pack.jobs if job.client_id in by_client]
            seconds = math.fsum(report.seconds for report in own)
            if len(own) == len(pack.jobs) and seconds > 0:
                ranks = {report.client_id: report.lora_rank for report in own}
                self._features.append(_features(pack.jobs, ranks))
                self._seconds.append(seconds)

    def _rates(self) -> NDArray[np.float64]:
        from scipy.optimize import nnls

        features, seconds = np.stack(self._features), np.array(self._seconds)
        scales = np.maximum(features.max(axis=0), 1.0)
        # relative errors count: a small pack says as much about a rate as a large one
        rates, _ = nnls(features / scales / seconds[:, None], np.ones(len(seconds)))
        return np.asarray(rates / scales)


def _features(jobs: Sequence[ClientJob], lora_ranks: Mapping[int, int]) -> NDArray[np.float64]:
    """(3,): tokens, tokens times LoRA ranks, optimizer steps."""
    tokens = sum(job.cost_tokens for job in jobs)
    weighted = sum(job.cost_tokens * lora_ranks[job.client_id] for job in jobs)
    return np.array([tokens, weighted, sum(_num_steps(job) for job in jobs)], dtype=np.float64)


def _num_steps(job: ClientJob) -> int:
    if job.local_steps is not None:
        return job.local_steps
    micro_batches = -(-len(job.examples) // job.settings.batch_size)
    return (job.local_epochs or 1) * -(-micro_batches // job.settings.accumulation)
