"""The configurations of arXiv 2502.18910 say what is known of its experiments."""

import re
from pathlib import Path

import pytest

from fedsim.config.loader import load_config
from tests.config.marks import changed_keys, marked_keys

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "cllora"
EPOCHS = {"opt-125m": 5, "opt-350m": 3, "opt-1.3b": 1}
ARMS = (
    "data.partition.dirichlet_alpha=0.1",
    "data.partition.dirichlet_alpha=1",
    "data.partition.dirichlet_alpha=100",
    "data.partition.name=iid",
)


@pytest.mark.parametrize("model", EPOCHS)
@pytest.mark.parametrize(("skew", "num_clients"), [("length", 20), ("quantity", 10)])
def test_settings_of_the_paper_and_of_its_framework(model, skew, num_clients):
    config = load_config(FOLDER / f"{model}-{skew}.yaml")
    partition, training = config.data.partition, config.training
    assert (partition.name, partition.num_clients, partition.num_length_classes) == (
        f"{skew}_skew",
        num_clients,
        5,
    )
    assert (config.cohort.size, training.local_epochs, config.data.max_tokens) == (2, EPOCHS[model], 128)
    assert (config.lora.rank, config.lora.lora_alpha, config.lora.dropout) == (2, 16, 0.05)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert (training.batch_size, training.optimizer.name, training.optimizer.lr) == (32, "adamw", 5e-5)
    assert (training.schedule.name, training.schedule.warmup_steps) == ("linear", 0)
    assert (config.strategy.name, config.aggregation.client_weights) == ("fedavg", "examples")
    assert config.model.name_or_path == f"facebook/{model}"
    assert (config.data.test_split, config.evaluation.client_test) == ("validation", "common")
    for arm in ARMS:
        load_config(FOLDER / f"{model}-{skew}.yaml", [arm])


@pytest.mark.parametrize("model", EPOCHS)
def test_three_clients_alone(model):
    config = load_config(FOLDER / f"{model}-local.yaml")
    shared = load_config(FOLDER / f"{model}-length.yaml")
    assert config.strategy.name == "local"
    assert len(config.cohort.client_ids) == 3
    assert config.data.partition.dirichlet_alpha == 0.1
    assert config.lora == shared.lora
    assert config.training.optimizer == shared.training.optimizer
    assert config.training.local_epochs == EPOCHS[model]


SCALED = [(f"cpu-{skew}", f"opt-125m-{skew}", r"\b(ours|scaled down)\b") for skew in ("length", "quantity")]
ALONE = [(f"{model}-local", f"{model}-length", r"\b(ours|paper)\b") for model in EPOCHS]


@pytest.mark.parametrize(("name", "other", "marks"), [*SCALED, *ALONE])
def test_runs_that_say_as_another_file_mark_all_that_differs(name, other, marks):
    path = FOLDER / f"{name}.yaml"
    words = path.read_text(encoding="utf-8").replace("#", " ").split()
    assert f"As {other}.yaml, where the origin of each value stands, but for what is" in " ".join(words)
    config = load_config(path)
    idle = {"cohort.size"} if config.cohort.client_ids is not None else set()
    silent = changed_keys(config, load_config(FOLDER / f"{other}.yaml")) - marked_keys(path, marks) - idle
    assert not silent, f"{name}.yaml: neither as in {other}.yaml nor marked"


@pytest.mark.parametrize("skew", ["length", "quantity"])
@pytest.mark.parametrize("model", EPOCHS)
def test_every_value_says_where_it_comes_from(model, skew):
    for line in (FOLDER / f"{model}-{skew}.yaml").read_text(encoding="utf-8").splitlines():
        is_value = re.match(r"\s+\w+: \S", line)
        if is_value and "name_or_path" not in line:
            assert "#" in line, line
