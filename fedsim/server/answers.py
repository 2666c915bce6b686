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
        """Figures of a round: see `answer_metrics`, and Rouge-L by task and category; the same on every rank.

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
            if 0 < len(set(names)) <= MOST_NAMES and "" not in names:
                means = group_means(scores.rouge_l, [names[i] for i in scores.examples.tolist()])
                figures |= {
                    f"test/rougeL{self.suffix}_{kind}/{name}": value for name, value in sorted(means.items())
                }
        return figures
