"""Energy that truncation keeps, from spectra.jsonl: against decompositions of known matrices."""

import json

import numpy as np
import pytest

from fedsim.report.build import make_report
from fedsim.report.figures_spectra import chosen_modules, kept_share, ranks_of, short_module
from fedsim.report.folders import read_run
from tests.report.synthetic_runs import write_run
from tests.report.test_report_figures import axes_of, check, pictures_of

RECORDED = 3
"""Singular values that the runs hold of matrices with more."""

MODULES = tuple(
    f"model.layers.{block}.self_attn.{name}" for block in range(5) for name in ("k_proj", "q_proj")
)
TIERS = [{"k_proj": [1], "q_proj": [2]}, {"k_proj": [3], "q_proj": [3]}]


def matrix(module, round_index):
    """(7, 5); the later the round, the faster its singular values fall."""
    generator = np.random.default_rng([MODULES.index(module), 4])
    left, values, right = np.linalg.svd(generator.normal(size=(7, 5)), full_matrices=False)
    return left @ np.diag(values * np.exp(-0.3 * round_index * np.arange(5))) @ right


def spectra_of(round_index, energy=True):
    found = {}
    for module in MODULES:
        W = matrix(module, round_index)
        found[module] = tuple(np.linalg.svd(W, compute_uv=False)[:RECORDED].tolist())
        if energy:
            found[f"{module}/energy"] = (float((W**2).sum()),)
    return found


def error_left(W, rank):
    """||W - W_r|| / ||W|| from a decomposition of all of W."""
    left, values, right = np.linalg.svd(W, full_matrices=False)
    cut = left[:, :rank] @ np.diag(values[:rank]) @ right[:rank]
    return np.linalg.norm(W - cut) / np.linalg.norm(W)


def make_run(folder, energy=True, tiers=TIERS, **options):
    return write_run(
        folder,
        "lora.distribution=uniform",
        "strategy.name=flexlora",
        rounds=4,
        tiers=tiers,
        values=lambda round_index: spectra_of(round_index, energy),
        **options,
    )


def test_the_share_that_a_rank_keeps_is_of_the_whole_matrix(tmp_path):
    run = read_run(make_run(tmp_path))
    cut = read_run(make_run(tmp_path, energy=False, name="cut"))
    for module in MODULES:
        for rank in (1, 2, 3):
            kept = kept_share(run, module, rank)
            assert kept == pytest.approx(1 - error_left(matrix(module, 3), rank) ** 2, rel=1e-9)
            # the recorded values alone know nothing of the rest
            assert kept_share(cut, module, rank) > kept + 1e-6
    assert kept_share(run, "no.such", 1) is None
    assert kept_share(run, MODULES[0], 1, 17) is None


def test_an_update_of_zero_loses_nothing(tmp_path):
    path = write_run(tmp_path, rounds=1, values=lambda _: {"a.b": (0.0, 0.0), "a.b/energy": (0.0,)})
    assert kept_share(read_run(path), "a.b", 1) == 1.0


def test_the_table_says_what_is_left_beyond_each_tiers_rank(tmp_path):
    make_run(tmp_path)
    (table,) = (one for one in make_report([tmp_path]).tables if one.name == "truncation")
    assert table.head == ("configuration", "module", "rank 1", "rank 3")
    assert [row[1] for row in table.rows] == [f"layers.{block}.self_attn.k_proj" for block in (0, 2, 4)]
    for row, block in zip(table.rows, (0, 2, 4), strict=True):
        W = matrix(f"model.layers.{block}.self_attn.k_proj", 3)
        errors = [error_left(W, rank) for rank in (1, 3)]
        assert [float(cell.split(" ")[0]) for cell in row[2:]] == pytest.approx(errors, rel=5e-3)
        assert row[2].endswith(f"({1 - errors[0] ** 2:.1%})")
    assert "are too small" not in table.note


def test_modules_can_be_chosen(tmp_path):
    run = read_run(make_run(tmp_path))
    assert chosen_modules(run, ("layers.1.self_attn.q_proj",)) == ["model.layers.1.self_attn.q_proj"]
    assert [short_module(name) for name in chosen_modules(run, ("q_proj", "layers.0.self_attn.k_proj"))] == [
        "layers.0.self_attn.q_proj",
        "layers.2.self_attn.q_proj",
        "layers.4.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
    ]
    assert chosen_modules(run, ("proj",)) == []  # an end of a name is none
    assert (ranks_of(run, MODULES[0]), ranks_of(run, MODULES[1])) == ([1, 3], [2, 3])
    report = make_report([tmp_path], modules=("fc1",))
    assert any("singular values of fc1: no run recorded such a module" in note for note in report.notes)
    assert "spectra_by_module" not in {picture.name for picture in report.pictures}


def test_a_tier_without_clients_has_no_rank(tmp_path):
    path = make_run(tmp_path)
    tiers = json.loads((path / "tiers.json").read_text())
    tiers["tiers"].append({"name": "type 3", "num_clients": 0, "lora_ranks": {"k_proj": [30]}})
    (path / "tiers.json").write_text(json.dumps(tiers))
    assert ranks_of(read_run(path), MODULES[0]) == [1, 3]


def line(axes, label):
    (found,) = (one for one in axes.lines if one.get_label() == label)
    return found.get_ydata()


def test_collapse_is_measured_at_one_rank_in_every_round(tmp_path):
    """A cohort without the smallest tier would else look like a collapse undone."""
    make_run(
        tmp_path,
        extra=lambda round_index: {"spectrum/energy_beyond_smallest_rank": (0.5, 0.1, 0.5, 0.1)[round_index]},
    )
    picture = pictures_of(tmp_path)["energy_beyond_smallest_rank"]
    check(picture)
    (axes,) = axes_of(picture)
    expected = [
        np.mean([error_left(matrix(name, at), 1 if "k_proj" in name else 2) ** 2 for name in MODULES])
        for at in range(4)
    ]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), expected, rtol=1e-9)
    assert np.all(np.diff(expected) < 0)


def test_without_squared_norms_the_recorded_shares_are_drawn(tmp_path):
    make_run(
        tmp_path,
        energy=False,
        extra=lambda round_index: {
            "spectrum/energy_beyond_smallest_rank": 0.5,
            "spectrum/energy_kept_rank_1": 0.5,
            "spectrum/energy_kept_rank_2": 0.75,
        },
    )
    found = pictures_of(tmp_path)
    assert set(axes_of(found["energy_beyond_smallest_rank"])[0].lines[0].get_ydata()) == {0.5}
    (axes,) = axes_of(found["energy_kept"])
    assert set(line(axes, "LoRA rank 2")) == {0.75}


def test_energy_kept_is_over_the_modules_that_have_the_rank(tmp_path):
    make_run(tmp_path)
    picture = pictures_of(tmp_path)["energy_kept"]
    check(picture)
    (axes,) = axes_of(picture)
    for rank, names in {1: ("k_proj",), 2: ("q_proj",), 3: ("k_proj", "q_proj")}.items():
        own = [module for module in MODULES if module.endswith(names)]
        expected = [np.mean([1 - error_left(matrix(name, at), rank) ** 2 for name in own]) for at in range(4)]
        np.testing.assert_allclose(line(axes, f"LoRA rank {rank}"), expected, rtol=1e-9)


def test_singular_values_of_modules_are_those_of_the_last_round(tmp_path):
    make_run(tmp_path)
    picture = pictures_of(tmp_path)["spectra_by_module"]
    check(picture)
    (axes,) = axes_of(picture)
    values = np.linalg.svd(matrix(MODULES[4], 3), compute_uv=False)[:RECORDED]
    np.testing.assert_allclose(line(axes, "layers.2.self_attn.k_proj"), values)


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)])
def test_ranks_that_only_some_seeds_have_are_shown_with_their_number(seeds, tmp_path):
    """Each seed draws its clients' tiers, and a rare one may have no client; the lowest seed decides nothing."""
    make_run(tmp_path, name="all", seed=seeds[0])
    path = make_run(tmp_path, name="some", seed=seeds[1], tiers=[TIERS[0], {"k_proj": [2], "q_proj": [2]}])
    lines = [json.loads(line) for line in (path / "spectra.jsonl").read_text().splitlines()]
    for record in lines:  # another matrix, so that a mean over both seeds would be seen
        record |= {
            name: [4 * value for value in values] for name, values in record.items() if name == MODULES[0]
        }
        record[f"{MODULES[0]}/energy"] = [25 * record[f"{MODULES[0]}/energy"][0]]
    (path / "spectra.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    (table,) = (one for one in make_report([tmp_path]).tables if one.name == "truncation")
    assert table.head[2:] == ("rank 1", "rank 2", "rank 3")
    one, two, three = table.rows[0][2:]
    W = matrix(MODULES[0], 3)
    assert three == f"{error_left(W, 3):.3g} ({1 - error_left(W, 3) ** 2:.1%}) (1 of 2 seeds)"
    kept = 16 * (1 - error_left(W, 2) ** 2) / 25
    assert two == f"{(1 - kept) ** 0.5:.3g} ({kept:.1%}) (1 of 2 seeds)"
    assert "seeds" not in one
    picture = pictures_of(tmp_path)["energy_kept"]
    check(picture)
    (axes,) = axes_of(picture)
    labels = [one.get_label() for one in axes.lines if one.get_label().startswith("LoRA")]
    assert labels == ["LoRA rank 1", "LoRA rank 2", "LoRA rank 3 (1 of 2 seeds)"]
    expected = [np.mean([1 - error_left(matrix(name, at), 3) ** 2 for name in MODULES]) for at in range(4)]
    np.testing.assert_allclose(line(axes, labels[2]), expected, rtol=1e-9)


def test_a_rank_looks_alike_in_all_panels_of_energy_kept(tmp_path):
    make_run(tmp_path, name="a")
    make_run(tmp_path, name="b", tiers=[{"k_proj": [2], "q_proj": [2]}, {"k_proj": [3], "q_proj": [3]}])
    for run, scale in (("a", 1.0), ("b", 0.5)):  # two configurations
        text = (tmp_path / run / "config.yaml").read_text()
        assert "rank_scale: 1.0" in text
        (tmp_path / run / "config.yaml").write_text(text.replace("rank_scale: 1.0", f"rank_scale: {scale}"))
    picture = pictures_of(tmp_path)["energy_kept"]
    check(picture)
    colours = [
        {line.get_label(): line.get_color() for line in axes.lines if line.get_label().startswith("LoRA")}
        for axes in axes_of(picture)
    ]
    few, many = sorted(colours, key=len)
    assert list(few) == ["LoRA rank 2", "LoRA rank 3"]
    assert few.items() < many.items()
