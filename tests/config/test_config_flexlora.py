"""The configurations of arXiv 2402.11505 say what is known of its experiments, and their sweeps are its tables."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from fedsim.config.loader import load_config
from fedsim.config.schema import Config
from launch import sweep
from tests.config.marks import changed_keys, marked_keys

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "flexlora"
BASES = {
    "opt-1.3b": ("facebook/opt-1.3b", ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "llama-1b": (
        "datajuicer/LLaMA-1B-dj-refine-150B",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
}
OPTIMIZERS = {"fedavg": "sgd", "fedit": "adamw", "slora": "adamw"}
DISTRIBUTIONS = ("homogeneous", "uniform", "heavy_tail_light", "normal", "heavy_tail_strong")
TABLE_2 = [(base, method) for base in BASES for method in OPTIMIZERS]
ALL = sorted(path.name for path in FOLDER.glob("*.yaml"))
SCALED = [name for name in ALL if name.startswith("cpu-")]


def sweep_words(name: str) -> list[str]:
    """What stands behind `python -m launch sweep` in the head of a configuration."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    command = re.search(r"python -m launch sweep ((?:.*\\\n)*.*)", text)
    assert command is not None, name
    return shlex.split(command[1].replace("\\\n#", " "))


def points_of(words: list[str]) -> list[list[str]]:
    """The overrides of each point of a sweep, seeds aside: all combinations of the grids, then the arms."""
    options = list(itertools.pairwise(words))
    grids = [value.partition("=") for option, value in options if option == "--grid"]
    choices = [[f"{key}={choice}" for choice in values.split(",")] for key, _, values in grids]
    arms = [value.split(",") for option, value in options if option == "--arm"]
    return [*map(list, itertools.product(*choices)), *arms]


def method_of(config: Config) -> tuple[str, str, str]:
    """(FedAvg, FedIT or SLoRA; what aggregates the LoRA factors; distribution)."""
    strategy, optimizer = config.strategy, config.training.optimizer.name
    is_slora = strategy.name == "slora"
    method = "slora" if is_slora else {"sgd": "fedavg", "adamw": "fedit"}[optimizer]
    return method, strategy.slora.then if is_slora else strategy.name, str(config.lora.distribution)


def test_the_sweeps_are_table_2_on_two_bases():
    found = []
    for base, method in TABLE_2:
        name = f"{base}-{method}.yaml"
        points = [load_config(FOLDER / name, point) for point in points_of(sweep_words(name))]
        assert {config.model.name_or_path for config in points} == {BASES[base][0]}
        found += [(base, *method_of(config)) for config in points]
    cells = set(itertools.product(BASES, OPTIMIZERS, ("flexlora", "hetlora"), DISTRIBUTIONS))
    averaged = {(base, method, "fedavg", "homogeneous") for base, method in TABLE_2}
    assert len(cells) == 60
    assert len(found) == len(cells | averaged) == 66
    assert set(found) == cells | averaged


@pytest.mark.parametrize("name", ALL)
def test_the_command_in_its_head_is_a_sweep(name, capsys):
    words = sweep_words(name)
    assert words[0] == f"configs/flexlora/{name}"
    assert sweep.main([str(FOLDER / name), *words[1:], "--print"]) == 0
    seeds = [value.split(",") for option, value in itertools.pairwise(words) if option == "--seeds"]
    num_runs = len(points_of(words)) * (len(seeds[0]) if seeds else 1)
    assert capsys.readouterr().out.count(" run.name=") == num_runs


@pytest.mark.parametrize(("base", "method"), TABLE_2)
def test_settings_of_the_published_code(base, method):
    config = load_config(FOLDER / f"{base}-{method}.yaml")
    data, training = config.data, config.training
    assert (data.partition.name, data.partition.num_clients, data.max_tokens) == ("natural", 1613, 512)
    assert (data.instruction.format, data.instruction.template, data.instruction.loss_on) == (
        "flexlora",
        "alpaca",
        "all",
    )
    assert (data.instruction.skip_clients, data.test_split) == ((1613,), "global_test")
    assert (config.cohort.fraction, int(config.cohort.fraction * 1613), config.cohort.size) == (
        0.05,
        80,
        None,
    )
    assert config.lora.target_modules == BASES[base][1]
    assert OPTIMIZERS[method] == training.optimizer.name
    check_common(config)
    if method == "slora":
        assert config.strategy.slora.rounds == 5
        assert config.strategy.slora.tier_densities == (0.0012, 0.0246, 0.0822, 0.1222)


def check_common(config: Config) -> None:
    """Settings of the code that hold for every data set."""
    training, stopping = config.training, config.early_stopping
    assert (config.run.rounds, config.run.seed, config.cohort.sampling) == (50, 42, "flexlora")
    assert (config.lora.lora_alpha, config.lora.dropout, config.lora.rank_scale) == (16.0, 0.05, 1.0)
    assert not config.lora.use_rslora
    assert (training.local_epochs, training.batch_size, training.gradient_accumulation_steps) == (1, 2, 2)
    assert (training.optimizer.lr, training.optimizer.weight_decay, training.max_grad_norm) == (1e-6, 0, 1.0)
    assert (training.schedule.name, training.schedule.warmup_steps) == ("linear", 0)
    assert [(phase.from_round, phase.lr_scale) for phase in training.round_schedule] == [(15, 0.5)]
    assert (stopping.metric, stopping.patience, stopping.min_delta) == ("validation_rouge_l", 3, 0.0)
    assert (config.aggregation.client_weights, config.model.dtype) == ("examples", "float32")
    assert config.evaluation.every_rounds == 1


def test_dolly():
    name = "llama-1b-dolly.yaml"
    config = load_config(FOLDER / name)
    rules = config.data.instruction
    assert config.data.source == "databricks/databricks-dolly-15k"
    assert (rules.instruction_field, rules.input_field, rules.output_field) == (
        "instruction",
        "context",
        "response",
    )
    assert rules.category_field == config.data.label_field == "category"
    check_common(config)
    points = [method_of(load_config(FOLDER / name, point)) for point in points_of(sweep_words(name))]
    assert points == [
        ("fedavg", "flexlora", "uniform"),
        ("fedavg", "flexlora", "heavy_tail_light"),
        ("fedavg", "fedavg", "homogeneous"),
    ]


def idle_keys(config: Config) -> set[str]:
    """What has no effect in a run, so that its value need not be marked."""
    idle = set()
    if config.evaluation.client_test == config.early_stopping.metric == "off":
        idle.add("evaluation.max_client_test_examples")
    if config.evaluation.answers.metric == "off":
        idle.add("evaluation.answers.max_examples")
    return idle


@pytest.mark.parametrize("name", SCALED)
def test_scaled_runs_keep_what_is_not_said_to_be_scaled(name):
    config = load_config(FOLDER / name)
    base = "opt-1.3b" if name == "cpu-tasks.yaml" else "llama-1b"
    whole = load_config(FOLDER / f"{base}-fedit.yaml")
    silent = changed_keys(config, whole) - idle_keys(config) - marked_keys(FOLDER / name)
    assert not silent, f"{name}: neither as in {base}-fedit.yaml nor marked as ours or scaled down"
    assert config.lora.lora_alpha == whole.lora.lora_alpha * config.lora.rank_scale
    assert config.data.instruction.hold_out == "task"
    for point in points_of(sweep_words(name)):
        load_config(FOLDER / name, point)


def test_a_mark_is_read_from_the_line_of_its_key(tmp_path):
    path = tmp_path / "marks.yaml"
    path.write_text("a:  # ours\n  b: 1  # ours: why\n  c: 2  # scaled down\n  d: 3  # yours\nb: 4\n")
    assert marked_keys(path) == {"a.b", "a.c"}


@pytest.mark.parametrize("name", ALL)
def test_sources_are_names_that_the_user_supplies(name):
    config = load_config(FOLDER / name)
    for place in (config.data.source, config.model.name_or_path):
        assert not place.startswith(("/", ".", "~")), place


@pytest.mark.parametrize("name", [name for name in ALL if name not in SCALED])
def test_every_value_says_where_it_comes_from(name):
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        if re.match(r"\s+\w+: \S", line):
            assert "  # " in line, line
