"""A log file for each process."""

import logging
from pathlib import Path

import pytest

from fedsim.tracking.rank_log import rank_log


@pytest.fixture
def log() -> logging.Logger:
    """A logger of fedsim's, as main.py sets it up."""
    root = logging.getLogger("fedsim")
    root.setLevel(logging.DEBUG)
    return logging.getLogger("fedsim.anything")


def test_lines_say_rank_and_place_and_starts_add_up(log: logging.Logger, tmp_path: Path) -> None:
    places = iter(["local training, round 3", "evaluation, round 3", "nothing"])
    with rank_log(tmp_path, 2, lambda: next(places)):
        log.info("first")
        log.debug("second")
    log.info("outside")
    with pytest.raises(ValueError, match="mine"), rank_log(tmp_path, 2, lambda: next(places)):
        raise ValueError("mine")
    lines = (tmp_path / "logs" / "rank_0002.log").read_text().splitlines()
    assert [line.partition(" rank ")[2] for line in lines] == [
        "2 INFO [local training, round 3] first",
        "2 DEBUG [evaluation, round 3] second",
        "2 INFO [nothing] ends by ValueError: mine",
    ]


def test_a_node_that_does_not_see_the_run_folder_has_no_file(log: logging.Logger, tmp_path: Path) -> None:
    with rank_log(tmp_path / "elsewhere", 1, lambda: "somewhere"):
        log.info("lost")
    assert list(tmp_path.iterdir()) == []
