"""Files that somebody else wrote: no code in them runs, and no name in them leads elsewhere."""

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedsim.cache import CacheError, cached_folder
from fedsim.errors import AdapterError, ModelError
from fedsim.lora.peft_format import load_peft_adapter
from fedsim.models.hub import SAFETENSORS_FILES, locate

ROOT = Path(__file__).resolve().parents[2]


LOADERS = ("pickle", "torch", "joblib", "marshal")
RUNNERS = (
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pickle.Unpickler",
    "shelve.open",
)


def unpickling(tree: ast.Module) -> Iterator[str]:
    """Calls that run what a file says."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        room, _, last = name.partition(".")
        is_loader = room in LOADERS and last in ("load", "loads")
        if is_loader and named.get("weights_only") != "True":
            yield name
        if name in RUNNERS:
            yield name
        if named.get("allow_pickle") == "True":  # numpy's default is not to
            yield name


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "fedsim").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]),
    ids=lambda path: path.stem,
)
def test_nothing_is_unpickled(path: Path) -> None:
    assert list(unpickling(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.loads(b)",
        "np.load(f, allow_pickle=True)",
        "eval(x)",
        "yaml.load(f)",
    ],
)
def test_what_unpickles_is_found(source: str) -> None:
    assert list(unpickling(ast.parse(source))) != []


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_in_place_of_tensors_does_not_run(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In a checkpoint, a client's state, a corpus, an adapter, and weights in PyTorch's own format."""
    mark = program.folder / "owned"
    bomb = pickle.dumps(Bomb(mark))
    assert program.run("strategy.name=fedsa", "run.rounds=1") == 0
    for pattern in ("checkpoints/*/state.safetensors", "clients/*/*.safetensors", "clients.parquet"):
        for path in program.run_folder.glob(pattern):
            path.write_bytes(bomb)
    assert program.run("strategy.name=fedsa", "run.rounds=2") == 2
    corpus = program.folder / "corpus.parquet"
    corpus.write_bytes(bomb)
    assert program.run(f"data.source={corpus}", "run.name=other") == 2
    adapter = next(program.run_folder.glob("adapter*/**/adapter_model.safetensors"))
    adapter.write_bytes(bomb)
    with pytest.raises(AdapterError, match="not a readable PEFT adapter"):
        load_peft_adapter(adapter.parent)
    model = program.folder / "model"
    shutil.copytree(program.settings["model.name_or_path"], model)
    (model / "model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, model / "pytorch_model.bin")
    for allowed in ("false", "true"):
        capsys.readouterr()
        assert (
            program.run(f"model.name_or_path={model}", f"model.allow_pickle={allowed}", "run.name=other") == 2
        )
        assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


PEFT: dict[str, object] = {
    "a list": [],
    "alpha that is a text": {"peft_type": "LORA", "r": 2, "lora_alpha": "16"},
    "alphas that are texts": {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 16,
        "alpha_pattern": {"q_proj": "x"},
    },
    "another method": {"peft_type": "IA3"},
}


@pytest.mark.parametrize("case", PEFT)
def test_an_adapter_that_is_none(case: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT[case]))
    factors = {f"base_model.model.../../owned.q_proj.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError):
        load_peft_adapter(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_word(folder: Path) -> None:
    (folder / "word.txt").write_text("mine")


def test_a_cache_entry_that_is_a_link(cache: Path, tmp_path: Path) -> None:
    """Elsewhere, with a manifest that fits what lies there; so is a file of an entry, and a link into nothing."""
    entry = cached_folder("words", {"a": 1}, write_word)
    elsewhere = tmp_path / "elsewhere"
    entry.rename(elsewhere)
    for target in (elsewhere, tmp_path / "nothing"):
        entry.symlink_to(target)
        with pytest.raises(CacheError, match=r"is a symbolic link; delete it and start again"):
            cached_folder("words", {"a": 1}, write_word)
        entry.unlink()
    elsewhere.rename(entry)
    assert cached_folder("words", {"a": 1}, write_word) == entry
    (tmp_path / "word.txt").write_text("mine")
    (entry / "word.txt").unlink()
    (entry / "word.txt").symlink_to(tmp_path / "word.txt")
    with pytest.raises(CacheError, match=r"word\.txt is a symbolic link"):
        cached_folder("words", {"a": 1}, write_word)


def test_the_cache_itself_may_be_a_link(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "words").mkdir(parents=True)
    cache.mkdir()
    (cache / "words").symlink_to(tmp_path / "disk" / "words")
    assert (cached_folder("words", {"a": 1}, write_word) / "word.txt").read_text() == "mine"


def test_a_cache_entry_in_the_place_of_another(cache: Path) -> None:
    one, other = (cached_folder("words", {"a": index}, write_word) for index in (1, 2))
    shutil.rmtree(one)
    other.rename(one)
    with pytest.raises(CacheError, match=r"is damaged \(manifest\.json changed or missing\)"):
        cached_folder("words", {"a": 1}, write_word)


def test_a_manifest_cannot_name_a_file_elsewhere(cache: Path) -> None:
    entry = cached_folder("words", {"a": 1}, write_word)
    (entry.parent / "secret").write_text("x")
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["files"]["../secret"] = "0"
    (entry / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"is damaged \(manifest\.json changed or missing\)"):
        cached_folder("words", {"a": 1}, write_word)


def test_a_folder_goes_before_a_repository_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "fedsim")
    (tmp_path / "facebook" / "opt-125m").mkdir(parents=True)
    assert locate("model.name_or_path", "./facebook/opt-125m", None, SAFETENSORS_FILES).is_dir()
    assert "goes before" not in caplog.text
    assert locate("model.name_or_path", "facebook/opt-125m", None, SAFETENSORS_FILES).is_dir()
    assert (
        f"is {tmp_path}/facebook/opt-125m on this machine, which goes before a Hugging Face repository"
        in caplog.text
    )
    for name in ("./facebook/opt-350m", "~nobody-by-this-name/opt", "x" * 5000 + "/y/z", "~/a/b/c"):
        with pytest.raises(ModelError, match="must be a Hugging Face model id or an existing local folder"):
            locate("model.name_or_path", name, None, SAFETENSORS_FILES)


@pytest.mark.parametrize(
    "source", ["~nobody-by-this-name/a.jsonl", f"./{'x' * 300}", "./" + "x/" * 3000, "/", "/dev/null"]
)
def test_a_source_that_is_no_corpus(source: str, program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run(f"data.source={source}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "DataError: data.source=" in line
