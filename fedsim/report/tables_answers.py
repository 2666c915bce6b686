"""Scores of answers: Rouge-L with and without stemmer, exact match, and what Rouge-L cannot score."""

from collections.abc import Sequence

from fedsim.report.cells import MISSING, ROUGE, Figure, at_end, hundredfold, of_runs, plus_minus, seeds_of
from fedsim.report.groups import Group
from fedsim.report.tables import Table

NOTE = (
    "Of the exported state, on the global test set; scores times 100, mean ± sample standard deviation over "
    "seeds; every example alike or, by task, every task alike. With Porter's stemmer it is the Rouge-L of Natural "
    "Instructions, without it that of arXiv 2402.11505. Its tokens are runs of a-z and 0-9, so that answers whose "
    "references have none (other scripts than Latin, bare punctuation) score 0 whatever they are: their number is "
    "given, and their zeros are in the means. Exact match compares in lower case and without punctuation."
)


def answers(groups: Sequence[Group]) -> list[Table]:
    """Rouge-L with and without stemmer, exact match, loss, and answers that Rouge-L cannot score."""
    tables = []
    for key, what in ROUGE.items():
        suffix = key.removeprefix("test/rougeL")
        lines = [_answer_line(group, suffix) for group in groups if group.spread(at_end(key))]
        if lines:
            head = (
                "configuration",
                "seeds",
                "Rouge-L",
                "Rouge-L by task",
                "Rouge-L, stemmer",
                "Rouge-L, stemmer, by task",
                "exact match",
                "references without tokens",
                "test loss",
            )
            tables.append(Table(f"answers{suffix}", f"Scores {what}", head, tuple(lines), NOTE))
    return tables


def _answer_line(group: Group, suffix: str) -> tuple[str, ...]:
    scores = [
        f"test/{name}{suffix}{end}"
        for name, end in (
            ("rougeL", ""),
            ("rougeL", "_by_client"),
            ("rougeL_stem", ""),
            ("rougeL_stem", "_by_client"),
            ("exact_match", ""),
        )
    ]
    shown = [_score(group, hundredfold(at_end(key)), "{:.2f}") for key in scores]
    unscored = group.spread(at_end(f"test/num_without_rouge_tokens{suffix}"))
    return (
        group.label if group.is_finished else f"{group.label} (unfinished)",
        seeds_of([group]),
        *shown,
        MISSING if unscored is None else f"{unscored.mean:.4g}",
        _score(group, at_end("test/loss"), "{:.4f}"),
    )


def _score(group: Group, figure: Figure, shown: str) -> str:
    spread = group.spread(figure)
    return MISSING if spread is None else plus_minus(spread, shown) + of_runs(group, spread)
