"""What a user can do wrong: each ends with exit code 2, one line that says what to mend, and nothing left behind."""

import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsim.cache import cache_root
from tests.faults.damage import rewrite_state

Snapshot = Callable[[Path], dict[str, bytes | None]]
Refuse = Callable[..., str]


@pytest.fixture
def refuse(program: Any, capsys: pytest.CaptureFixture[str], snapshot: Snapshot) -> Refuse:
    """Run the program; it must end with exit code 2, one line with all `fragments`, and no file changed."""

    def run(arguments: Sequence[str], fragments: Sequence[str]) -> str:
        before = snapshot(program.folder)
        capsys.readouterr()
        code = program.run(*arguments)
        line = one_line(code, capsys.readouterr().err)
        for fragment in fragments:
            assert fragment in line
        assert snapshot(program.folder) == before
        assert not unfinished_entries()
        return line

    return run


def one_line(code: int, errors: str) -> str:
    """The only line of standard error."""
    assert code == 2, errors
    assert "Traceback" not in errors
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("fedsim: ")
    return lines[0]


def unfinished_entries() -> list[Path]:
    return [path for path in cache_root().glob("*/.*") if path.is_dir()] if cache_root().is_dir() else []


CONFIG_CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["lora.rnak=2"], ["ConfigError: unknown key lora.rnak; did you mean 'lora.rank'?"]),
    "unknown section": (["loar.rank=2"], ["unknown key loar.rank; did you mean 'lora.rank'?"]),
    "text for an integer": (["run.rounds=many"], ["run.rounds must be an integer > 0, got 'many'"]),
    "fraction for an integer": (["lora.rank=2.5"], ["lora.rank must be an integer > 0, got 2.5"]),
    "quoted number": (['lora.rank="4"'], ["lora.rank", "a number has no quotes"]),
    "number for a text": (["model.name_or_path=1"], ["model.name_or_path", "put it in quotes"]),
    "word for a truth value": (["lora.use_rslora=off"], ["lora.use_rslora must be true or false, got 'off'"]),
    "text for a list": (["lora.target_modules=q_proj"], ["lora.target_modules must be", "write [q_proj]"]),
    "empty list": (["lora.target_modules=[]"], ["lora.target_modules must be a non-empty list", "got []"]),
    "value for a section": (["lora=4"], ["lora must be a section with keys such as lora.rank, got 4"]),
    "zero rounds": (["run.rounds=0"], ["run.rounds must be an integer > 0, got 0"]),
    "negative seed": (["run.seed=-1"], ["run.seed must be an integer in [0, 2**63), got -1"]),
    "folder in a name": (["run.name=a/b"], ["run.name must be a text of", "got 'a/b'"]),
    "negative alpha": (
        ["data.partition.dirichlet_alpha=-0.5"],
        ["data.partition.dirichlet_alpha must be a number > 0, got -0.5"],
    ),
    "zero clients": (
        ["data.partition.num_clients=0"],
        ["data.partition.num_clients must be an integer > 0, got 0"],
    ),
    "cohort larger than clients": (
        ["cohort.size=7"],
        ["cohort.size must be in [1, data.partition.num_clients=6], got 7"],
    ),
    "cohort set twice": (
        ["cohort.fraction=0.5"],
        ["only one of cohort.size, cohort.fraction and cohort.client_ids may be set", "set the others to null"],
    ),
    "unknown client": (
        ["cohort.size=null", "cohort.client_ids=[1, 6]"],
        ["cohort.client_ids must be below data.partition.num_clients=6, got [6]"],
    ),
    "epochs and steps": (
        ["training.local_epochs=1", "training.local_steps=3"],
        ["only one of training.local_epochs and training.local_steps may be set"],
    ),
    "negative learning rate": (["training.optimizer.lr=-1"], ["training.optimizer.lr must be a number >= 0"]),
    "learning rate that is no number": (
        ["training.optimizer.lr=.nan"],
        ["training.optimizer.lr must be a finite number >= 0, got nan"],
    ),
    "momentum for adamw": (
        ["training.optimizer.momentum=0.9"],
        ["training.optimizer.momentum must stay at its default 0.0", "adamw", "got 0.9"],
    ),
    "misspelt choice": (["strategy.name=fedavgg"], ["strategy.name must be one of", "did you mean 'fedavg'?"]),
    "own split without one": (
        ["evaluation.client_test=own_split", "data.client_test_fraction=0"],
        ["data.client_test_fraction must be > 0 when evaluation.client_test is own_split, got 0"],
    ),
    "batch below a sequence": (
        ["evaluation.batch_tokens=8"],
        ["evaluation.batch_tokens must be at least data.max_tokens=24, got 8"],
    ),
    "nothing to test": (
        ["strategy.name=local", "evaluation.client_test=off"],
        ["evaluation.client_test must be common or own_split", "strategy.name=local", "got 'off'"],
    ),
    "key without a value": (["lora.rank="], ["lora.rank has no value"]),
    "key twice": (["lora.rank=2", "lora.rank=3"], ["lora.rank must be set once on the command line"]),
    "unknown option": (["--rounds=3"], ["unknown option '--rounds=3'", "--dry-run"]),
    "two files": (["a.yaml", "b.yaml"], ["takes one configuration file, got 'a.yaml' and 'b.yaml'"]),
    "missing file": (["nothing/here.yaml"], ["configuration file 'nothing/here.yaml' does not exist"]),
    "unresolvable reference": (["run.name=${run.nmae}"], ["run.name", "cannot be resolved", "run.nmae"]),
    "a base in 4 bits that changes": (
        ["model.quantization=nf4", "strategy.name=fedex"],
        ["model.quantization must be none with strategy.name=fedex", "'nf4'"],
    ),
    "nccl and cpu": (
        ["run.device=cpu", "comm.backend=nccl"],
        ["comm.backend must be auto or gloo when run.device is cpu, got 'nccl'"],
    ),
    "one split for two": (
        ["data.test_split=train"],
        ["data.test_split must differ from data.train_split, got 'train'", "set it to null"],
    ),
    "missing split": (
        ["data.test_split=validation"],
        ["DataError: data.test_split must be a split of", "(train), got 'validation'"],
    ),
    "missing column": (
        ["data.text_field=body"],
        ["DataError: data.text_field must be a column of", "(text, label), got 'body'"],
    ),
    "missing label column": (["data.label_field=topic"], ["data.label_field must be a column of", "got 'topic'"]),
    "subset of a file": (["data.subset=small"], ["data.subset", "leave it null, got 'small'"]),
    "too few examples": (
        ["data.partition.num_clients=190", "data.partition.name=iid"],
        ["DataError: data.partition.num_clients", "190", "180"],
    ),
    "too few examples for a share": (
        ["data.partition.examples_per_client=31"],
        ["DataError: data.partition.examples_per_client", "31", "180"],
    ),
    "too few examples for a minimum": (
        ["data.partition.name=quantity_skew", "data.partition.min_examples=50"],
        ["DataError: data.partition.", "min_examples", "50", "180"],
    ),
    "unknown module": (
        ["lora.target_modules=[q_porj]"],
        ["lora.target_modules: 'q_porj' is no linear module of OPT", "did you mean 'q_proj'?"],
    ),
    "adapter on the head": (
        ["lora.target_modules=[lm_head]"],
        ["lora.target_modules must name linear modules", "'lm_head' names lm_head, the output embedding"],
    ),
    "adapter on the embedding": (
        ["lora.target_modules=[embed_tokens]"],
        ["lora.target_modules must name linear modules", "the input embedding, which stays frozen"],
    ),
    "adapter on a norm": (
        ["lora.target_modules=[self_attn_layer_norm]"],
        ["lora.target_modules must name linear modules", "a LayerNorm"],
    ),
    "rank above the module": (["lora.rank=17"], ["lora.rank must be at most 16, the smaller side of", "got 17"]),
    "more tokens than positions": (
        ["data.max_tokens=65"],
        ["data.max_tokens must be at most 64, the positions of the model", "got 65"],
    ),
    "missing model folder": (
        ["model.name_or_path=./nowhere"],
        ["ModelError: model.name_or_path must be a Hugging Face model id or an existing local folder", "'./nowhere'"],
    ),
    "revision of a folder": (["model.revision=main"], ["model.revision is for hub models only, got 'main'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_wrong_setting(case: str, refuse: Refuse) -> None:
    arguments, fragments = CONFIG_CASES[case]
    refuse(arguments, fragments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_gpu_settings_without_a_gpu(refuse: Refuse) -> None:
    refuse(["run.device=cuda"], ["run.device must be cpu or auto where no GPU is visible, got 'cuda'"])
    refuse(["comm.backend=nccl"], ["comm.backend must be auto or gloo on cpu, got 'nccl'"])


CONFIG_FILES: dict[str, tuple[bytes, list[str]]] = {
    "binary": (b"\x00\xff\xfe\x01" * 50, ["must be UTF-8 text, but byte 1 is not"]),
    "no yaml": (b"lora:\n  rank: [2\n", ["must be YAML (line"]),
    "a list": (b"- lora\n", ["must hold sections such as 'run:' at its top level"]),
    "key twice": (b"lora:\n  rank: 2\n  rank: 3\n", ["must name a key once, got 'rank' in line 2 and again"]),
    "python object": (b"lora: !!python/object/apply:os.getcwd []\n", ["must hold plain values only"]),
    "unknown key": (b"training:\n  learning_rate: 0.1\n", ["did you mean 'training.optimizer.lr'?"]),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_bad_configuration_file(case: str, program: Any, refuse: Refuse) -> None:
    content, fragments = CONFIG_FILES[case]
    path = program.folder / "bad.yaml"
    path.write_bytes(content)
    refuse([str(path)], ["ConfigError: ", *fragments])


def rows(*texts: object) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


GOOD_TEXTS = [f"w{3 + index % 60} w{4 + index % 50}" for index in range(60)]

CORPORA: dict[str, tuple[str, bytes | None, list[str]]] = {
    "missing": ("no.jsonl", None, ["no.jsonl looks like a path, but there is no such file or folder"]),
    "empty": ("a.jsonl", b"", ["must hold at least one example, but a.jsonl is empty"]),
    "unknown ending": ("a.docx", b"w3 w4\n", ["must end in one of .jsonl, .json, .csv, .parquet, .txt"]),
    "binary as jsonl": ("a.jsonl", bytes(range(256)) * 20, ["cannot be read as json"]),
    "binary as text": ("a.txt", bytes(range(256)) * 20, ["cannot be read as text", "not UTF-8 text"]),
    "binary as csv": ("a.csv", bytes(range(256)) * 20, ["cannot be read as csv"]),
    "text as parquet": ("a.parquet", b"w3 w4\n" * 99, ["cannot be read as parquet"]),
    "corrupt gz": ("a.jsonl.gz", b"\x1f\x8b\x08" + b"x" * 99, ["a.jsonl.gz cannot be read"]),
    "text as gz": ("a.txt.gz", b"w3 w4\n" * 99, ["a.txt.gz cannot be read", "ot a gzipped file"]),
    "cut gz": ("a.jsonl.gz", gzip.compress(rows(*GOOD_TEXTS))[:-30], ["a.jsonl.gz", "cannot be read"]),
    "broken json": ("a.jsonl", rows(*GOOD_TEXTS) + b'{"text": "w3', ["cannot be read as json"]),
    "blank lines": ("a.jsonl", b"\n\n\n", ["it holds no rows"]),
    "numbers": ("a.jsonl", rows(1, 2, 3), ["data.text_field='text' must hold a text", "row 0", "int 1"]),
    "lists": ("a.jsonl", rows(["w3"], ["w4"]), ["data.text_field='text' must hold a text", "list ['w3']"]),
    "null": ("a.jsonl", rows(*GOOD_TEXTS, None), ["must hold a text in every row, but row 60", "is null"]),
    "all texts empty": ("a.jsonl", rows(*[""] * 60), ["texts leave no label token", "check data.text_field"]),
    "one text empty": (
        "a.jsonl", rows(*GOOD_TEXTS[:40], "", *GOOD_TEXTS[40:]),
        ["1 of ", "row 40, counted from 0", "remove them or set data.on_empty=drop"],
    ),
    "blank text": ("a.jsonl", rows(*GOOD_TEXTS, " \n\t"), ["row 60, counted from 0", "data.on_empty=drop"]),
    "one example": ("a.jsonl", rows("w3 w4"), ["needs at least 2 examples, got 1"]),
    "fewer examples than clients": (
        "a.jsonl", rows(*GOOD_TEXTS[:5]), ["data.partition.num_clients", "6", "4"]
    ),
    "equal lengths": (
        "a.jsonl", rows(*GOOD_TEXTS), ["data.partition.num_length_classes=3", "choose data.partition.name=iid"]
    ),
    "csv without the column": ("a.csv", b"body\nw3 w4\nw5 w6\n", ["data.text_field must be a column of", "(body)"]),
    "lone surrogate": ("a.jsonl", b'{"text": "w3 \\ud800"}\n' * 20, ["a.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CORPORA)
def test_bad_corpus(case: str, program: Any, refuse: Refuse) -> None:
    name, content, fragments = CORPORA[case]
    path = program.folder / name
    if content is not None:
        path.write_bytes(content)
    refuse([f"data.source={path}"], ["DataError: data", *fragments])


def test_bad_corpus_folders(program: Any, refuse: Refuse) -> None:
    folder = program.folder / "corpus"
    folder.mkdir()
    refuse([f"data.source={folder}"], ["DataError: data.source=", "without any file of a known kind"])
    (folder / "a.jsonl").write_bytes(rows(*GOOD_TEXTS))
    (folder / "b.csv").write_bytes(b"text\nw3\n")
    refuse([f"data.source={folder}"], ["must hold files of one kind, got csv, json"])


@pytest.mark.parametrize("key", ["data.source", "model.name_or_path", "model.tokenizer"])
def test_hub_without_network(key: str, refuse: Refuse) -> None:
    began = time.monotonic()
    refuse([f"{key}=nobody/nothing"], [f"{key}=nobody/nothing", "HF_HOME", "HF_HUB_OFFLINE=1"])
    assert time.monotonic() - began < 60


def copy_model(program: Any) -> Path:
    """The model folder as a copy that may be damaged; the program now uses it."""
    source, target = Path(program.settings["model.name_or_path"]), program.folder / "model"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    program.settings["model.name_or_path"] = target
    return target


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def keep_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def fill_with_nan(weights: dict[str, torch.Tensor]) -> None:
    weights["model.decoder.layers.0.fc1.weight"].fill_(float("nan"))


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["is no model folder, it has no config.json"]),
    "config that is no json": (
        lambda folder: (folder / "config.json").write_bytes(b"\x00\x01{"), ["config.json is not a readable JSON"]
    ),
    "unknown architecture": (
        lambda folder: change_config(folder, model_type="gpt9"), ["does not know model_type 'gpt9'"]
    ),
    "own code": (
        lambda folder: change_config(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "m.M"}),
        ["Python code in its repository; set model.trust_remote_code=true if you trust it"],
    ),
    "bert": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert", "vocab_size": 64}'),
        ["must be a causal language model (decoder only)", "'bert'"],
    ),
    "t5": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "t5", "vocab_size": 64}'),
        ["must be a causal language model (decoder only)", "t5"],
    ),
    "sizes that contradict": (
        lambda folder: change_config(folder, num_attention_heads=3), ["config.json describes no model"]
    ),
    "sizes of another model": (lambda folder: change_config(folder, ffn_dim=24), ["weights", "fit its config.json"]),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ["no weights in safetensors format", "model.allow_pickle=true"],
    ),
    "cut weights": (lambda folder: keep_half(folder / "model.safetensors"), ["its weights in", "cannot be loaded"]),
    "weights that are text": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs\n"), ["cannot be loaded"]
    ),
    "missing tensor": (
        lambda folder: change_weights(folder, lambda weights: weights.pop("model.decoder.layers.1.fc2.weight")),
        ["do not fit its config.json; 1 tensors are missing, such as model.decoder.layers.1.fc2.weight"],
    ),
    "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
        ["there is no tokenizer in", "set model.tokenizer to the id or folder of one"],
    ),
    "cut tokenizer": (lambda folder: keep_half(folder / "tokenizer.json"), ["cannot be loaded", "model.tokenizer"]),
    "smaller embedding than tokenizer": (
        lambda folder: change_config(folder, vocab_size=40),
        ["model.tokenizer must fit the model", "64 entries (highest id 63)", "40 embedding rows"],
    ),
    "much larger embedding than tokenizer": (
        lambda folder: change_config(folder, vocab_size=5000), ["model.tokenizer must fit the model", "5000"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_bad_model(case: str, program: Any, refuse: Refuse) -> None:
    damage, fragments = MODELS[case]
    damage(copy_model(program))
    refuse([], ["ModelError: model.", *fragments])


def test_weights_that_are_not_finite(program: Any, capsys: Any) -> None:
    change_weights(copy_model(program), fill_with_nan)
    code = program.run()
    line = one_line(code, capsys.readouterr().err)
    assert "ModelError: model.name_or_path=" in line
    assert "must be finite, got nan; check its weights, or set model.dtype" in line
    assert json.loads((program.run_folder / "run.json").read_text())["status"] == "failed"


def test_model_folder_that_is_a_file(program: Any, refuse: Refuse) -> None:
    (program.folder / "weights").write_text("")
    refuse(
        [f"model.name_or_path={program.folder / 'weights'}"],
        ["model.name_or_path must be", "is a file, not a"],
    )


def test_output_in_the_way(program: Any, refuse: Refuse) -> None:
    (program.folder / "runs").write_text("")
    remedy = ["RunFolderError: run.output_dir must be writable", "set run.output_dir or run.name to another"]
    refuse([], remedy)
    refuse(["--dry-run"], remedy)
    (program.folder / "runs").unlink()
    (program.folder / "runs").mkdir()
    (program.folder / "runs" / "small").write_text("")
    refuse([], remedy)


def test_foreign_folder(program: Any, refuse: Refuse) -> None:
    program.run_folder.mkdir(parents=True)
    (program.run_folder / "thesis.tex").write_text("x")
    message = ["must be new, empty or that of a run, and holds thesis.tex", "choose another run.name"]
    refuse([], message)
    refuse(["--dry-run"], message)


@pytest.fixture
def finished(program: Any) -> Path:
    """The folder of a finished run of two rounds."""
    program.settings["run.rounds"] = 2
    assert program.run() == 0
    folder: Path = program.run_folder
    return folder


def test_folder_of_another_configuration(finished: Path, refuse: Refuse) -> None:
    refuse(
        ["lora.rank=4", "cohort.size=2", "run.rounds=9"],
        ["another configuration (lora.rank: 2 -> 4; cohort.size: 3 -> 2)", "choose another run.name"],
    )


def test_folder_in_use(program: Any, finished: Path, refuse: Refuse) -> None:
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(finished / "run.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        refuse(["run.rounds=3"], ["is in use by another process", "wait for it or choose another run.name"])
        holder.kill()


def test_corpus_that_has_changed_since(program: Any, refuse: Refuse) -> None:
    path = program.folder / "corpus.jsonl"
    path.write_bytes(Path(program.settings["data.source"]).read_bytes())
    program.settings["data.source"] = path
    assert program.run("run.rounds=2") == 0
    path.write_bytes(path.read_bytes().replace(b"w3", b"w4"))
    refuse(["run.rounds=3"], ["was begun with other inputs (data)", "choose another run.name"])


def test_base_whose_settings_have_changed_since(program: Any, refuse: Refuse) -> None:
    """The weights do not show it: only what is computed with them changes."""
    model = program.folder / "base"
    shutil.copytree(program.settings["model.name_or_path"], model)
    program.settings["model.name_or_path"] = model
    assert program.run("run.rounds=2") == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "99.0"}))
    assert program.run("run.rounds=3") == 0, "who wrote it does not matter"
    assert config["activation_function"] == "relu"
    (model / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))
    refuse(["run.rounds=4"], ["was begun with other inputs (base_settings)", "choose another run.name"])


def damage_checkpoint(folder: Path, number: int) -> None:
    keep_half(folder / "checkpoints" / f"round_{number:06d}" / "state.safetensors")


def damage_all_checkpoints(folder: Path) -> None:
    damage_checkpoint(folder, 1)
    (folder / "checkpoints" / "round_000002" / "state.json").unlink()


def newer_checkpoint(folder: Path) -> None:
    rewrite_state(folder / "checkpoints" / "round_000002", format_version=99)


RUN_FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "run.json": (lambda folder: keep_half(folder / "run.json"), ["run.json must be readable JSON", "delete the file"]),
    "config.yaml that is binary": (
        lambda folder: (folder / "config.yaml").write_bytes(b"\xff\x00"), ["config.yaml must be readable YAML"]
    ),
    "config.yaml that is no yaml": (
        lambda folder: (folder / "config.yaml").write_text("{"), ["config.yaml must be readable YAML"]
    ),
    "metrics.jsonl": (
        lambda folder: (folder / "metrics.jsonl").write_text('{"round_\n{"round_index": 1}\n'),
        ["metrics.jsonl line 1 must be a JSON object", "repair or delete the line"],
    ),
    "clients.parquet": (lambda folder: keep_half(folder / "clients.parquet"), ["clients.parquet cannot be read"]),
    "all checkpoints": (damage_all_checkpoints, ["no checkpoint in", "is readable", "to start again"]),
    "checkpoint of a later version": (newer_checkpoint, ["must have format version 3 or 2, got 99"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RUN_FOLDERS)
def test_damaged_run_folder(case: str, program: Any, finished: Path, refuse: Refuse) -> None:
    damage, fragments = RUN_FOLDERS[case]
    damage(finished)
    refuse(["run.rounds=3"], fragments)


def test_cache_that_cannot_be(program: Any, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    (program.folder / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE", str(program.folder / "file" / "cache"))
    message = ["CacheError: the cache folder", "must be writable", "set FEDSIM_CACHE to a folder that is"]
    refuse([], message)
    refuse(["data.source=embedded"], message)
    refuse(["model.name_or_path=embedded"], message)


def test_damaged_cache_entry(program: Any, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(program.folder / "cache"))
    assert program.run("--dry-run") == 0
    damaged = [*program.folder.glob("cache/tokens/*/tokens.bin")]
    assert len(damaged) == 2
    for file in damaged:
        file.write_bytes(file.read_bytes()[:-4])
    message = [
        "CacheError: the cache entry",
        "is damaged (tokens.bin changed or missing)",
        "delete that folder",
    ]
    refuse([], message)
    refuse(["--dry-run"], message)


def test_damaged_table_in_the_cache(program: Any, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(program.folder / "cache"))
    assert program.run("--dry-run") == 0
    (table,) = program.folder.glob("cache/datasets/**/*.arrow")
    keep_half(table)
    refuse(
        ["--dry-run"],
        ["DataError", "cannot be read as json", "if the file is sound, delete the cache folder"],
    )


LAUNCHERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "rank alone": (
        {"RANK": "0"}, ["must set WORLD_SIZE to a whole number, got nothing", "start with torchrun, or unset"]
    ),
    "world size alone": ({"WORLD_SIZE": "2"}, ["must set RANK to a whole number, got nothing"]),
    "rank that is no number": ({"RANK": "a", "WORLD_SIZE": "2"}, ["must set RANK to a whole number, got 'a'"]),
    "rank outside": ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK must be in [0, WORLD_SIZE=2), got 2"]),
    "local rank that is no number": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, ["must set LOCAL_RANK to a whole number, got ''"]
    ),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR", "start with torchrun"]),
    "no port": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, ["MASTER_PORT", "torchrun"]),
    "port that is no number": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, ["MASTER_PORT"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAUNCHERS)
def test_bad_launcher(case: str, program: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    variables, fragments = LAUNCHERS[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = program.run("comm.timeout_s=2")
    errors = capsys.readouterr().err
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith("fedsim")
    assert "ConfigError: " in line
    for fragment in fragments:
        assert fragment in line
    assert not program.run_folder.exists()


def test_nobody_at_the_address(program: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """No mistake of the user's, as far as one can tell: rank 0 or its node may have failed."""
    where = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    assert program.run("comm.join_timeout_s=2") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "LostRankError: the 2 processes must find each other at MASTER_ADDR=127.0.0.1 MASTER_PORT=1: rank 1"
        in line
    )
    assert "could not reach it within 2 s" in line
    assert "check that rank 0 has started" in line


HUGE_RATE = ["training.optimizer.lr=1e30", "training.max_grad_norm=null", "training.optimizer.name=sgd"]


def test_loss_that_is_not_finite(program: Any, capsys: Any) -> None:
    code = program.run(*HUGE_RATE)
    line = one_line(code, capsys.readouterr().err)
    assert "TrainingError: the loss of client" in line
    assert "must stay finite, got nan" in line
    assert "lower training.optimizer.lr" in line
    record = json.loads((program.run_folder / "run.json").read_text())
    assert record["status"] == "failed"
    assert "must stay finite" in record["reason"]
    names = {path.name for path in program.run_folder.iterdir()}
    assert "adapter" not in names
    assert not any(name.startswith(".") for name in names)
    assert program.run() == 0  # nothing was recorded, so the mended command takes the folder over


def test_disk_that_fills_up(program: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.server import checkpoint

    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "replace_folder", no_space)
        code = program.run()
    line = one_line(code, capsys.readouterr().err)
    assert "No space left on device" in line
    assert "checkpoint" in line
    assert json.loads((program.run_folder / "run.json").read_text())["status"] == "failed"
    assert program.run() == 0


def test_interrupt(program: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedsim.simulation.rounds.run_round", interrupt)
        assert program.run() == 130
    assert (
        capsys.readouterr().err == "fedsim: interrupted; the same command resumes from the last checkpoint\n"
    )
    record = json.loads((program.run_folder / "run.json").read_text())
    assert (record["status"], record["reason"]) == ("failed", "KeyboardInterrupt: interrupted by the user")


def damaged_cache(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(program.folder / "cache"))
    assert program.run("--dry-run") == 0
    for file in program.folder.glob("cache/tokens/*/facts.json"):
        file.write_text("{}")


def own_folder(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program.run_folder.mkdir(parents=True)
    (program.run_folder / "notes.txt").write_text("mine")


def nothing(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pass


ON_TWO_RANKS: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], None], list[str], list[str]]] = {
    "configuration": (nothing, ["cohort.size=50"], ["ConfigError: cohort.size must be in"]),
    "data": (nothing, ["data.text_field=body"], ["preparing the data failed on 1 of 2 ranks", "data.text_field"]),
    "model": (nothing, ["lora.target_modules=[nope]"], ["lora.target_modules: 'nope' is no linear module"]),
    "run folder": (own_folder, [], ["opening the run folder failed on 1 of 2 ranks", "holds notes.txt"]),
    "loss": (nothing, HUGE_RATE, ["local training, round 0 failed on", "must stay finite", "lower training"]),
    "cache": (damaged_cache, [], ["is damaged (facts.json changed or missing)", "delete that folder"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ON_TWO_RANKS)
def test_every_rank_says_so(case: str, program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, arguments, fragments = ON_TWO_RANKS[case]
    prepare(program, monkeypatch)
    for rank, (code, errors) in enumerate(program.start_ranks(2, *arguments)):
        assert code == 2, errors
        assert "Traceback" not in errors
        told = [line for line in errors.splitlines() if "INFO" not in line]
        assert len(told) == 1, errors
        assert told[0].startswith(f"fedsim [rank {rank}]: ")
        for fragment in fragments:
            assert fragment in told[0]
    if case == "loss":
        assert json.loads((program.run_folder / "run.json").read_text())["status"] == "failed"


def test_damaged_embedded_base(program: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.models.embedded import embedded_base_folder

    monkeypatch.setattr("fedsim.models.base.embedded_base_folder", lambda: embedded_base_folder(steps=1))
    weights = embedded_base_folder(steps=1) / "model.safetensors"
    whole = weights.read_bytes()
    keep_half(weights)
    code = program.run("model.name_or_path=embedded")
    weights.write_bytes(whole)  # other tests share this cache
    line = one_line(code, capsys.readouterr().err)
    assert "CacheError: the cache entry" in line
    assert "is damaged (model.safetensors changed or missing); delete that folder" in line
    assert not program.run_folder.exists()
