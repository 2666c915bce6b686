"""The keys of a round's record, as docs/metrics.md lists them."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
NOT_FINITE = "/not_finite"
SCORES = "(rougeL|rougeL_stem|exact_match)(_tf)?"
STANDS_FOR = {
    "SCORE": SCORES,
    "METRIC": f"(loss|{SCORES})",
    "NAME": ".+",
    "C": "[0-9]+",
    "STATISTIC": "[a-z0-9_]+",
    "FIGURE": "[a-z0-9_]+",
}


@cache
def documented() -> tuple[re.Pattern[str], ...]:
    """A pattern for each key of the table, in which words in capitals stand for others."""
    text = TABLE.read_text(encoding="utf-8")
    body = text.partition("<!-- metrics: begin -->")[2].partition("<!-- metrics: end -->")[0]
    first_cells = [line.split("|")[1] for line in body.splitlines() if "|" in line]
    keys = [key for cell in first_cells for key in re.findall(r"`([^`]+)`", cell)]
    assert len(keys) > 40
    words = re.compile(r"(?<![A-Za-z])({})(?![A-Za-z])".format("|".join(STANDS_FOR)))
    return tuple(re.compile(words.sub(lambda word: STANDS_FOR[word[1]], key)) for key in keys)


def undocumented(records: Iterable[dict[str, object]]) -> set[str]:
    """Keys of these records that the table does not have."""
    keys = {key.removesuffix(NOT_FINITE) for record in records for key in record}
    return {key for key in keys if not any(pattern.fullmatch(key) for pattern in documented())}
