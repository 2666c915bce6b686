"""Which runs are arms of which method, and what an arm is compared with."""

from fedsim.report.arms import bench_of, column_of, rows_of
from fedsim.report.folders import find_runs, read_run
from fedsim.report.groups import group_runs
from tests.report.synthetic_runs import write_run

SGD = "training.optimizer.name=sgd"
TWO_TIERS = "lora.tiers=[{share: 0.6, rank: 2}, {share: 0.2, rank: 4, module_ranks: {fc1: 8}}]"


def arms(folder, *settings):
    """Columns and rows of runs, one for each text of settings."""
    for index, text in enumerate(settings):
        write_run(folder, *text.split(" "), name=f"r{index}", rounds=1)
    return rows_of(group_runs([read_run(path) for path in find_runs([folder])]))


def setting(strategy, distribution, *more):
    return " ".join([f"strategy.name={strategy}", f"lora.distribution={distribution}", *more])


def name_of(group):
    return f"{group.first.config['strategy.name']} {column_of(group.first.config)}"


def test_runs_that_do_not_distribute_ranks_are_no_arms(tmp_path):
    assert arms(tmp_path, "lora.rank=2", "lora.rank=4") == ([], [])


def test_columns_have_the_papers_order(tmp_path):
    names = ("heavy_tail_strong", "normal", "uniform", "heavy_tail_light", "homogeneous")
    columns, rows = arms(tmp_path, *(setting("flexlora", name) for name in names))
    assert columns == ["homogeneous", "uniform", "heavy_tail_light", "normal", "heavy_tail_strong"]
    assert [row.label for row in rows] == ["FedIT + FlexLoRA"]
    assert list(rows[0].cells) == columns


def test_plain_averaging_stands_in_with_its_own_optimizer_only(tmp_path):
    _, rows = arms(
        tmp_path,
        setting("fedavg", "homogeneous"),
        setting("fedavg", "homogeneous", SGD),
        setting("flexlora", "uniform"),
        setting("flexlora", "uniform", SGD),
        setting("hetlora", "uniform"),
    )
    lent = {
        row.label: (row.borrowed, row.homogeneous.first.config["training.optimizer.name"]) for row in rows
    }
    assert lent == {
        "FedAvg + FlexLoRA": ("FedAvg", "sgd"),
        "FedIT + FlexLoRA": ("FedIT", "adamw"),
        "FedIT + HetLoRA": ("FedIT", "adamw"),
    }
    assert all(name_of(row.cells["homogeneous"]) == "fedavg homogeneous" for row in rows)


def test_a_homogeneous_arm_of_its_own_goes_first(tmp_path):
    _, rows = arms(
        tmp_path,
        setting("fedavg", "homogeneous"),
        setting("flexlora", "homogeneous"),
        setting("flexlora", "uniform"),
    )
    assert [(row.label, row.borrowed, name_of(row.homogeneous)) for row in rows] == [
        ("FedIT", "", "fedavg homogeneous"),
        ("FedIT + FlexLoRA", "", "flexlora homogeneous"),
    ]


def test_another_learning_rate_lends_nothing(tmp_path):
    _, rows = arms(
        tmp_path,
        setting("fedavg", "homogeneous", "training.optimizer.lr=0.5"),
        setting("flexlora", "uniform"),
    )
    assert {row.label: row.homogeneous and name_of(row.homogeneous) for row in rows} == {
        "FedIT": "fedavg homogeneous",
        "FedIT + FlexLoRA": None,
    }


def test_what_else_differs_tells_rows_of_one_method_apart(tmp_path):
    texts = [setting("flexlora", "uniform", f"training.local_epochs={epochs}") for epochs in (1, 2)]
    _, rows = arms(tmp_path, *texts)
    assert [row.label for row in rows] == [
        "FedIT + FlexLoRA, local_epochs=1",
        "FedIT + FlexLoRA, local_epochs=2",
    ]


def test_a_row_of_an_even_partition_names_no_alpha(tmp_path):
    texts = [
        setting(
            "flexlora", "uniform", f"data.partition.name={name}", f"data.partition.dirichlet_alpha={alpha}"
        )
        for name, alpha in (("iid", 5), ("length_skew", 0.1), ("length_skew", 1))
    ]
    _, rows = arms(tmp_path, *texts)
    assert [row.label for row in rows] == [
        "FedIT + FlexLoRA, dirichlet_alpha=0.1",
        "FedIT + FlexLoRA, dirichlet_alpha=1",
        "FedIT + FlexLoRA, partition=iid",
    ]


def test_slora_is_a_base_method_of_its_own(tmp_path):
    _, rows = arms(
        tmp_path,
        setting("slora", "homogeneous", "strategy.slora.rounds=1"),
        setting("slora", "uniform", "strategy.slora.then=flexlora", "strategy.slora.rounds=1"),
        setting("fedavg", "homogeneous"),
    )
    assert {(row.label, row.borrowed) for row in rows} == {("SLoRA + FlexLoRA", "SLoRA"), ("FedIT", "")}


def test_one_rank_for_all_is_homogeneous_and_tiers_are_named_by_shares(tmp_path):
    write_run(tmp_path, "strategy.name=fedavg", "lora.rank=2", name="even", rounds=1)
    write_run(tmp_path, "strategy.name=flexlora", TWO_TIERS, name="tiers", rounds=1)
    columns, rows = arms(tmp_path)
    assert columns == ["homogeneous", "75% rank 2, 25% rank 4 (fc1 8)"]
    assert [(row.label, row.borrowed) for row in rows] == [("FedIT + FlexLoRA", "FedIT")]


def test_scales_of_ranks_that_would_share_a_cell_are_rows(tmp_path):
    texts = [setting("flexlora", "uniform", f"lora.rank_scale={scale}") for scale in (0.1, 0.2)]
    _, rows = arms(tmp_path, *texts)
    assert [row.label for row in rows] == [
        "FedIT + FlexLoRA, rank_scale=0.1",
        "FedIT + FlexLoRA, rank_scale=0.2",
    ]


def test_tiers_that_look_alike_are_rows(tmp_path):
    for name, share in (("a", 0.3331), ("b", 0.3332)):
        tiers = f"lora.tiers=[{{share: {share}, rank: 2}}, {{share: 0.6668, rank: 4}}]"
        write_run(tmp_path, "strategy.name=flexlora", tiers, name=name, rounds=1)
    columns, rows = arms(tmp_path)
    assert columns == ["33% rank 2, 67% rank 4"]
    assert len({row.label for row in rows}) == 2


def test_losses_on_other_data_are_not_compared(tmp_path):
    _, rows = arms(
        tmp_path, setting("flexlora", "uniform"), setting("flexlora", "normal", "data.max_tokens=32")
    )
    groups = [group for row in rows for group in row.cells.values()]
    assert len({bench_of(group) for group in groups}) == 2
