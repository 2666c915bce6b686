"""Which runs belong together, and what they are called."""

import numpy as np
import pytest

from fedsim.config.keys import all_keys
from fedsim.report.folders import find_runs, read_run
from fedsim.report.groups import PARTITION, USERS_OF_KEYS, group_runs
from tests.report.synthetic_runs import write_run


def groups_in(folder):
    return group_runs([read_run(path) for path in find_runs([folder])])


def test_seeds_of_one_configuration_are_a_group(tmp_path):
    for seed in (2, 0, 1):
        write_run(tmp_path, seed=seed, rounds=2)
    (group,) = groups_in(tmp_path)
    assert [run.seed for run in group.runs] == [0, 1, 2]
    assert group.label == "all runs"


def test_a_run_alone_is_called_by_its_name(tmp_path):
    (group,) = groups_in(write_run(tmp_path, name="alone", rounds=1))
    assert group.label == "alone"


def test_what_does_not_change_the_result_does_not_split_a_group(tmp_path):
    write_run(tmp_path / "a", rounds=1)
    write_run(tmp_path / "b", "tracking.wandb.mode=disabled", "checkpoint.keep_last=7", seed=1, rounds=1)
    assert len(groups_in(tmp_path)) == 1


def test_another_number_of_rounds_is_another_configuration(tmp_path):
    write_run(tmp_path, rounds=1)
    write_run(tmp_path, rounds=2, seed=1)
    assert [group.label for group in groups_in(tmp_path)] == ["rounds=1", "rounds=2"]


def test_more_patience_is_another_configuration(tmp_path):
    """It decides how long a run goes on, and what it exports."""
    for patience in (1, 10):
        rule = ("early_stopping.metric=test_loss", f"early_stopping.patience={patience}")
        write_run(tmp_path, *rule, name=f"p{patience}", rounds=2)
    assert [group.label for group in groups_in(tmp_path)] == ["patience=1", "patience=10"]


def test_labels_name_what_differs_in_order_of_size_with_iid_last(tmp_path):
    for alpha in ("100", "0.1", "1"):
        write_run(tmp_path, f"data.partition.dirichlet_alpha={alpha}", name=f"a{alpha}", rounds=1)
    write_run(tmp_path, "data.partition.name=iid", name="iid", rounds=1)
    assert [group.label for group in groups_in(tmp_path)] == [
        "dirichlet_alpha=0.1",
        "dirichlet_alpha=1",
        "dirichlet_alpha=100",
        "partition=iid",
    ]


def test_keys_that_the_partitioner_does_not_use_do_not_tell_runs_apart(tmp_path):
    for seed, alpha in ((0, 0.1), (1, 100)):
        settings = ("data.partition.name=iid", f"data.partition.dirichlet_alpha={alpha}")
        write_run(
            tmp_path,
            *settings,
            f"data.partition.min_examples={seed + 1}",
            name=f"i{seed}",
            seed=seed,
            rounds=1,
        )
    (iid,) = groups_in(tmp_path)
    assert [run.seed for run in iid.runs] == [0, 1]
    assert iid.label == "all runs"


def test_a_label_names_no_key_that_the_partitioner_does_not_use(tmp_path):
    partition = "data.partition."
    for name, skew, *more in (
        ("iid", "iid", "dirichlet_alpha=7", "examples_per_client=30"),
        ("length", "length_skew", "dirichlet_alpha=0.1", "examples_per_client=30"),
        ("even", "length_skew", "dirichlet_alpha=1", "examples_per_client=30"),
        ("quantity", "quantity_skew", "dirichlet_alpha=0.1", "min_examples=10"),
        ("natural", "natural", "min_examples=10", "dirichlet_alpha=9"),
    ):
        settings = [f"{partition}name={skew}", *(partition + key for key in more)]
        write_run(tmp_path, *settings, name=name, rounds=1)
    assert [group.label for group in groups_in(tmp_path)] == [
        "partition=length_skew, dirichlet_alpha=0.1",
        "partition=length_skew, dirichlet_alpha=1",
        "partition=natural",
        "partition=quantity_skew, dirichlet_alpha=0.1",
        "partition=iid",
    ]


def test_the_users_of_a_partition_key_are_partitioners():
    names = set(all_keys()[PARTITION].choices)
    for key, users in USERS_OF_KEYS.items():
        assert f"data.partition.{key}" in all_keys()
        assert set(users) < names


def test_two_skews_and_two_alphas_name_both(tmp_path):
    for skew in ("length_skew", "quantity_skew"):
        for alpha in ("0.1", "1"):
            write_run(
                tmp_path,
                f"data.partition.name={skew}",
                f"data.partition.dirichlet_alpha={alpha}",
                name=f"{skew}{alpha}",
                rounds=1,
            )
    assert [group.label for group in groups_in(tmp_path)] == [
        f"partition={skew}, dirichlet_alpha={alpha}"
        for skew in ("length_skew", "quantity_skew")
        for alpha in ("0.1", "1")
    ]


def test_of_many_keys_that_differ_the_usual_values_are_left_out(tmp_path):
    write_run(tmp_path, name="plain", rounds=1)
    for key in ("lora.rank=5", "training.batch_size=3", "training.local_epochs=2", "model.dropout=as_config"):
        write_run(tmp_path, key, name=key.replace("=", "-"), rounds=1)
    labels = {group.label for group in groups_in(tmp_path)}
    assert labels == {"otherwise as usual", "rank=5", "batch_size=3", "local_epochs=2", "dropout=as_config"}


def test_the_strategy_is_named_however_usual_it_is(tmp_path):
    for number, key in enumerate(("rank=5", "rank=6", "lora_alpha=3", "dropout=0.2", "use_rslora=true")):
        strategy = "fedex" if number == 0 else "flexlora"
        write_run(tmp_path, f"strategy.name={strategy}", f"lora.{key}", name=f"r{number}", rounds=1)
    labels = [group.label for group in groups_in(tmp_path)]
    assert sorted(label.rpartition("strategy=")[2] for label in labels) == ["fedex", *["flexlora"] * 4]


def test_tiers_are_short_in_a_label(tmp_path):
    write_run(tmp_path, "strategy.name=flexlora", name="one", rounds=1)
    write_run(
        tmp_path,
        "strategy.name=flexlora",
        "lora.tiers=[{share: 0.8, rank: 2}, {share: 0.2, rank: 8}]",
        name="mixed",
        rounds=1,
    )
    assert {group.label for group in groups_in(tmp_path)} == {"tiers=none", "tiers=0.8/2+0.2/8"}


def test_labels_are_different_even_where_shown_values_are_not(tmp_path):
    long = "a" * 50
    for end in ("x", "y"):
        write_run(tmp_path, "data.source=x.jsonl", f"data.text_field={long}{end}", name=f"run{end}", rounds=1)
    labels = [group.label for group in groups_in(tmp_path)]
    assert len(set(labels)) == 2
    assert labels[0].endswith("(runx)")


def test_a_key_that_an_older_run_lacks_is_at_its_default(tmp_path):
    write_run(tmp_path, rounds=1)
    older = write_run(tmp_path, rounds=1, seed=1)
    text = (older / "config.yaml").read_text()
    (older / "config.yaml").write_text(text.replace("  use_rslora: false\n", ""))
    assert "use_rslora" in text
    assert len(groups_in(tmp_path)) == 1


def test_unfinished_runs_are_left_out_of_a_group_with_finished_ones(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, recorded=1, status="failed", reason="loss is nan")
    (group,) = groups_in(tmp_path)
    assert [run.seed for run in group.runs] == [0]
    assert [run.seed for run in group.left_out] == [1]
    assert group.is_finished


def test_unfinished_runs_alone_are_shown(tmp_path):
    write_run(tmp_path, seed=0, recorded=2, status="running")
    write_run(tmp_path, seed=1, recorded=1, status="failed", reason="x")
    (group,) = groups_in(tmp_path)
    assert not group.is_finished
    assert list(group.series("test/loss").count) == [2, 1]


def test_runs_without_a_round_are_in_no_group(tmp_path):
    write_run(tmp_path, recorded=0, status="failed", reason="x")
    assert groups_in(tmp_path) == []


def test_mean_least_most_and_sample_deviation_over_seeds(tmp_path):
    for seed in (0, 1, 3):
        write_run(tmp_path, seed=seed, rounds=2)
    (group,) = groups_in(tmp_path)
    values = np.array([5 - 0.2 - 2 / 60 + 0.03 * seed for seed in (0, 1, 3)])
    series = group.series("test/loss")
    assert list(series.x) == [1, 2]
    assert series.mean[-1] == pytest.approx(values.mean())
    assert (series.low[-1], series.high[-1]) == (pytest.approx(values.min()), pytest.approx(values.max()))
    spread = group.spread(lambda run: run.values("test/loss")[1])
    assert spread.std == pytest.approx(values.std(ddof=1))
    assert spread.count == 3


def test_a_difference_is_taken_seed_by_seed(tmp_path):
    for seed in (0, 1, 3):
        write_run(tmp_path, "lora.rank=1", name=f"a{seed}", seed=seed, rounds=1)
    for seed, better_by in ((0, 0.1), (1, 0.2), (2, 9.0)):
        write_run(tmp_path, "lora.rank=2", name=f"b{seed}", seed=seed, rounds=1, better_by=better_by)
    first, second = groups_in(tmp_path)
    spread = second.difference(first, lambda run: run.last("test/loss"))
    assert (spread.count, spread.mean) == (2, pytest.approx(-0.15))
    assert (spread.low, spread.high) == (pytest.approx(-0.2), pytest.approx(-0.1))


def test_groups_without_a_seed_in_common_have_no_difference(tmp_path):
    write_run(tmp_path, "lora.rank=1", name="a", seed=0, rounds=1)
    write_run(tmp_path, "lora.rank=2", name="b", seed=1, rounds=1)
    first, second = groups_in(tmp_path)
    assert second.difference(first, lambda run: 1.0) is None


def test_a_single_run_has_no_deviation(tmp_path):
    (group,) = groups_in(write_run(tmp_path, rounds=1))
    assert group.spread(lambda run: 1.0).std is None
    assert group.spread(lambda run: None) is None
