"""The command line, the page, the tables and what lies in the folder afterwards."""

import html.parser
import io
import json
import math
import re
import subprocess
import sys

import matplotlib.image
import pytest

from fedsim.report.__main__ import main
from fedsim.report.build import make_report, write_report
from tests.report.synthetic_runs import write_run

VOID = {"meta", "img"}


class Page(html.parser.HTMLParser):
    """Addresses that a page refers to, its pictures, and whether every element is closed."""

    def __init__(self):
        super().__init__()
        self.addresses, self.alts, self.ids, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [given[name] for name in ("src", "href", "data", "action") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag == "img":
            self.alts.append(given["alt"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write_run(folder, seed=seed, info={"parameters": {"base": 198_528, "adapter": 1024}})
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run with few figures."""
    return write_run(tmp_path_factory.mktemp("small"), rounds=1, evaluate=False, client_tests=False)


def test_the_page_is_whole_and_needs_nothing_beside_it(runs, tmp_path, capsys):
    out = tmp_path / "new" / "report"
    assert main([str(runs), "--out", str(out)]) == 0
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.alts) == 10
    assert all(page.alts)
    for address in page.addresses:
        assert address.startswith("data:image/png;base64,") or address.removeprefix("#") in page.ids
    assert re.findall(r"https?://|url\(|@import|<script", text) == []
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{out / 'index.html'}: 10 figures, 4 tables\n")
    assert shown.err == ""


def test_the_folder_holds_page_tables_and_both_kinds_of_figures(runs, tmp_path):
    write_report(make_report([runs]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "index.html", "report.md"]
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert [name for name in names if name.endswith(".svg")] == [
        name.replace(".png", ".svg") for name in names if name.endswith(".png")
    ]
    for name in names:
        content = (tmp_path / "figures" / name).read_bytes()
        if name.endswith(".png"):
            assert matplotlib.image.imread(io.BytesIO(content)).ndim == 3
        else:
            assert content.startswith(b"<?xml")
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (tmp_path / name).is_file()


def test_two_calls_write_the_same_bytes(runs, tmp_path):
    for name in ("one", "two"):
        write_report(make_report([runs]), tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 2 + 2 * 10
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_the_table_has_mean_deviation_least_and_most(runs):
    _, results, parameters, all_runs = make_report([runs]).tables
    row = dict(zip(results.head, results.rows[0], strict=True))
    # losses of the last round: 4.6 - 2/60 and 0.03 more; deviation of two values 0.03 apart: 0.03 / sqrt(2)
    assert row["final test loss"] == "4.5817 ± 0.0212 [4.5667, 4.5967]"
    assert row["best test loss (round)"] == "4.5817 ± 0.0212 [4.5667, 4.5967] (3)"
    assert row["final perplexity"].startswith("97.69 ± 2.07 [")
    assert row["final fairness variance"] == "6.67e-05"  # of 0, 0.01, 0.02: 2/3 * 1e-4, the same for both
    assert row["rounds"] == "3"
    assert row["seeds"] == "0, 1"
    assert row["communication"] == "72 KiB"
    assert row["seconds per round"] == "3.05 ± 0.0707 [3, 3.1]"
    assert parameters.rows[0] == (
        "all runs", "embedded", "199,552", "1,024", "0.5131%", "0.30 MiB", "4,096 bytes"
    )  # fmt: skip
    assert [line[0] for line in all_runs.rows] == ["run-0", "run-1"]
    lines = results.markdown().split("\n")
    assert len({line.count("|") for line in lines}) == 1


def test_counts_that_no_run_recorded_are_said_to_be_missing(tmp_path):
    (table,) = (table for table in make_report([write_run(tmp_path)]).tables if table.name == "parameters")
    assert table.rows[0][2] == "not recorded"
    assert "run.json has no entry `parameters`" in table.note


def test_parameters_and_payload_are_those_of_the_clients_that_took_part_in_any_seed(tmp_path):
    """The largest client of the federation may never be drawn, and each seed draws others."""
    tiers = [
        {"q_proj": [1]},
        {"q_proj": [2]},
        {"q_proj": [4]},
    ]  # the third, client 2, comes in round 2 of seed 1 only
    for seed, rounds in ((0, 1), (1, 2)):
        settings = ("lora.distribution=uniform", "strategy.name=flexlora")
        options = {"num_clients": 6, "cohort": 2, "tiers": tiers, "recorded": rounds}
        write_run(tmp_path, *settings, seed=seed, rounds=2, **options)
    (table,) = (table for table in make_report([tmp_path]).tables if table.name == "parameters")
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert row["trained by a client"] == "1,024 to 3,072"
    assert row["largest payload, factors"] == "12,288 bytes"
    assert "of the clients that took part" in table.note
    assert "of the largest client in" not in table.note


def test_names_cannot_break_the_page_or_the_table(tmp_path):
    for field in ("<b>&", "a|b$c$"):
        write_run(
            tmp_path / "runs", "data.source=x.jsonl", f"data.text_field='{field}'", name=f"r{len(field)}"
        )
    write_report(make_report([tmp_path / "runs"]), tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<b>" not in text
    assert "text_field=&lt;b&gt;&amp;" in text
    assert "a\\|b$c$" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_report_replaces_an_older_one_and_leaves_other_files(small, tmp_path):
    report = make_report([small])
    write_report(report, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures" / "old.png").write_text("of a figure that is no more")
    write_report(report, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "figures" / "old.png").exists()


def test_files_that_no_report_wrote_are_not_replaced(runs, tmp_path, capsys):
    (tmp_path / "figures").mkdir()
    assert main([str(runs), "--out", str(tmp_path)]) == 2
    assert "it has figures that no report wrote" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "figures"]


def test_a_run_folder_is_no_place_for_a_report(runs, capsys):
    for out in (runs / "run-0", runs / "run-0" / "checkpoints" / "new"):
        assert main([str(runs), "--out", str(out)]) == 2
        assert "got a run folder, or one within" in capsys.readouterr().err
    assert not (runs / "run-0" / "checkpoints").exists()
    assert main([str(runs), "--out", ""]) == 2
    assert "--out: must name a folder, got ''" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "ConfigError: command line: the following arguments are required: RUN, --out"),
        (["a"], "ConfigError: command line: the following arguments are required: --out"),
        (["nowhere", "--out", "out"], "RunFolderError: nowhere must be a run folder"),
        (["a", "--out", "b", "--clients", "1,x"], "must be client ids such as 0,3,7, got '1,x'"),
        (["a", "--out", "b", "--baseline", "iid"], "must be different keys with values such as"),
        (["a", "--out", "b", "--baseline", "x=1,x=2"], "must be different keys with values such as"),
        (["a", "--out", "b", "--baseline", "x=[1"], "ConfigError: x"),
        (["a", "--out", "b", "--colour"], "ConfigError: command line: unrecognized arguments: --colour"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.startswith("fedsim: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_a_file_is_refused(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main([str(runs), "--out", str(tmp_path / "file")]) == 2
    assert "must be a folder for the report" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/report", "taken", "run"])
def test_a_place_that_cannot_be_used_is_refused_before_anything_is_read(place, tmp_path, monkeypatch, capsys):
    def too_late(*arguments):
        raise AssertionError("the report was drawn first")

    monkeypatch.setattr("fedsim.report.build.make_report", too_late)
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken" / "figures").mkdir(parents=True)
    run = write_run(tmp_path, name="run", rounds=1)
    assert main([str(run), "--out", str(tmp_path / place)]) == 2
    assert "must be a folder for the report" in capsys.readouterr().err


def test_nothing_is_made_at_a_good_place_before_the_runs_are_read(tmp_path):
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out" / "report")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_what_all_runs_have_in_common_stands_first(tmp_path):
    for name, rank, alpha in (("a", 1, 0.1), ("b", 2, 0.1)):
        settings = (f"lora.rank={rank}", f"data.partition.dirichlet_alpha={alpha}")
        write_run(tmp_path, *settings, "training.optimizer.lr=0.25", name=name, rounds=2)
    table = make_report([tmp_path]).tables[0]
    assert table.title == "Common to all runs"
    found = {key: (what, value) for what, value, key in table.rows}
    assert found["run.rounds"] == ("rounds", "2")
    assert found["strategy.name"] == ("strategy", "fedavg")
    assert found["training.optimizer.lr"] == ("learning rate", "0.25")
    assert found["data.partition.dirichlet_alpha"][1] == "0.1"
    assert {"data.source", "model.name_or_path", "strategy.name", "cohort.size"} < set(found)
    assert "lora.rank" not in found
    assert "training.local_steps" not in found  # not set
    # what differs, or is of no use in some run, is not common
    write_run(tmp_path, "data.partition.name=iid", "lora.distribution=homogeneous", name="c", rounds=3)
    found = {row[2] for row in make_report([tmp_path]).tables[0].rows}
    assert not found & {"run.rounds", "data.partition.name", "data.partition.dirichlet_alpha", "lora.rank"}


def differences(folder, **options):
    """Baseline's name in the note, and configuration -> difference of losses."""
    (table,) = (table for table in make_report([folder], **options).tables if table.name == "results")
    place = table.head.index("final test loss, less that of the baseline")
    return table.note, {row[0]: row[place] for row in table.rows}


def test_differences_are_to_the_only_iid_arm_or_the_first_row_or_the_one_named(tmp_path):
    for name, better, *settings in (
        ("a", 0.0, "data.partition.dirichlet_alpha=0.1"),
        ("b", 0.25, "data.partition.dirichlet_alpha=100"),
    ):
        write_run(tmp_path, *settings, name=name, rounds=1, better_by=better)
    first, second, iid = "dirichlet_alpha=0.1", "dirichlet_alpha=100", "partition=iid"
    note, found = differences(tmp_path)
    assert f"The baseline is {first} " in note
    assert found == {first: "the baseline", second: "-0.2500"}
    write_run(tmp_path, "data.partition.name=iid", name="c", rounds=1, better_by=0.5)
    note, found = differences(tmp_path)
    assert f"The baseline is {iid} " in note
    assert found == {first: "+0.5000", second: "+0.2500", iid: "the baseline"}
    for wanted in ({"data.partition.dirichlet_alpha": 100}, {"dirichlet_alpha": 100.0}):
        note, found = differences(tmp_path, baseline=wanted)
        assert f"The baseline is {second} " in note
        assert found == {first: "+0.2500", second: "the baseline", iid: "-0.2500"}
    write_run(tmp_path, "data.partition.name=iid", "lora.rank=3", name="d", rounds=1)
    assert list(differences(tmp_path)[1].values()).index("the baseline") == 0  # two even ones: the first row


def test_a_baseline_that_is_not_one_configuration_is_refused(tmp_path, capsys):
    for alpha in (0.1, 1):
        write_run(tmp_path, f"data.partition.dirichlet_alpha={alpha}", name=f"a{alpha}", rounds=1)
    for text, said in {
        "dirichlet_alpha=7": "must hold for one configuration, got 0 of 2; there are: dirichlet_alpha=0.1; dirichlet",
        "data.partition.name=length_skew": "must hold for one configuration, got 2 of 2; these are: dirichlet_alpha",
        "alpha=1": "must have keys that make configurations, or short ones that their labels show, got 'alpha'",
        "run.seed=0": "must have keys that make configurations",
    }.items():
        assert main([str(tmp_path), "--out", str(tmp_path / "out"), "--baseline", text]) == 2
        assert said in capsys.readouterr().err
    assert main([str(tmp_path), "--out", str(tmp_path / "out"), "--baseline", "dirichlet_alpha=1"]) == 0
    assert "The baseline is dirichlet_alpha=1 " in (tmp_path / "out" / "report.md").read_text()


def test_only_runs_without_a_round_are_refused(tmp_path, capsys):
    write_run(tmp_path / "runs", recorded=0, status="failed", reason="no such file")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    assert "needs a run with at least one recorded round" in capsys.readouterr().err


def test_runs_that_are_not_finished_are_noted(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, recorded=2, status="failed", reason="loss is\nnan")
    write_run(tmp_path, seed=2, recorded=0, status="running")
    write_run(tmp_path, name="again", seed=0)
    notes = make_report([tmp_path]).notes
    assert "run-1: status failed after 2 of 3 rounds: loss is nan; left out of means and figures." in notes
    assert "run-2: no round recorded (status running); left out." in notes
    assert any("seed 0 stands for several runs (again, run-0)" in note for note in notes)


def test_another_base_within_a_group_is_noted(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, seed=seed, info={"inputs": {"data": str(seed), "base": str(seed)}})
    assert any("different base weights" in note for note in make_report([tmp_path]).notes)


def test_a_base_that_one_run_does_not_name_is_no_other_base(tmp_path):
    write_run(tmp_path, seed=0, info={"inputs": {"base": "0"}})
    write_run(tmp_path, seed=1)
    assert not any("different base weights" in note for note in make_report([tmp_path]).notes)


def test_what_damaged_folders_lack_is_not_called_unmeasured(tmp_path):
    """A loss that is not finite was evaluated, and a partition of another seed is one."""
    lost = {"test/loss": math.nan, "test/loss_initial": math.nan}
    for seed in (0, 1):
        path = write_run(tmp_path, seed=seed, extra=lambda round_index: lost)
        if seed == 0:
            (path / "partition.json").unlink()
            (path / "clients.parquet").unlink()
    report = make_report([tmp_path])
    names = {picture.name for picture in report.pictures}
    assert "partition_1" in names
    (partition,) = (picture for picture in report.pictures if picture.name == "partition_1")
    assert "seed\u00a01" in partition.caption
    text = " ".join(report.notes)
    assert "no round was evaluated" not in text
    assert "global test loss: no round recorded a finite one" in text
    assert "was tested after local training, by clients.parquet of the lowest seeds" in text


def test_a_finished_run_that_lost_its_last_rounds_is_told(tmp_path):
    path = write_run(tmp_path, rounds=3)
    assert not any("metrics.jsonl has" in note for note in make_report([path]).notes)
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:2]))
    assert any("finished, but metrics.jsonl has 2 of 3 rounds" in note for note in make_report([path]).notes)
    stopped = write_run(tmp_path, "early_stopping.metric=test_loss", name="stopped", rounds=3, recorded=2)
    assert not any("metrics.jsonl has" in note for note in make_report([stopped]).notes)
    info = json.loads((stopped / "run.json").read_text())
    info["early_stopping"] = {"metric": "test_loss", "exported_after_rounds": 3}
    (stopped / "run.json").write_text(json.dumps(info))
    (note,) = (note for note in make_report([stopped]).notes if "exported" in note)
    assert "metrics.jsonl lacks round 3" in note
    assert "never tested" not in note


def test_the_report_needs_neither_torch_nor_pandas(small, tmp_path):
    program = (
        "import sys; sys.modules['pandas'] = None; from fedsim.report.__main__ import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(small), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_is_told_by_python_m(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fedsim.report", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "RUN" in done.stdout
    assert "--out DIR" in done.stdout


def test_a_json_number_that_is_huge_does_not_stop_the_report(tmp_path):
    run = write_run(tmp_path, rounds=1)
    record = json.loads((run / "metrics.jsonl").read_text()) | {"test/perplexity": 1e300}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert "1e+300" in make_report([run]).tables[1].rows[0]
