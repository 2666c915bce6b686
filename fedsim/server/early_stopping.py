"""When a run stops before its last round, and which of its states was the best."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from fedsim.lora.state import BestSoFar, ServerState


@final
@dataclass(frozen=True, slots=True)
class StoppingRule:
    """Stop when more than `patience` evaluations in a row were no better than the best one before them.

    So a patience of 3 stops at the fourth, which is what the published code of arXiv 2402.11505 does. The first
    evaluation that gives a finite score is the best so far, whatever it is (that code begins with a best Rouge-L of 0);
    a score that is not finite is no better; a round without an evaluation does not count.

    Attributes:
        figure: whose values are compared, by its name in the record of a round.
        larger_is_better: of two values.
        before_training: the value is that of the model with which the round begins, not of its result.
        patience: evaluations without improvement that are put up with.
        min_delta: a value must be better by more than this.
        from_round: evaluations in rounds before this one do not count.
    """

    figure: str
    larger_is_better: bool
    before_training: bool
    patience: int
    min_delta: float = 0.0
    from_round: int = 0

    def updated(
        self, best: BestSoFar | None, figures: Mapping[str, float], round_index: int
    ) -> BestSoFar | None:
        """What is known of the best state after a round.

        Args:
            best: before the round.
            figures: of the round, where it was evaluated.
            round_index: of the round, from 0.
        """
        if self.figure not in figures or round_index < self.from_round:
            return best
        score = figures[self.figure]
        if not math.isfinite(score):
            return None if best is None else replace(best, waited=best.waited + 1)
        if best is None or self._gain(score, best.score) > self.min_delta:
            return BestSoFar(score, round_index if self.before_training else round_index + 1, 0)
        return replace(best, waited=best.waited + 1)

    def _gain(self, score: float, best: float) -> float:
        return score - best if self.larger_is_better else best - score

    def stops(self, best: BestSoFar | None) -> bool:
        """Whether no further round is to be run."""
        return best is not None and best.waited > self.patience


def stopping_figures(best: BestSoFar | None) -> dict[str, float]:
    """What the record of a round says of the best state so far; nothing before the first evaluation."""
    if best is None:
        return {}
    return {
        "early_stopping/best": best.score,
        "early_stopping/best_after_rounds": best.rounds,
        "early_stopping/evaluations_since": best.waited,
    }


def why_stopped(rule: StoppingRule, state: ServerState, rounds: int) -> str | None:
    """Why a run ended before all its `rounds`, in words; None if it did not."""
    best = state.best
    if best is None or not rule.stops(best) or state.round_index >= rounds:
        return None
    return (
        f"stopped early after {state.round_index} of {rounds} rounds: {best.waited} evaluations in a row did not "
        f"improve {rule.figure}, which was best after {best.rounds} rounds ({best.score:.6g})"
    )
