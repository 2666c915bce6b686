import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.config.data_section import DataConfig, InstructionConfig, PartitionConfig
from fedsim.config.loader import load_config
from fedsim.data.build import FederatedData, build_data
from fedsim.data.corpus import Corpus
from fedsim.data.instruction_corpus import build_instruction_corpus
from fedsim.errors import ConfigError, DataError
from tests.helpers import word_tokenizer

TASKS = 8


def category_of(task: int) -> str:
    return f"Kind {'ABC'[task % 3]}"


def write_tasks(root: Path, num_instances: int = 6, **splits: list[int]) -> Path:
    (root / "tasks").mkdir(parents=True)
    for task in range(TASKS):
        content = {
            "Contributors": ["nobody"],
            "Categories": [category_of(task)],
            "Definition": [f"w{10 + task} w3"],
            "Positive Examples": [{"input": "w4", "output": "w5", "explanation": ""}],
            "Instances": [
                {"id": f"t{task}-{i}", "input": f"w{30 + i} w{10 + task}", "output": [f"w{40 + i}", "w50"]}
                for i in range(num_instances)
            ],
        }
        (root / "tasks" / f"task{task:03d}_a.json").write_text(json.dumps(content), encoding="utf-8")
    for split, tasks in splits.items():
        folder = root / "splits" / "default"
        folder.mkdir(parents=True, exist_ok=True)
        names = "".join(f"task{task:03d}_a\n" for task in tasks)
        (folder / f"{split}_tasks.txt").write_text(names, encoding="utf-8")
    return root


def write_client_files(folder: Path, num_clients: int = 11, missing: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    for client in range(num_clients):
        for kind, count in (("training", 5), ("eval", 2), ("test", 1)):
            rows = [
                {
                    "instruction": f"w{10 + client}",
                    "input": "" if i % 2 else f"w{30 + i}",
                    "output": f"w{40 + i}, w51",
                    "category": f"Kind {'AB'[client % 2]} {client}.json",
                }
                for i in range(count)
            ]
            name = f"local_{kind}_{client}.json"
            if name not in missing:
                (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return folder


def write_client_lines(path: Path, num_clients: int = 11) -> Path:
    lines = [
        {
            "client": 5 * client,
            "task": f"task{client:03d}",
            "category": category_of(client),
            "definition": f"w{10 + client}",
            "english": True,
            "training": [["w30", f"w{40 + i}"] for i in range(4)],
            "eval": [["w31", "w41"]],
            "test": [{"input": "w32", "output": ["w42", "w43"]}],
        }
        for client in range(num_clients)
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def write_rows(path: Path) -> Path:
    rows = [
        {
            "task": f"task{task}",
            "category": category_of(task),
            "definition": f"w{10 + task}",
            "input": f"w{30 + i}",
            "output": [f"w{40 + i}"],
            "part": part,
        }
        for task in range(TASKS)
        for i, part in enumerate(("training", "train", "training", "eval", "test"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = {
    "format": "rows",
    "instruction_field": "definition",
    "task_field": "task",
    "category_field": "category",
}


def config(source: Path, rules: dict[str, Any], num_clients: int = 4, **changes: Any) -> DataConfig:
    return DataConfig(
        source=str(source),
        instruction=InstructionConfig(**rules),
        partition=PartitionConfig(name="natural", num_clients=num_clients),
        **changes,
    )


def read(source: Path, rules: dict[str, Any], seed: int = 0, **changes: Any) -> Corpus:
    return build_instruction_corpus(config(source, rules, **changes), seed)


def build(source: Path, rules: dict[str, Any], num_clients: int = 4, **changes: Any) -> FederatedData:
    return build_data(config(source, rules, num_clients, **changes), word_tokenizer(), 0)


def tasks_of(corpus: Corpus) -> tuple[set[str], set[str]]:
    assert corpus.train.prompted is not None
    assert corpus.test.prompted is not None
    return set(corpus.train.prompted.tasks or ()), set(corpus.test.prompted.tasks or ())


def test_task_files_become_clients(tmp_path: Path) -> None:
    source = write_tasks(tmp_path / "ni")
    data = build(source, {"format": "natural_instructions", "hold_out": "task"}, num_clients=TASKS - 1)
    answers = data.test.answers
    assert answers is not None

    assert len(data.test) == 6
    assert len(answers.task_names) == 1
    assert set(data.partition.client_names) == {f"task{task:03d}_a" for task in range(TASKS)} - set(
        answers.task_names
    )
    assert answers.references(0) == ("w40", "w50")
    assert answers.category(0) == category_of(int(answers.task_names[0][4:7]))
    # the corpus has no parts, so a share of each client's examples is its own test
    assert data.partition.sizes.tolist() == [5] * (TASKS - 1)
    assert data.partition.test_sizes.tolist() == [1] * (TASKS - 1)
    assert data.partition.eval_indices is None
    for client, name in enumerate(data.partition.client_names):
        first = data.train.sequence(int(data.partition.train(client)[0])).tolist()
        assert 10 + int(name[4:7]) in first


def test_the_repositorys_split_holds_the_first_instances_of_unseen_tasks(tmp_path: Path) -> None:
    source = write_tasks(tmp_path / "ni", train=[0, 1, 2], test=[5, 6], excluded=[7])
    rules = {"format": "natural_instructions", "test_examples_per_task": 2, "examples_per_task": 3}
    corpus = read(source, rules, test_split="test")

    assert tasks_of(corpus) == (
        {"task000_a", "task001_a", "task002_a"},
        {"task005_a", "task006_a"},
    )
    assert (len(corpus.train), len(corpus.test)) == (9, 4)
    assert corpus.test.prompted is not None
    assert [references[0] for references in corpus.test.prompted.references] == ["w40", "w41"] * 2
    assert read(source, rules, seed=1, test_split="test").fingerprint != corpus.fingerprint


def test_each_task_draws_its_instances_by_itself(tmp_path: Path) -> None:
    source = write_tasks(tmp_path / "ni", num_instances=20)
    rules = {"format": "natural_instructions", "examples_per_task": 4, "hold_out": "task"}
    prompted = read(source, rules).train.prompted
    assert prompted is not None
    assert prompted.tasks is not None
    drawn: dict[str, list[int]] = {}
    for task, text in zip(prompted.tasks, prompted.inputs, strict=True):
        drawn.setdefault(task, []).append(int(text.split()[0][1:]) - 30)

    assert all(len(set(places)) == 4 and places == sorted(places) for places in drawn.values())
    assert len(drawn) == TASKS - 1
    assert len({tuple(places) for places in drawn.values()}) > 1


def test_a_task_in_both_lists_is_refused(tmp_path: Path) -> None:
    source = write_tasks(tmp_path / "ni", train=[0, 1], test=[1, 2])
    with pytest.raises(DataError, match="must not hold tasks of data.train_split=train, got 1 .task001_a"):
        read(source, {"format": "natural_instructions"}, test_split="test")


def test_client_files_keep_their_parts(tmp_path: Path) -> None:
    source = write_client_files(tmp_path / "1613")
    data = build(source, {"format": "flexlora", "hold_out": "task"}, num_clients=10)

    assert data.partition.sizes.tolist() == [5] * 10
    assert data.partition.eval_sizes.tolist() == [2] * 10
    assert data.partition.test_sizes.tolist() == [1] * 10
    assert list(data.partition.client_names) == sorted(data.partition.client_names)
    held = np.concatenate(
        [data.partition.train_indices, data.partition.test_indices, data.partition.eval_indices]
    )
    assert np.unique(held).size == held.size == len(data.train) == 80
    assert data.train.answers is not None
    assert set(data.train.answers.category_names) == {"Kind A", "Kind B"}
    for client, name in enumerate(data.partition.client_names):
        for indices in (data.partition.train, data.partition.evaluation, data.partition.test):
            for index in indices(client).tolist():
                assert data.train.answers.task(index) in (f"Kind A {int(name)}", f"Kind B {int(name)}")
    described = data.partition.to_json()
    assert described["eval_sizes"] == [2] * 10
    assert described["mean_pairwise_overlap"] == 0


def test_a_missing_client_file_is_an_error_unless_the_client_is_skipped(tmp_path: Path) -> None:
    source = write_client_files(tmp_path / "1613", missing=("local_training_7.json",))
    with pytest.raises(DataError, match=r"1 are missing .local_training_7.json.; get them, or name"):
        read(source, {"format": "flexlora"})

    corpus = read(source, {"format": "flexlora", "skip_clients": (7,)})
    assert set(corpus.train.clients or ()) == {f"{client:02d}" for client in range(11) if client != 7}


def test_all_1614_client_files_and_the_1613_clients_of_the_published_code(tmp_path: Path) -> None:
    """Ids 0 to 1613, 80/10/10; the code draws from the first 1,613, and client k must be the files of number k."""
    folder = tmp_path / "1613"
    folder.mkdir()
    for client in range(1614):
        row = {
            "instruction": "w3",
            "input": f"w{client % 60 + 3}",
            "output": "w4",
            "category": f"Kind {client}.json",
        }
        for kind, count in (("training", 8), ("eval", 1), ("test", 1)):
            (folder / f"local_{kind}_{client}.json").write_text(json.dumps([row] * count), encoding="utf-8")
    rules = {"format": "flexlora"}
    corpus = read(folder, rules)
    assert sorted(set(corpus.train.clients or ())) == [f"{client:04d}" for client in range(1614)]
    data = build(
        folder, {**rules, "skip_clients": (1613,), "hold_out": "task", "hold_out_names": ("Kind 5",)}, 1612
    )
    names = [f"{client:04d}" for client in range(1613) if client != 5]
    assert list(data.partition.client_names) == names
    assert (data.partition.sizes == 8).all()
    assert (data.partition.eval_sizes == 1).all()
    assert (data.partition.test_sizes == 1).all()


def test_global_test_of_client_files(tmp_path: Path) -> None:
    source = write_client_files(tmp_path / "1613")
    rows = [{"instruction": "w3", "input": "", "output": "w4", "category": "Other 99.json"}]
    (source / "global_test.json").write_text(json.dumps(rows), encoding="utf-8")
    corpus = read(source, {"format": "flexlora"}, test_split="global_test")

    assert len(corpus.train) == 88
    assert tasks_of(corpus)[1] == {"Other 99"}


def test_one_line_for_each_client(tmp_path: Path) -> None:
    source = write_client_lines(tmp_path / "clients.jsonl.gz")
    data = build(source, {"format": "client_lines", "hold_out": "category"}, num_clients=7)

    assert data.partition.sizes.tolist() == [4] * 7
    assert (data.partition.test_sizes.tolist(), data.partition.eval_sizes.tolist()) == ([1] * 7, [1] * 7)
    assert data.train.labels is not None
    assert data.train.answers is not None
    test_row = int(data.partition.test(0)[0])
    assert data.train.answers.references(test_row) == ("w42", "w43")


def test_rows_with_a_column_of_parts(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    rules = {**ROWS, "part_field": "part", "hold_out": "task"}
    data = build(source, rules, num_clients=7, client_field="task", label_field="category")

    assert data.partition.sizes.tolist() == [3] * 7
    assert data.partition.eval_sizes.tolist() == [1] * 7
    assert data.partition.test_sizes.tolist() == [1] * 7
    without = build(source, {**ROWS, "hold_out": "task"}, num_clients=7, client_field="task")
    assert without.partition.sizes.tolist() == [4] * 7
    assert without.partition.eval_indices is None


@pytest.mark.parametrize("kind", ["task", "category"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unseen_clients_are_disjoint(kind: str, seed: int, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    corpus = read(source, {**ROWS, "hold_out": kind, "hold_out_fraction": 0.4}, seed)
    train, test = tasks_of(corpus)

    assert train
    assert test
    assert not train & test
    assert len(train | test) == TASKS
    if kind == "category":
        categories = [{category_of(int(task[4:])) for task in tasks} for tasks in (train, test)]
        assert not categories[0] & categories[1]
    assert read(source, {**ROWS, "hold_out": kind, "hold_out_fraction": 0.4}, seed).fingerprint == (
        corpus.fingerprint
    )


@pytest.mark.parametrize(("fraction", "number"), [(0.3, 3), (0.25, 2), (0.01, 1), (0.99, 8)])
def test_the_number_of_held_out_tasks_is_the_nearest_but_never_none_or_all(
    fraction: float, number: int, tmp_path: Path
) -> None:
    source = write_client_lines(tmp_path / "clients.jsonl.gz", num_clients=9)
    rules = {"format": "client_lines", "hold_out": "task", "hold_out_fraction": fraction}

    assert [len(tasks) for tasks in tasks_of(read(source, rules))] == [9 - number, number]


def test_held_out_names_are_those_asked_for(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    corpus = read(
        source,
        {**ROWS, "hold_out": "category", "hold_out_names": ("Kind B",), "test_examples_per_task": 2},
    )

    assert tasks_of(corpus)[1] == {"task1", "task4", "task7"}
    assert len(corpus.test) == 6
    assert "no client trains on" in corpus.test_from
    with pytest.raises(DataError, match="must be categories of data.source, got 'Kind X'"):
        read(source, {**ROWS, "hold_out": "category", "hold_out_names": ("Kind X",)})
    with pytest.raises(DataError, match="must leave at least one"):
        read(source, {**ROWS, "hold_out": "task", "hold_out_names": tuple(f"task{i}" for i in range(8))})


@pytest.mark.parametrize("name", ["iid", "label_skew", "quantity_skew", "pathological", "plato_quantity"])
def test_other_partitions_leave_out_what_the_corpus_keeps_for_evaluation_and_test(
    name: str, tmp_path: Path
) -> None:
    source = write_client_lines(tmp_path / "clients.jsonl.gz")
    rules = {"num_length_classes": 1} if name == "quantity_skew" else {}
    by_label = {"class_by": "label"} if name == "pathological" else {}
    chosen = DataConfig(
        source=str(source),
        instruction=InstructionConfig(format="client_lines"),
        partition=PartitionConfig(name=name, num_clients=4, **rules, **by_label),
        client_test_fraction=0.25,
    )
    data = build_data(chosen, word_tokenizer(), 0)
    partition, answers = data.partition, data.train.answers

    assert answers is not None
    assert {0, 1, 2} == set(answers.parts.tolist())
    dealt = np.concatenate((partition.train_indices, partition.test_indices))
    assert (answers.parts[dealt] == 0).all()
    if not name.startswith("plato"):
        assert len(dealt) > 0.7 * (answers.parts == 0).sum()
    assert len(partition.classes) == len(data.train), "also of the examples that nobody holds"
    assert str((answers.parts != 0).sum()) in str(partition.notes["own_parts"])
    assert partition.eval_indices is None
    if name == "label_skew":
        assert partition.label_names == ("Kind A", "Kind B", "Kind C")


BAD_FILES = [
    ("natural_instructions", "tasks/a.json", "[]", "must be a Natural Instructions task"),
    ("natural_instructions", "tasks/a.json", "{", "cannot be read as JSON"),
    ("natural_instructions", "readme.txt", "", "must hold task files"),
    (
        "natural_instructions",
        "tasks/a.json",
        '{"Definition": ["x"], "Instances": [{"input": "i", "output": 3}]}',
        "the output of instance 0 of a.json must be a text or a list of texts, got 3",
    ),
    ("flexlora", "readme.txt", "", "must hold files local_training_<client>.json"),
]


@pytest.mark.parametrize(("form", "name", "content", "message"), BAD_FILES)
def test_bad_files_are_named(form: str, name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data", {"format": form})


BAD_LINES = [
    ("", "got none"),
    ("[1]\n", "line 1 of a.jsonl must be an object"),
    ('{"client": null}\n', "the client of line 1 of a.jsonl must be a number or a text, got nothing"),
    (
        '{"client": 1, "definition": "d", "training": [["x"]]}\n',
        r"training row 0 of line 1 of a.jsonl must be \[input, output\]",
    ),
    (
        '{"client": 1, "training": [["x", "y"]]}\n',
        "the instruction of training row 0 of line 1 of a.jsonl must be a text, got nothing",
    ),
    ('{"client": 1, "definition": "d", "training": []}\n', "must hold at least one example"),
]


@pytest.mark.parametrize(("content", "message"), BAD_LINES)
def test_bad_lines_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(path, {"format": "client_lines"})


def test_bad_columns_are_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="data.instruction.instruction_field must be a column of"):
        read(source, {**ROWS, "instruction_field": "prompt"})
    with pytest.raises(DataError, match="part_field='category' must hold one of train"):
        read(source, {**ROWS, "part_field": "category"})
    with pytest.raises(DataError, match="data.client_field must be one of task, category, client"):
        read(write_client_lines(tmp_path / "c.jsonl.gz"), {"format": "client_lines"}, client_field="author")


BAD_CONFIGS = [
    (["data.instruction.loss_on=all"], "data.instruction.loss_on must stay at its default 'answer' when"),
    (["data.instruction.format=rows"], "data.instruction.format must be off when data.source is embedded"),
    (
        ["data.source=a.jsonl", "data.instruction.format=rows", "data.text_field=x"],
        "data.text_field must stay at its default",
    ),
    (
        ["data.source=a", "data.instruction.format=flexlora", "data.instruction.task_field=x"],
        "data.instruction.task_field must stay at its default",
    ),
    (
        ["data.source=a.jsonl", "data.instruction.format=rows", "data.instruction.hold_out=task"],
        "data.instruction.task_field must be set when data.instruction.hold_out is task",
    ),
    (
        ["data.source=a.jsonl", "data.instruction.format=rows", "data.instruction.template=custom"],
        "data.instruction.custom_template must be set",
    ),
    (
        [
            "data.source=a.jsonl",
            "data.instruction.format=rows",
            "data.instruction.template=custom",
            "data.instruction.custom_template='{input} {question}'",
        ],
        "and no other name in braces",
    ),
    (
        [
            "data.source=a",
            "data.instruction.format=flexlora",
            "data.instruction.hold_out=task",
            "data.test_split=global_test",
        ],
        "data.test_split must stay at its default null when data.instruction.hold_out is task",
    ),
    (
        ["data.source=a", "data.instruction.format=flexlora", "data.instruction.hold_out_fraction=0.2"],
        "data.instruction.hold_out_fraction must stay at its default 0.1 when data.instruction.hold_out is none",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_CONFIGS)
def test_keys_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert message in str(error.value)


def test_instruction_files_need_no_column_of_clients() -> None:
    loaded = load_config(
        None,
        ["data.source=a", "data.instruction.format=flexlora", "data.partition.name=natural"],
    )
    assert loaded.data.client_field is None


def test_the_real_clients_of_flexlora(shared: Path) -> None:
    corpus = read(
        shared / "data" / "ni_1613_mini.jsonl.gz",
        {"format": "client_lines", "hold_out": "category"},
    )
    train, test = tasks_of(corpus)

    assert len(set(corpus.train.clients or ()) | set(corpus.test.clients or ())) == 1519
    assert not train & test
    assert set(corpus.train.clients or ()).isdisjoint(corpus.test.clients or ())
    assert corpus.train.prompted is not None
    assert np.bincount(corpus.train.prompted.parts).min() > 1000


def test_the_real_rows_of_natural_instructions(shared: Path) -> None:
    corpus = read(
        shared / "data" / "ni_tasks_train.jsonl.gz",
        {**ROWS, "part_field": "part", "hold_out": "task"},
        client_field="task",
    )
    train, test = tasks_of(corpus)

    assert len(corpus.train) + len(corpus.test) == 10705
    assert (len(train), len(test)) == (270, 30)
    assert not train & test
    assert corpus.train.prompted is not None
    assert max(len(references) for references in corpus.train.prompted.references) > 1
