import io
import logging

import pytest

from fedsim.tracking.progress import ProgressHandler, build_progress, logs_through

GOLDEN = """\
training the base model
quick: rounds 3 to 4, 8 clients in each
    round  test loss  train loss  fairness  tokens/s  clients/s seconds    left
      3/4     4.5123      4.7000    0.0123    12,346       3.21     2.5 0:01:40
WARNING [3] is the shard that failed
      4/4          -      4.6000         -    12,346       3.21     2.5 0:00:00
written to runs/quick
"""


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def fake_run(progress, clock):
    metrics = {"train/tokens_per_s": 12345.6, "train/clients_per_s": 3.21, "time/round_s": 2.46}
    progress.phase("training the base model")
    progress.start("quick", 2, 4, 8)
    progress.phase("training")
    progress.clients_done(1, 2, 500)
    clock.now += 100.0
    progress.clients_done(2, 2, 1000)
    evaluated = {"test/loss": 4.51234, "fairness/test_loss_variance": 0.01234}
    progress.round_done({"round_index": 2, "train/loss": 4.7, **metrics, **evaluated})
    progress.phase("training")
    handler = ProgressHandler(progress)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.handle(
        logging.LogRecord("fedsim", logging.WARNING, "", 0, "[3] is the shard that failed", None, None)
    )
    clock.now += 100.0
    progress.round_done({"round_index": 3, "train/loss": 4.6, **metrics, "test/loss": None})
    progress.note("written to runs/quick")
    progress.stop()
    progress.stop()


@pytest.mark.parametrize("mode", ["plain", "auto"])
def test_plain_lines_outside_a_terminal(mode):
    stream, clock = io.StringIO(), Clock()
    fake_run(build_progress(mode, stream, clock), clock)
    assert stream.getvalue() == GOLDEN


def test_plain_table_fits_80_columns():
    assert max(len(line) for line in GOLDEN.splitlines()) < 80


def test_off_shows_log_lines_alone():
    stream, clock = io.StringIO(), Clock()
    fake_run(build_progress("off", stream, clock), clock)
    assert stream.getvalue() == "WARNING [3] is the shard that failed\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("mode", "stream"), [("auto", Terminal()), ("live", io.StringIO())])
def test_live_display_shows_the_table_and_the_bars(monkeypatch, mode, stream):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    clock = Clock()
    progress = build_progress(mode, stream, clock)
    fake_run(progress, clock)
    shown = stream.getvalue()
    for line in GOLDEN.splitlines():
        assert line in shown
    assert "rounds " in shown
    assert "\x1b[?25h" in shown  # the cursor is back
    assert progress.console.file is stream


def test_bar_of_the_clients_shows_how_many_and_how_fast():
    stream, clock = Terminal(), Clock()
    progress = build_progress("live", stream, clock)
    progress.start("quick", 0, 3, 8)
    progress.phase("training")
    clock.now += 100.0
    progress.clients_done(1, 2, 1000)
    progress._bars.refresh()
    progress.stop()
    assert "1/2 here · 10 tokens/s" in stream.getvalue()
    assert "0/3 - left · training" in stream.getvalue()


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream, clock = Terminal(), Clock()
    fake_run(build_progress("auto", stream, clock), clock)
    assert stream.getvalue() == GOLDEN


def test_time_left_falls_within_a_round_and_never_below_zero():
    stream, clock = Terminal(), Clock()
    progress = build_progress("live", stream, clock)
    progress.start("quick", 0, 3, 1)
    assert "3, 1 client in each\n" in stream.getvalue()
    assert progress._rounds.left() == "-"
    clock.now += 60.0
    progress.round_done({"round_index": 0})
    assert progress._rounds.left() == "0:02:00"
    clock.now += 30.0
    assert progress._rounds.left() == "0:01:30"
    clock.now += 3600.0
    assert progress._rounds.left() == "0:00:00"
    progress.stop()


def test_log_lines_go_through_the_display():
    before, display = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(before)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with logs_through(build_progress("plain", display)):
            logging.getLogger("fedsim").warning("[1] slow disk")
        logging.getLogger("fedsim").warning("after it")
    finally:
        root.removeHandler(handler)
    assert display.getvalue() == "WARNING [1] slow disk\n"
    assert before.getvalue() == "WARNING after it\n"
