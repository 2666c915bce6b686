"""Tables by method and resource distribution, against figures worked out anew from the runs' files."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from fedsim.report.__main__ import main
from fedsim.report.build import make_report
from fedsim.report.style import LOSS
from tests.report.synthetic_runs import write_run
from tests.report.test_report_figures import axes_of, check, pictures_of

SEEDS = (0, 1, 2)
CATEGORIES = ("Question Answering", "Text Matching", "Word Relation")


def scores(level, seed):
    """Metrics of a round: every kind of mean has another value, and seeds differ by unequal steps."""
    noise = (0.02, -0.015, 0.055)[
        seed
    ] * level  # so that a difference of arms varies too, but less than they do

    def of_round(round_index):
        rouge = level + noise + 0.01 * round_index
        by_category = {name: rouge * (1 + place) for place, name in enumerate(CATEGORIES[: 2 + (seed > 0)])}
        return {
            "test/rougeL": rouge,
            "test/rougeL_by_client": rouge + 0.1,
            "test/rougeL_stem": rouge + 0.02,
            "test/rougeL_stem_by_client": rouge + 0.12,
            "test/exact_match": rouge / 2,
            "test/num_without_rouge_tokens": 7.0 + seed,
            **{f"test/rougeL_category/{name}": value for name, value in by_category.items()},
        }

    return of_round


ARMS = {
    "fedit": (("strategy.name=fedavg", "lora.distribution=homogeneous"), 0.20, 0.0),
    "fedavg": (
        ("strategy.name=fedavg", "lora.distribution=homogeneous", "training.optimizer.name=sgd"),
        0.10,
        -0.3,
    ),
    "flexlora": (("strategy.name=flexlora", "lora.distribution=uniform"), 0.25, 0.2),
    "hetlora": (("strategy.name=hetlora", "lora.distribution=uniform"), 0.17, -0.1),
    "sgd": (
        ("strategy.name=flexlora", "lora.distribution=uniform", "training.optimizer.name=sgd"),
        0.13,
        -0.2,
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five arms of three seeds."""
    folder = tmp_path_factory.mktemp("arms")
    for name, (settings, level, better_by) in ARMS.items():
        for seed in SEEDS:
            write_run(
                folder,
                *settings,
                name=f"{name}-{seed}",
                seed=seed,
                rounds=4,
                better_by=better_by * (1 + 0.1 * seed),
                extra=scores(level, seed),
            )
    return folder


def tables_of(*paths, **options):
    return {table.name: table for table in make_report(list(paths), **options).tables}


def cells(table):
    """(first cell, head) -> text."""
    return {(row[0], head): cell for row in table.rows for head, cell in zip(table.head, row, strict=True)}


def recorded(runs, arm, key, seeds=SEEDS):
    """The metric's last value of each seed, read from the files."""
    values = []
    for seed in seeds:
        lines = (runs / f"{arm}-{seed}" / "metrics.jsonl").read_text().splitlines()
        values.append(json.loads(lines[-1])[key])
    return np.array(values)


def plus_minus(values, shown):
    return f"{shown.format(values.mean())} ± {shown.replace('+', '').format(values.std(ddof=1))}"


def cell_of(mine, base, shown):
    return f"{plus_minus(mine, shown)} ({plus_minus(mine - base, shown.replace('{:', '{:+'))})"


@pytest.mark.parametrize(
    ("table", "key", "scale", "shown"),
    [("rouge_by_method", "test/rougeL", 100, "{:.2f}"), ("loss_by_method", "test/loss", 1, "{:.4f}")],
)
def test_cells_are_means_over_seeds_and_paired_differences_to_homogeneous(runs, table, key, scale, shown):
    found = cells(tables_of(runs)[table])
    fedit, flexlora, hetlora, fedavg, sgd = (
        scale * recorded(runs, arm, key) for arm in ("fedit", "flexlora", "hetlora", "fedavg", "sgd")
    )
    assert found["FedIT + FlexLoRA", "homogeneous"] == f"{plus_minus(fedit, shown)} (FedIT)"
    assert found["FedIT + FlexLoRA", "uniform"] == cell_of(flexlora, fedit, shown)
    assert found["FedIT + HetLoRA", "uniform"] == cell_of(hetlora, fedit, shown)
    assert found["FedAvg + FlexLoRA", "uniform"] == cell_of(sgd, fedavg, shown)
    assert found["FedAvg + FlexLoRA", "seeds"] == "0, 1, 2"
    # the likely mistakes would be seen: another row's homogeneous arm, tasks alike instead of examples, unpaired seeds
    wrong = cell_of(sgd, fedit, shown)
    assert found["FedAvg + FlexLoRA", "uniform"] != wrong
    if key == "test/rougeL":
        by_task = 100 * recorded(runs, "flexlora", "test/rougeL_by_client")
        assert not found["FedIT + FlexLoRA", "uniform"].startswith(plus_minus(by_task, shown))
    else:
        unpaired = np.hypot(flexlora.std(ddof=1), fedit.std(ddof=1))
        assert f"± {unpaired:.4f})" not in found["FedIT + FlexLoRA", "uniform"]


def test_gains_by_category_are_over_the_seeds_that_tested_it(runs):
    tables = tables_of(runs)
    (table,) = (one for one in tables.values() if one.title.endswith("generated answers: FedIT + FlexLoRA"))
    found = cells(table)
    for name, seeds in zip(CATEGORIES, (SEEDS, SEEDS, (1, 2)), strict=True):
        key = f"test/rougeL_category/{name}"
        base, mine = (100 * recorded(runs, arm, key, seeds) for arm in ("fedit", "flexlora"))
        assert found[name, "seeds"] == str(len(seeds))
        assert found[name, "homogeneous"] == plus_minus(base, "{:.2f}")
        assert found[name, "uniform"] == plus_minus(mine - base, "{:+.2f}")

    def means(arm):
        return np.array(
            [
                np.mean(
                    [100 * recorded(runs, arm, f"test/rougeL_category/{name}", [seed])[0] for name in own]
                )
                for seed, own in zip(SEEDS, (CATEGORIES[:2], CATEGORIES, CATEGORIES), strict=True)
            ]
        )

    gain = means("flexlora") - means("fedit")
    assert found["mean over categories", "uniform"] == plus_minus(gain, "{:+.2f}")
    # weighed by examples it would be another figure
    weighted = 100 * (recorded(runs, "flexlora", "test/rougeL") - recorded(runs, "fedit", "test/rougeL"))
    assert abs(weighted.mean() - gain.mean()) > 1


def test_scores_stand_next_to_the_loss_with_what_rouge_cannot_score(runs):
    table = tables_of(runs)["answers"]
    (line,) = (row for row in table.rows if "uniform" in row[0] and "hetlora" in row[0])
    found = dict(zip(table.head, line, strict=True))
    for head, key in {
        "Rouge-L": "test/rougeL",
        "Rouge-L by task": "test/rougeL_by_client",
        "Rouge-L, stemmer": "test/rougeL_stem",
        "Rouge-L, stemmer, by task": "test/rougeL_stem_by_client",
        "exact match": "test/exact_match",
    }.items():
        assert found[head] == plus_minus(100 * recorded(runs, "hetlora", key), "{:.2f}")
    assert found["references without tokens"] == "8"
    assert found["test loss"] == plus_minus(recorded(runs, "hetlora", "test/loss"), "{:.4f}")


def losses_of(path):
    """Test loss before training and after each round, and the records."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return np.array([records[0]["test/loss_initial"], *(one["test/loss"] for one in records)]), records


def test_the_figure_of_answers_shows_scores_and_loss_of_every_arm(runs):
    drawn = pictures_of(runs)
    assert "answers_tf" not in drawn
    check(drawn["answers"])
    by_title = {axes.get_title(): axes for axes in axes_of(drawn["answers"])}
    keys = ("test/rougeL", "test/rougeL_stem", "test/exact_match", "test/loss")
    assert list(by_title) == ["Rouge-L, no stemmer", "Rouge-L, stemmer", "exact match", "test loss"]
    for (heading, axes), key in zip(by_title.items(), keys, strict=True):
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert len(lines) == len(ARMS)
        (mine,) = (line for line in lines if "hetlora" in line.get_label())
        scale = 1 if key == "test/loss" else 100
        assert mine.get_ydata()[-1] == pytest.approx(scale * recorded(runs, "hetlora", key).mean())
        assert axes.get_xlabel() == "rounds completed"
        assert axes.get_ylabel() == (LOSS if heading == "test loss" else "score (x 100)")
        if key != "test/loss":
            assert axes.get_ylim()[0] == 0


def test_rounds_to_a_given_target_and_their_cost(runs):
    target = 4.775
    table = tables_of(runs, target_loss=target)["rounds_to_target"]
    lines = {row[:2]: row for row in table.rows}
    costs = {}
    for arm in ("fedit", "flexlora"):
        first, seconds, sent = [], [], []
        for seed in SEEDS:
            losses, records = losses_of(runs / f"{arm}-{seed}")
            first.append(int(np.argmax(losses <= target)))
            seconds.append(np.mean([one["time/round_s"] - one["time/evaluate_s"] for one in records]))
            sent.append(np.mean([one["comm/uplink_bytes"] + one["comm/downlink_bytes"] for one in records]))
        costs[arm] = np.mean(first), np.mean(seconds), np.mean(sent), set(first)
    rounds, seconds, sent, distinct = costs["flexlora"]
    assert len(distinct) > 1
    line = lines["FedIT + FlexLoRA", "uniform"]
    assert line[2] == "4.7750"
    assert line[3].startswith(f"{rounds:.3g} ± ")
    assert line[4:6] == (f"{seconds:.3g}", f"{seconds / costs['fedit'][1]:.2f}")
    assert line[7] == f"{sent / costs['fedit'][2]:.2f}"
    assert line[10:] == (
        f"{rounds * seconds / costs['fedit'][1]:.1f}",
        f"{rounds * sent / costs['fedit'][2]:.1f}",
    )
    assert lines["FedIT + FlexLoRA", "homogeneous (FedIT)"][5] == "1.00"


def test_the_usual_target_is_three_quarters_of_the_way_of_the_arm_that_improved_least(runs):
    table = tables_of(runs)["rounds_to_target"]
    ends = {}
    for arm in ARMS:
        mean = np.mean([losses_of(runs / f"{arm}-{seed}")[0] for seed in SEEDS], axis=0)
        ends[arm] = mean[0] - 0.75 * (mean[0] - mean.min())
    assert {row[2] for row in table.rows} == {f"{max(ends.values()):.4f}"}
    assert max(ends, key=ends.get) == "fedavg"  # the one whose losses were made worst
    assert not any("not reached" in row for row in table.rows)


def test_a_target_that_some_or_no_seed_reached_is_said(runs, tmp_path):
    table = tables_of(runs, target_loss=1.0)["rounds_to_target"]
    assert {row[3] for row in table.rows} == {"not reached"}
    assert {row[10:] for row in table.rows} == {("-", "-")}
    lowest = min(losses_of(runs / f"hetlora-{seed}")[0].min() for seed in SEEDS)
    some = tables_of(runs, target_loss=lowest + 1e-6)["rounds_to_target"]
    (line,) = (row for row in some.rows if row[:2] == ("FedIT + HetLoRA", "uniform"))
    assert line[3] == "4 (1 of 3 seeds)"


RANKS = [{"q_proj": [2], "v_proj": [2]}, {"q_proj": [4], "v_proj": [8]}]


def test_tiers_have_their_own_clients_costs(tmp_path):
    for seed in (0, 1):
        write_run(
            tmp_path,
            "lora.distribution=uniform",
            "strategy.name=flexlora",
            seed=seed,
            rounds=5,
            tiers=RANKS,
            info={"parameters": {"base": 100_000, "adapter": 2048}},
            extra=lambda round_index: {"ranks/peak_memory_mib": 500.0 + round_index},
        )
    table = tables_of(tmp_path)["tiers"]
    found = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    tables = [pq.read_table(tmp_path / f"run-{seed}" / "clients.parquet").to_pandas() for seed in (0, 1)]
    for tier, line in enumerate(found):
        own = [rows[rows.client_id % 2 == tier] for rows in tables]
        seconds = np.array([rows.seconds.mean() for rows in own])
        a_step = np.array([1e3 * rows.seconds.sum() / rows.steps.sum() for rows in own])
        trained = 1024 * (tier + 1)
        assert line["tier"] == f"type {tier + 1}"
        assert line["local runs"] == str(sum(len(rows) for rows in own))
        assert line["clients"] == "3"
        assert line["trained parameters"] == f"{trained:,}"
        assert line["share of all"] == f"{trained / (100_000 + trained):.2%}"
        assert line["seconds a local run"] == plus_minus(seconds, "{:.3g}")
        assert line["milliseconds a step"] == plus_minus(a_step, "{:.3g}")
        assert line["peak memory of a process"] == "504 MiB"
        everyone = np.array([rows.seconds.mean() for rows in tables])
        assert line["seconds a local run"] != plus_minus(everyone, "{:.3g}")
    assert [line["LoRA ranks"] for line in found] == ["2 everywhere", "4 on q_proj; 8 on v_proj"]
    assert [line["sent in a round"] for line in found] == ["4 KiB", "8 KiB"]


def test_what_runs_do_not_have_is_left_out(tmp_path):
    write_run(tmp_path / "plain", rounds=1)
    assert set(tables_of(tmp_path / "plain")) == {"common", "results", "parameters", "runs"}
    write_run(
        tmp_path / "bare",
        "strategy.name=flexlora",
        "lora.distribution=uniform",
        rounds=1,
        evaluate=False,
        client_tests=False,
    )
    assert set(tables_of(tmp_path / "bare")) == {"common", "results", "parameters", "runs"}
    write_run(tmp_path / "one", "strategy.name=flexlora", "lora.distribution=uniform", rounds=2, tiers=RANKS)
    found = tables_of(tmp_path / "one")
    assert set(found) == {
        "common", "results", "parameters", "runs", "loss_by_method", "rounds_to_target", "tiers"
    }  # fmt: skip
    assert re.fullmatch(r"4\.\d{4}", found["loss_by_method"].rows[0][-1])  # nothing to compare with
    assert [found["tiers"].rows[0][place] for place in (6, 10)] == ["not recorded", "not recorded"]


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    for name in ("homogeneous", "uniform"):
        write_run(
            tmp_path,
            f"lora.distribution={name}",
            "strategy.name=flexlora",
            name=name,
            rounds=2,
            extra=lambda round_index, name=name: {"test/loss": np.nan if name == "uniform" else 4.0},
        )
    (row,) = tables_of(tmp_path)["loss_by_method"].rows
    assert row[-2:] == ("4.0000", "not finite")
    lines = {row[1]: row[3] for row in tables_of(tmp_path, target_loss=4.5)["rounds_to_target"].rows}
    assert lines == {"homogeneous": "1", "uniform": "not reached"}


def test_scores_of_teacher_forced_guesses_are_named_so(tmp_path):
    def guessed(round_index):
        return {"test/rougeL_tf": 0.5, "test/rougeL_tf_category/A": 0.25}

    for name in ("homogeneous", "uniform"):
        write_run(
            tmp_path,
            f"lora.distribution={name}",
            "strategy.name=flexlora",
            name=name,
            rounds=1,
            extra=guessed,
        )
    found = tables_of(tmp_path)
    assert found["rouge_tf_by_method"].title.startswith("Rouge-L of teacher-forced guesses")
    assert found["rouge_tf_by_method"].rows[0][2:] == ("50.00", "50.00 (+0.00)")
    assert found["gain_by_category_tf_1"].rows[0] == ("A", "1", "25.00", "+0.00")
    assert "rouge_by_method" not in found
    assert "answers_tf" in found
    drawn = pictures_of(tmp_path)
    assert "answers" not in drawn
    check(drawn["answers_tf"])
    assert [axes.get_title() for axes in axes_of(drawn["answers_tf"])] == ["Rouge-L, no stemmer", "test loss"]
    assert "teacher-forced guesses" in drawn["answers_tf"].title


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--target-loss=two", "must be a number, 0 or more, got 'two'"),
        ("--target-loss=nan", "must be a number, 0 or more, got 'nan'"),
        ("--target-loss=-1", "must be a number, 0 or more, got '-1'"),
        ("--modules=k_proj,", "must be names such as k_proj,layers.0.fc1, got 'k_proj,'"),
    ],
)
def test_options_are_checked(option, said, tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "out"), option]) == 2
    assert said in capsys.readouterr().err


def test_a_run_that_stopped_early_is_scored_by_the_state_that_it_exported(tmp_path):
    path = write_run(
        tmp_path,
        "lora.distribution=uniform",
        "strategy.name=flexlora",
        rounds=4,
        extra=lambda round_index: {"test/rougeL": (0.1, 0.4, 0.3, 0.2)[round_index]},
    )
    assert tables_of(tmp_path)["rouge_by_method"].rows[0][-1] == "20.00"
    info = json.loads((path / "run.json").read_text())
    info["early_stopping"] = {"metric": "test/rougeL", "exported_after_rounds": 2, "best_after_rounds": 2}
    (path / "run.json").write_text(json.dumps(info))
    found = tables_of(tmp_path)
    assert found["rouge_by_method"].rows[0][-1] == "40.00"
    assert found["answers"].rows[0][2] == "40.00"
    assert found["answers"].rows[0][-1] == f"{losses_of(path)[0][2]:.4f}"


def stopped(path, exported_after_rounds):
    info = json.loads((path / "run.json").read_text())
    info["early_stopping"] = {"metric": "validation/loss", "exported_after_rounds": exported_after_rounds}
    (path / "run.json").write_text(json.dumps(info))


def test_seeds_whose_exported_state_was_not_tested_are_told(tmp_path):
    """The untrained state was tested before training; one before a round without evaluation never was."""
    arm = ("lora.distribution=uniform", "strategy.name=flexlora", "evaluation.every_rounds=2")

    def every_other_round(round_index):
        return {} if round_index % 2 else {"test/loss": None}

    paths = [write_run(tmp_path, *arm, seed=seed, rounds=4, extra=every_other_round) for seed in (0, 1, 2)]
    for path, exported in zip(paths, (0, 2, 3), strict=True):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if k != "test/loss" or v is not None} for line in lines]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        stopped(path, exported)
    report = make_report([tmp_path])
    (table,) = (table for table in report.tables if table.name == "loss_by_method")
    second = [json.loads(line) for line in (paths[1] / "metrics.jsonl").read_text().splitlines()][1][
        "test/loss"
    ]
    assert table.rows[0][1:] == (
        "0, 1, 2",
        f"{np.mean([5.5, second]):.4f} ± {np.std([5.5, second], ddof=1):.4f} (2 of 3 runs)",
    )
    told = [note for note in report.notes if "never tested" in note]
    assert len(told) == 1
    assert told[0].startswith("run-2:")


def test_means_at_the_end_are_over_all_seeds_though_some_stopped_before(tmp_path):
    """Else the figure of the seed that went on longest would stand for all."""
    arms = [("strategy.name=flexlora", "lora.distribution=uniform"), ("strategy.name=flexlora",)]
    for number, arm in enumerate(arms):
        for seed, rounds, better in ((0, 2, 0.0), (1, 6, 2.0)):
            rule = ("early_stopping.metric=test_loss",)
            name = f"arm-{number}-{seed}"
            write_run(
                tmp_path, *arm, *rule, name=name, seed=seed, rounds=6, recorded=rounds, better_by=better
            )
    report = make_report([tmp_path])
    (picture,) = (picture for picture in report.pictures if picture.name == "class_loss_at_end")
    drawn = np.array(
        [line.get_ydata() for line in picture.figure.axes[0].get_lines() if len(line.get_xdata()) == 3]
    )
    paths = [tmp_path / f"arm-0-{seed}" for seed in (0, 1)]
    ends = [json.loads((path / "metrics.jsonl").read_text().splitlines()[-1]) for path in paths]
    expected = [np.mean([end[f"test/loss_length_class_{index}"] for end in ends]) for index in range(3)]
    assert any(np.allclose(values, expected) for values in drawn), (drawn, expected)
    targets = {row[2] for table in report.tables if table.name == "rounds_to_target" for row in table.rows}
    least = np.mean([min(losses_of(path)[0][1:]) for path in paths])
    assert targets == {f"{5.5 - 0.75 * (5.5 - least):.4f}"}


def test_an_unfinished_run_that_was_never_tested_is_no_point(tmp_path):
    for name, seed, recorded in (("a0", 0, 3), ("a1", 1, 1)):
        path = write_run(
            tmp_path, "lora.rank=4", name=name, seed=seed, rounds=5, recorded=recorded, status="failed"
        )
        if recorded == 1:
            (line,) = (path / "metrics.jsonl").read_text().splitlines()
            kept = {key: value for key, value in json.loads(line).items() if not key.startswith("test/")}
            (path / "metrics.jsonl").write_text(json.dumps(kept) + "\n")
    write_run(tmp_path, name="b", rounds=5)
    report = make_report([tmp_path])
    assert "final_test_loss" in [picture.name for picture in report.pictures]
