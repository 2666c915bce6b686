"""Every figure is drawn from tiny runs, saved, opened again and looked at."""

import io
import warnings

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest

from fedsim.report.build import make_report
from fedsim.report.style import COLOURS, DPI, LINES, MARKERS
from tests.report.synthetic_runs import write_run

EVERY_FIGURE = {
    "global_test_loss",
    "final_test_loss",
    "partition_1",
    "dirichlet_scatter",
    "client_curves",
    "fairness",
    "class_loss_by_round",
    "class_loss_at_end",
    "communication",
    "time_breakdown",
    "energy_beyond_smallest_rank",
    "effective_rank",
    "spectra",
    "spectra_by_module",
    "train_loss",
    "answers",
    "answers_tf",
}
RECORDED_ON_DEMAND = {"answers", "answers_tf"}
"""Figures of runs with evaluation.answers only."""

SCORES = {
    f"test/{score}{kind}": 0.4 for score in ("rougeL", "rougeL_stem", "exact_match") for kind in ("", "_tf")
}


def pictures_of(*paths, **options):
    report = make_report(list(paths), **options)
    return {picture.name: picture for picture in report.pictures}


def axes_of(picture):
    """Panels of a figure, colour bars not counted."""
    return [axes for axes in picture.figure.axes if axes.get_label() != "<colorbar>"]


def marks_in(axes):
    """Drawn things with data in a panel."""
    lines = [line for line in axes.lines if len(line.get_xdata())]
    dots = [dots for dots in axes.collections if len(dots.get_paths())]
    return [*lines, *dots, *axes.patches, *axes.images]


def check(picture):
    """Saved without a warning, of a sensible size, labelled axes, no empty panel, ink on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a layout that leaves no room for panels
        png, svg = picture.png(), picture.svg()
    image = mpl.image.imread(io.BytesIO(png))
    inches = picture.figure.get_size_inches()
    assert image.shape[:2] == (round(inches[1] * DPI), round(inches[0] * DPI)) or np.allclose(
        image.shape[:2], inches[::-1] * DPI, atol=1
    )
    assert 700 < image.shape[1] < 1500
    assert image[..., :3].std() > 0.02
    assert b"</svg>" in svg
    assert axes_of(picture)
    for axes in axes_of(picture):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert marks_in(axes), picture.name
        low, high = sorted(axes.get_ylim())
        assert high > low
        width, height = axes.get_window_extent().size
        assert width > 150
        assert height > 60
    assert picture.title
    assert len(picture.caption) > 40


@pytest.fixture(scope="module")
def two_arms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for alpha in (0.1, 100):
        for seed in (0, 1):
            write_run(
                folder,
                f"data.partition.dirichlet_alpha={alpha}",
                name=f"a{alpha}-s{seed}",
                seed=seed,
                better_by=0.0 if alpha == 0.1 else 0.5,
                spectra=True,
                extra=lambda round_index: SCORES,
            )
    return folder


@pytest.fixture(scope="module")
def pictures(two_arms):
    return pictures_of(two_arms)


def test_every_figure_of_the_list_is_there(pictures):
    assert set(pictures) >= EVERY_FIGURE


@pytest.mark.parametrize("name", sorted(EVERY_FIGURE))
def test_a_figure_can_be_opened_and_shows_something(pictures, name):
    check(pictures[name])


def test_the_loss_figure_has_means_and_bands_in_order_of_alpha(pictures):
    (axes,) = axes_of(pictures["global_test_loss"])
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert labels == ["dirichlet_alpha=0.1", "dirichlet_alpha=100"]
    first = axes.lines[0]
    assert list(first.get_xdata()) == [0, 1, 2, 3]
    assert first.get_ydata()[0] == 5.5
    # token-weighted classes: (10 * 5.1 + 20 * 5.0 + 30 * 4.9) / 60 and 0.03 more for seed 1
    assert first.get_ydata()[1] == pytest.approx(5 - 2 / 60 + 0.015)
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(5.5)
    assert band[:, 1].min() == pytest.approx(5 - 0.4 - 2 / 60)
    assert axes.get_ylabel() == "test loss (nats per label token)"
    assert axes.get_xlabel() == "rounds completed"


def test_the_final_losses_are_joined_by_seed(pictures):
    (axes,) = axes_of(pictures["final_test_loss"])
    assert [line.get_label() for line in axes.lines] == ["seed 0", "seed 1"]
    first, second = axes.lines[0].get_xdata()
    assert first - second == pytest.approx(0.5)
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "dirichlet_alpha=0.1",
        "dirichlet_alpha=100",
    ]


def test_lines_differ_by_colour_marker_and_stroke():
    assert len(set(COLOURS)) == len(set(MARKERS)) == len(set(map(str, LINES)))


def test_shares_of_a_client_fill_its_bar(pictures):
    shares, sizes = axes_of(pictures["partition_1"])
    tops = {}
    for bar in shares.patches:
        tops[round(bar.get_x(), 3)] = max(tops.get(round(bar.get_x(), 3), 0), bar.get_y() + bar.get_height())
    assert list(tops.values()) == pytest.approx([1.0] * 6)
    assert [bar.get_height() for bar in sizes.patches] == [6] * 5 + [10]
    hatches = {bar.get_hatch() for bar in shares.patches}
    assert len(hatches) == 3


def test_circles_of_the_scatter_have_areas_in_proportion_to_examples(pictures):
    axes = axes_of(pictures["dirichlet_scatter"])[0]
    areas = axes.collections[0].get_sizes()
    assert len(areas) == 6 * 3
    assert sorted(set(np.round(areas / areas.min(), 6))) == [1.0, 1.5, 2.0]  # 2, 3 and 4 examples


def test_partitions_that_are_the_same_are_drawn_once(two_arms, pictures):
    # both arms were written with the same partition of seed 0
    assert [name for name in pictures if name.startswith("partition")] == ["partition_1"]
    assert "all configurations" in pictures["partition_1"].caption


def test_labels_get_a_partition_figure_of_their_own(tmp_path):
    drawn = pictures_of(write_run(tmp_path, labels=True))
    check(drawn["partition_2"])
    check(drawn["dirichlet_scatter_2"])
    assert axes_of(drawn["dirichlet_scatter_2"])[0].get_ylabel() == "label"
    (legend,) = drawn["partition_2"].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["good \\$", " _bad \\$"]


def test_chosen_clients_are_drawn_and_others_are_not(two_arms):
    drawn = pictures_of(two_arms, client_ids=[2])
    for axes in axes_of(drawn["client_curves"]):
        assert [line.get_label() for line in axes.lines][:-1] == ["client 2"]
        assert list(axes.lines[0].get_xdata()) == [1, 2, 3]


def test_clients_that_were_tested_most_often_are_drawn_by_default(pictures):
    axes = axes_of(pictures["client_curves"])[0]
    # client 2 is in rounds 0 to 2, clients 1 and 3 in two of them
    assert [line.get_label() for line in axes.lines][:-1] == ["client 1", "client 2", "client 3"]


def test_panels_show_the_same_clients_where_they_can(tmp_path):
    write_run(tmp_path, "lora.rank=1", name="a", rounds=4)  # most often: clients 2 and 3
    write_run(tmp_path, "lora.rank=2", name="b", rounds=2, cohort=2)  # clients 0, 1, 1, 2
    write_run(tmp_path, "lora.rank=4", name="c", rounds=1, num_clients=1)
    drawn = pictures_of(tmp_path)["client_curves"]
    shown = [[line.get_label() for line in axes.lines][:-1] for axes in axes_of(drawn)]
    assert shown[0] == ["client 0"]  # a single client: sorted first by data.partition.num_clients
    assert shown[1:] == [["client 0", "client 1", "client 2"]] * 2


def test_a_client_looks_alike_in_all_panels_and_no_legend_covers_a_curve(tmp_path):
    write_run(tmp_path, "lora.rank=1", name="a", rounds=4)
    write_run(tmp_path, "lora.rank=2", name="b", rounds=1, num_clients=20, cohort=2)  # clients 0 and 1
    picture = pictures_of(tmp_path, client_ids=[1, 3])["client_curves"]
    looks = {}
    for axes in axes_of(picture):
        assert axes.get_legend() is None
        for line in axes.lines:
            looks.setdefault(line.get_label(), set()).add((line.get_color(), line.get_marker()))
    assert all(len(found) == 1 for found in looks.values())
    (legend,) = picture.figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(looks)


def losses_before(folder, losses, *settings, **options):
    """A run whose global model has test losses 5.5, 4 and 3 before its rounds, and these on the clients' examples."""
    return write_run(
        folder,
        *settings,
        rounds=3,
        extra=lambda at: {"test/loss": (4.0, 3.0, 2.0)[at], "fairness/test_loss_mean_before": losses[at]},
        **options,
    )


def test_clients_that_are_tested_on_other_examples_have_the_global_model_on_those_beside_them(tmp_path):
    """The global test loss is on another set, and would be another level on the same axis."""
    other, same = "global model on the clients' test examples", "global test loss"
    losses_before(tmp_path, (5.4, 3.9, 2.9), name="subset")
    # a limit that leaves all examples changes nothing, but for rounding
    losses_before(tmp_path, (5.5, 4.0 + 1e-7, 3.0), "lora.rank=2", name="all")
    own = ("evaluation.client_test=own_split", "data.client_test_fraction=0.2")
    losses_before(tmp_path, (5.5, 4.0, 3.0), "lora.rank=3", *own, name="own")
    none = ("evaluation.max_client_test_examples=null", "evaluation.max_test_examples=null")
    losses_before(tmp_path, (5.4, 3.9, 2.9), "lora.rank=4", *none, name="no-limit")
    thin = {}
    for run in ("subset", "all", "own", "no-limit"):
        picture = pictures_of(tmp_path / run)["client_curves"]
        check(picture)
        line = axes_of(picture)[0].lines[-1]
        thin[run] = line.get_label(), line.get_xydata().tolist()
        assert [f"'{name}'" in picture.caption for name in (other, same)] == [
            line.get_label() == name for name in (other, same)
        ]
    assert thin["subset"] == (other, [[0, 5.4], [1, 3.9], [2, 2.9]])
    assert thin["own"] == (other, [[0, 5.5], [1, 4.0], [2, 3.0]])
    assert thin["all"] == thin["no-limit"] == (same, [[1, 4.0], [2, 3.0], [3, 2.0]])


def test_without_a_global_model_the_thin_line_is_the_mean(tmp_path):
    drawn = pictures_of(write_run(tmp_path, "strategy.name=local", evaluate=False))
    (axes,) = axes_of(drawn["client_curves"])
    assert axes.lines[-1].get_label() == "mean of the cohort"
    check(drawn["global_test_loss"])


def test_communication_adds_both_directions_up_over_rounds(pictures):
    (axes,) = axes_of(pictures["communication"])
    assert "KiB" in axes.get_xlabel()
    assert list(axes.lines[0].get_xdata()) == pytest.approx([0, 24, 48, 72])  # 3 clients x 2 x 4 KiB a round


def test_time_bars_add_up_to_the_round(pictures):
    (axes,) = axes_of(pictures["time_breakdown"])
    rows = {}
    for bar in axes.patches:
        rows[round(bar.get_y(), 3)] = rows.get(round(bar.get_y(), 3), 0) + bar.get_width()
    assert list(rows.values()) == pytest.approx([3.05, 3.05])


def test_one_round_of_several_seeds_has_a_bar_instead_of_a_band(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, seed=seed, rounds=1, spectra=True)
    drawn = pictures_of(tmp_path)
    assert set(drawn) == EVERY_FIGURE - RECORDED_ON_DEMAND - {
        "final_test_loss"
    }  # which compares configurations
    for picture in drawn.values():
        check(picture)


def test_without_evaluation_the_other_figures_are_drawn_and_the_gap_is_told(tmp_path):
    report = make_report([write_run(tmp_path, evaluate=False, client_tests=False)])
    names = {picture.name for picture in report.pictures}
    assert names == {"partition_1", "dirichlet_scatter", "time_breakdown", "train_loss"}
    for picture in report.pictures:
        check(picture)
    assert any("global test loss: no round recorded a finite one" in note for note in report.notes)
    assert any("client curves: no client was tested" in note for note in report.notes)


def test_a_thousand_clients_are_a_map(tmp_path):
    drawn = pictures_of(write_run(tmp_path, num_clients=1000, rounds=1))
    check(drawn["partition_1"])
    shares, sizes = axes_of(drawn["partition_1"])
    assert not shares.patches
    assert shares.images[0].get_array().shape == (3, 1000)
    assert list(sizes.lines[0].get_ydata()) == [10] + [6] * 999
    check(drawn["dirichlet_scatter"])
    (scatter,) = axes_of(drawn["dirichlet_scatter"])
    assert len(set(scatter.collections[0].get_offsets()[:, 0])) == 50
    assert scatter.get_xlabel() == "50 of 1,000 clients at equal distances"


def test_many_configurations_go_to_several_figures_of_one_scale(tmp_path):
    for rank in range(1, 12):
        write_run(tmp_path, f"lora.rank={rank}", name=f"rank{rank}", better_by=rank / 10)
    drawn = pictures_of(tmp_path)
    first, second = drawn["global_test_loss"], drawn["global_test_loss_2"]
    labels = [line.get_label() for one in (first, second) for line in axes_of(one)[0].lines]
    assert labels == [f"rank={rank}" for rank in range(1, 12)]
    assert axes_of(first)[0].get_ylim() == axes_of(second)[0].get_ylim()
    assert [first.title, second.title] == [f"Global test loss by round ({number} of 2)" for number in (1, 2)]
    for name in ("client_curves", "client_curves_2", "class_loss_by_round", "time_breakdown", "fairness_2"):
        check(drawn[name])


def test_drawing_leaves_the_settings_of_others_alone(two_arms):
    before = dict(mpl.rcParams)
    pictures_of(two_arms)["fairness"].svg()
    assert dict(mpl.rcParams) == before


def test_singular_values_that_are_all_zero_are_no_figure(tmp_path):
    run = write_run(tmp_path, rounds=1, spectra=True)
    (run / "spectra.jsonl").write_text('{"round_index": 0, "layer": [0.0, 0.0]}\n')
    assert "spectra" not in pictures_of(run)


def drawn_spectra(picture):
    """Label -> values, of the only panel."""
    (axes,) = axes_of(picture)
    assert [axes.get_xlabel(), axes.get_ylabel()] == ["index of the singular value", "singular value"]
    return {line.get_label(): line.get_ydata() for line in axes.lines}


def test_the_mean_over_modules_is_over_the_same_ones_along_a_line(tmp_path):
    """Two modules with few and small values must not lift the mean where they end."""

    def values(round_index):
        long = {"a": (16.0, 8.0, 4.0, 2.0), "b": (4.0, 2.0, 1.0, 0.5)}
        return {**long, "c": (0.01, 0.001), "d": (0.04, 0.0), "zero": (0.0, 0.0)}

    picture = pictures_of(write_run(tmp_path, rounds=2, values=values))["spectra"]
    check(picture)
    drawn = drawn_spectra(picture)
    assert list(drawn) == [f"round {at}, 2 modules of {number} values" for at in (1, 2) for number in (2, 4)]
    np.testing.assert_allclose(drawn["round 1, 2 modules of 4 values"], [8.0, 4.0, 2.0, 1.0])
    np.testing.assert_allclose(drawn["round 1, 2 modules of 2 values"], [0.02])  # d has no second one
    for line in drawn.values():
        assert np.all(np.diff(line) < 0)


def test_modules_of_many_lengths_are_drawn_after_the_last_round_only(tmp_path):
    def values(round_index):
        return {f"m{size}": tuple(0.5**place for place in range(size)) for size in range(1, 12)} | {
            "again": (1.0,) * 11
        }

    drawn = drawn_spectra(pictures_of(write_run(tmp_path, rounds=3, values=values))["spectra"])
    assert len(drawn) == len(COLOURS)
    assert all(label.startswith("round 3, ") for label in drawn)
    assert "round 3, 2 modules of 11 values" in drawn


def texts_in(picture):
    """Everything that stands in a figure as a legend, title or tick."""
    legends = [text for legend in picture.figure.legends for text in legend.get_texts()]
    others = [
        text for axes in axes_of(picture) for text in (axes.title, *axes.get_yticklabels(), *axes.texts)
    ]
    return " | ".join(" ".join(text.get_text().split()) for text in [*legends, *others])


def test_groups_of_fewer_seeds_say_so_in_every_figure_over_seeds(tmp_path):
    """A band that is missing means one seed, not seeds that agree."""
    spectra = {"a.q_proj": (2.0, 1.0), "a.q_proj/energy": (6.0,)}
    for name, rank, seed in (("a0", 1, 0), ("a1", 1, 1), ("b0", 2, 0)):
        write_run(
            tmp_path,
            f"lora.rank={rank}",
            "strategy.name=flexlora",
            name=name,
            seed=seed,
            tiers=[{"q_proj": [1]}, {"q_proj": [2]}],
            values=lambda round_index: spectra,
            extra=lambda round_index: {"spectrum/effective_rank": 1.5, **SCORES},
        )
    drawn = pictures_of(tmp_path)
    over_seeds = EVERY_FIGURE - {"partition_1", "dirichlet_scatter", "client_curves", "spectra"}
    for name in (*sorted(over_seeds - {"spectra_by_module"}), "energy_kept"):
        check(drawn[name])
        assert "rank=2 (1 of 2 seeds)" in texts_in(drawn[name]), name
        assert "of 2 seeds" not in texts_in(drawn[name]).replace("rank=2 (1 of 2 seeds)", ""), name


def test_a_seed_without_the_metric_is_not_counted(tmp_path):
    for name, rank, seed in (("a0", 1, 0), ("a1", 1, 1), ("b0", 2, 0), ("b1", 2, 1)):
        write_run(tmp_path, f"lora.rank={rank}", name=name, seed=seed, client_tests=name != "b1")
    # two runs of one seed are one seed
    write_run(tmp_path, "lora.rank=1", name="again", seed=0)
    drawn = pictures_of(tmp_path)
    assert "rank=2 (1 of 2 seeds)" in texts_in(drawn["fairness"])
    for name in ("global_test_loss", "final_test_loss", "time_breakdown"):
        assert "seeds" not in texts_in(drawn[name])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("data.source=x.jsonl", "data.text_field=text"), ["data.test_fraction"]),
        (("data.source=x.jsonl", "data.text_field=text", "data.test_split=validation"), []),
        (
            (
                "data.source=x.jsonl",
                "data.text_field=t",
                "data.test_split=test",
                "evaluation.max_test_examples=9",
            ),
            ["evaluation.max_test_examples"],
        ),
        (
            (
                "data.source=x.jsonl",
                "data.instruction.format=rows",
                "data.instruction.task_field=task",
                "data.instruction.hold_out=task",
            ),
            ["data.instruction.hold_out_fraction"],
        ),
    ],
)
def test_the_caption_says_where_the_band_contains_the_draw_of_the_test_set(settings, said, tmp_path):
    for seed in (0, 1):
        before = {"test/loss_initial": 5.5 + seed / 100}
        write_run(tmp_path, *settings, seed=seed, rounds=1, extra=lambda round_index, before=before: before)
    caption = pictures_of(tmp_path)["global_test_loss"].caption
    assert ("a band contains the differences between test sets" in caption) == bool(said)
    assert f"({', '.join(said)})" in caption or not said
    assert (
        "draws its own" not in pictures_of(tmp_path / "run-0")["global_test_loss"].caption
    )  # there is no band
    write_run(tmp_path / "same", *settings, seed=0, rounds=1)  # which the base has the same loss on
    write_run(tmp_path / "same", *settings, seed=1, rounds=1)
    assert "draws its own" not in pictures_of(tmp_path / "same")["global_test_loss"].caption
