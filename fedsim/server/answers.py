"""Scores of the global model's answers, measured by all processes together."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.comm.agree import all_or_none
from fedsim.comm.group import Group
from fedsim.evaluation.generation import AnswerTest
from fedsim.evaluation.rouge import answer_metrics, group_means, merge_scores
from fedsim.lora.factors import AdapterState

MOST_NAMES = 200
"""More tasks, or more categories, than this are not reported one by one."""


@dataclass(frozen=True)
class AnswerEvaluation:
    """A test of answers, and what its examples belong to.

    Attributes:
        test: of the global test set, or a sample of it.
        tasks: of each of its examples; empty texts where the corpus has none.
        categories: of each of its examples; empty where the corpus has none.
        suffix: of the figures' names; empty for generated answers.
    """

    test: AnswerTest
    tasks: Sequence[str]
    categories: Sequence[str]
    suffix: str

    def measure(self, group: Group, adapter: AdapterState, what: str) -> dict[str, float]:
        """Figures of a round: see `answer_metrics`, and the same scores by task and category; the same on every rank.

        Where there are more than `MOST_NAMES` tasks, or categories, or an example has none, they are left out.

        Raises:
            PeerError: some process could not measure its share.
        """
        mine = range(group.rank, len(self.test.batches), group.world_size)
        measured = {}
        with all_or_none(group, what):
            scored = self.test.measure(adapter, mine)
            measured = {index: scores.without_predictions() for index, scores in scored.items()}
        everywhere = group.gather_objects(measured)
        scores = merge_scores({index: part for share in everywhere for index, part in share.items()})
        figures = answer_metrics(scores, [self.tasks[i] for i in scores.examples.tolist()], self.suffix)
        for kind, names in (("task", self.tasks), ("category", self.categories)):
            if not 0 < len(set(names)) <= MOST_NAMES or "" in names:
                continue
            groups = [names[i] for i in scores.examples.tolist()]
            for score, values in scores.columns().items():
                means = group_means(values, groups)
                figures |= {
                    f"test/{score}{self.suffix}_{kind}/{name}": value for name, value in sorted(means.items())
                }
        return figures

    def left_out(self) -> str | None:
        """What has no figures of its own, in words; None if nothing."""
        counts = {"tasks": len(set(self.tasks)), "categories": len(set(self.categories))}
        many = [f"{count} {kind}" for kind, count in counts.items() if count > MOST_NAMES]
        return f"no scores by name of {' and '.join(many)}, of more than {MOST_NAMES}" if many else None
