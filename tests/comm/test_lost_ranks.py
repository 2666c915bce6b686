"""Processes that die or hang: the others end, and say who is missing and what it was doing."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.comm.agree import all_or_none
from fedsim.comm.group import join_group
from fedsim.comm.marks import Mark, Marks
from fedsim.errors import LostRankError
from tests.helpers import _preloaded_context, run_ranks

TIMEOUT_S = 4.0


def work_until_lost(rank: int, rendezvous: str, ready: Any, results: Any) -> None:
    """Rounds of nothing; in round 3 rank 2 says who it is and is busy for a minute."""
    torch.set_num_threads(1)
    group = join_group(rank, 3, torch.device("cpu"), "gloo", TIMEOUT_S, init_method=f"file://{rendezvous}")
    try:
        for round_index in range(10):
            with all_or_none(group, f"local training, round {round_index}"):
                if round_index == 3 and rank == 2:
                    ready.put(os.getpid())
                    time.sleep(60)
    except LostRankError as error:
        try:
            group.gather_objects(None)
        except LostRankError as again:
            results.put((rank, str(error), again is error))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.mark.parametrize(
    ("number", "fragment"),
    [
        (signal.SIGKILL, "rank 2 (last seen at: local training, round 3) ended or stopped; look there"),
        (signal.SIGSTOP, "rank 2 (last seen at: local training, round 3) ended or stopped; look there"),
        (None, "rank 2 (last seen at: local training, round 3) alive, and not there after comm.timeout_s=4"),
    ],
)
def test_who_is_missing(number: signal.Signals | None, fragment: str, tmp_path: Path) -> None:
    context = _preloaded_context()
    ready, results = context.Queue(), context.Queue()
    processes = [
        context.Process(
            target=work_until_lost, args=(rank, str(tmp_path / "meet"), ready, results), daemon=True
        )
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    try:
        pid = ready.get(timeout=60)
        if number is not None:
            time.sleep(1.0)  # so that its last mark is written
            os.kill(pid, number)
        answers = [results.get(timeout=60) for _ in range(2)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert sorted(rank for rank, _, _ in answers) == [0, 1]
    for _, text, again in answers:
        assert text.startswith("local training, round 3: "), text
        assert fragment in text
        assert again, "later exchanges fail at once"


def test_the_living_are_not_taken_for_silent_while_all_look() -> None:
    """As when all ranks are sent SIGTERM at once: each watches the others, and goes on writing its own mark."""
    shelf = Shelf()
    found: list[tuple[int, list[int]]] = []
    everyone = [Marks(lambda: shelf, rank, 3, period_s=0.1) for rank in range(2)]
    shelf.set("mark/2", Mark(5, 1, "local training, round 0").to_text())  # and never again
    for rank, marks in enumerate(everyone):
        marks.each_beat(lambda rank=rank, marks=marks: found.append((rank, marks.silent())))
    deadline = time.monotonic() + 30
    while {rank for rank, silent in found if silent} != {0, 1} and time.monotonic() < deadline:
        time.sleep(0.05)
    for marks in everyone:
        marks.stop(failed=False)
    assert {rank for rank, silent in found if silent == [2]} == {0, 1}
    assert all(silent in ([], [2]) for _, silent in found)


class Shelf(dict[str, str]):
    """A store in memory."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def explain(others: dict[int, Mark], alive: set[int], exchanges: int = 3) -> str:
    """What rank 0 of four says, after `exchanges`, about marks of the others of which some go on."""
    shelf = Shelf()
    marks = Marks(lambda: shelf, 0, 4, period_s=0.05)
    marks.note("aggregation, round 7")
    marks.note_part("gathering the factors of q_proj")
    for _ in range(exchanges):
        with marks.exchange():
            pass
    beats = dict.fromkeys(others, 0)

    def write() -> None:
        for rank, mark in others.items():
            beats[rank] += rank in alive
            shelf.set(
                f"mark/{rank}", Mark(mark.beat + beats[rank], mark.exchanges, mark.what, mark.ended).to_text()
            )

    write()
    marks.each_beat(write)
    text = marks.explain(30.0)
    marks.stop(failed=False)
    return text


def test_what_marks_tell() -> None:
    where = "aggregation, round 7 (gathering the factors of q_proj): "
    here, before = Mark(1, 3, "aggregation, round 7"), Mark(1, 2, "local training, round 7")
    left = Mark(1, 2, "evaluation, round 6", ended=True)
    told = explain({1: here, 2: before, 3: here}, {1, 3})
    assert told.startswith(
        f"{where}rank 2 (last seen at: local training, round 7) ended or stopped; look there"
    )
    told = explain({1: here, 2: before, 3: before}, {1, 2, 3})
    assert told.startswith(f"{where}ranks 2, 3 (last seen at: local training, round 7) alive, and not there")
    assert "comm.timeout_s=30" in told
    told = explain({1: here, 3: left}, {1})
    assert told.startswith(f"{where}rank 2 (never seen) ended or stopped"), "the cause, not who left after it"
    told = explain({1: here, 2: here, 3: left}, {1, 2})
    assert told.startswith(f"{where}rank 3 (last seen at: evaluation, round 6) left after an error")
    told = explain({1: here, 2: here, 3: here}, {1, 2, 3})
    assert told.startswith(f"{where}all other ranks are alive, and the connection to one of them has failed")
    assert "GLOO_SOCKET_IFNAME" in told


def test_a_store_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "20001")

    def gone() -> Shelf:
        raise RuntimeError("connection refused")

    marks = Marks(gone, 1, 2, period_s=0.01)
    assert "nor does the place where they met (n1:20001)" in marks.explain(30.0)
    assert marks.silent() == []
    marks.stop(failed=True)


def mismatched(group: Any) -> str:
    try:
        group.all_gather("no tensor")
    except (TypeError, ValueError, AttributeError) as error:
        return type(error).__name__
    return "nothing"


def test_a_bug_stays_a_bug(tmp_path: Path) -> None:
    assert "nothing" not in run_ranks(mismatched, 2, tmp_path)


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(LostRankError) as lost:
        join_group(1, 4, torch.device("cpu"), init_method=f"file://{tmp_path / 'meet'}", join_timeout_s=1.0)
    assert "ranks 0, 2, 3 had not come after 1 s; check that they have started" in str(lost.value)
    assert "GLOO_SOCKET_IFNAME" in str(lost.value)
