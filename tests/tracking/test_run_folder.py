import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedsim.errors import RunFolderError
from fedsim.tracking.run_folder import check_new_folder, open_run_folder

TREE = {
    "run": {"rounds": 8, "name": "a"},
    "lora": {"rank": 2, "target_modules": ("q_proj", "v_proj"), "lr": 1e-8},
}

HOLD = """
import sys
from pathlib import Path
from fedsim.tracking.run_folder import open_run_folder
with open_run_folder(Path(sys.argv[1]), {"a": 1}, "a: 1\\n", []):
    print("held", flush=True)
    sys.stdin.read()
"""


def as_yaml(tree):
    return yaml.safe_dump(json.loads(json.dumps(tree)))


def open_folder(path, tree=TREE, safe_keys=("run.rounds", "tracking")):
    return open_run_folder(path, tree, as_yaml(tree), safe_keys)


def changed(**leaves):
    tree = {node: dict(values) for node, values in TREE.items()}
    for key, value in leaves.items():
        node, name = key.split("__")
        tree.setdefault(node, {})[name] = value
    return tree


def contents(path):
    return {entry.name: entry.read_bytes() for entry in path.iterdir() if entry.is_file()}


def add_results(path):
    (path / "metrics.jsonl").write_text('{"round_index": 0}\n')


def test_new_folder_holds_the_configuration(tmp_path):
    with open_folder(tmp_path / "runs" / "a") as folder:
        assert folder.path == tmp_path / "runs" / "a"
        assert folder.status() is None
        assert (folder.path / "config.yaml").read_text() == as_yaml(TREE)
        owner = json.loads((folder.path / "run.owner.json").read_text())
        assert set(owner) == {"host", "pid", "since"}
    assert not (folder.path / "run.owner.json").exists()
    folder.close()


def test_same_configuration_enters_again(tmp_path):
    open_folder(tmp_path).close()
    open_folder(tmp_path).close()


def test_safe_keys_may_change_and_the_new_ones_are_written(tmp_path):
    open_folder(tmp_path).close()
    tree = changed(run__rounds=12, tracking__progress="plain")
    open_folder(tmp_path, tree).close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["run"]["rounds"] == 12


def test_other_configuration_is_refused_and_nothing_is_touched(tmp_path):
    with open_folder(tmp_path) as folder:
        folder.start({})
        folder.finish("finished")
    add_results(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RunFolderError) as caught:
        open_folder(
            tmp_path, changed(run__rounds=12, lora__rank=4, lora__target_modules=["k_proj"], data__seed=1)
        )
    message = str(caught.value)
    assert "lora.rank: 2 -> 4" in message
    assert "lora.target_modules: ['q_proj', 'v_proj'] -> ['k_proj']" in message
    assert "data.seed: not set -> 1" in message
    assert "run.rounds" not in message
    assert "another run.name, or delete the folder" in message
    assert "\n" not in message
    assert contents(tmp_path) == before
    open_folder(tmp_path).close()  # the lock was given back


def test_folder_with_results_keeps_its_configuration_until_the_start(tmp_path):
    open_folder(tmp_path).close()
    add_results(tmp_path)
    tree = changed(run__rounds=12)
    with open_folder(tmp_path, tree) as folder:
        assert (tmp_path / "config.yaml").read_text() == as_yaml(TREE)
        (tmp_path / ".metrics.jsonl-0123abcd").write_text("of a process that was killed")
        folder.start({})
        assert (tmp_path / "config.yaml").read_text() == as_yaml(tree)
        assert not (tmp_path / ".metrics.jsonl-0123abcd").exists()


def test_folder_without_results_is_taken_over(tmp_path):
    open_folder(tmp_path).close()
    open_folder(tmp_path, changed(lora__rank=4)).close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lora"]["rank"] == 4


def test_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(
        RunFolderError, match=r"holds thesis\.tex but no config\.yaml; choose another run\.name"
    ):
        open_folder(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_start_that_was_cut_off_is_taken_up(tmp_path):
    for name in ("run.lock", "run.owner.json", ".config.yaml-12345678"):
        (tmp_path / name).touch()
    open_folder(tmp_path).close()


@pytest.mark.parametrize("text", ["{", "- a\n", "", "a: \x00"])
def test_damaged_configuration_is_one_line(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    add_results(tmp_path)
    with pytest.raises(RunFolderError, match=r"config\.yaml must .*delete the run folder") as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_file_in_the_way_names_the_key(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(
        RunFolderError, match=r"run\.output_dir must be writable, and the run folder .*runs/a is not"
    ):
        open_folder(tmp_path / "runs" / "a")
    with pytest.raises(RunFolderError, match=r"run\.output_dir must be writable"):
        open_folder(tmp_path / "runs")


def test_check_of_a_new_folder_writes_nothing(tmp_path):
    check_new_folder(tmp_path / "runs" / "a")
    check_new_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_check_of_a_new_folder_refuses_what_opening_would(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    for name in ("runs", "runs/a"):
        with pytest.raises(RunFolderError, match=r"run\.output_dir must be writable.*runs is a file"):
            check_new_folder(tmp_path / name)
    with pytest.raises(RunFolderError, match=r"holds runs but no config\.yaml"):
        check_new_folder(tmp_path)
    # nobody makes folders there, not even root, whom no permission stops
    with pytest.raises(RunFolderError, match=r"run\.output_dir must be writable.*/proc/runs"):
        check_new_folder(Path("/proc/runs"))


def test_name_that_no_file_system_takes_is_one_line(tmp_path):
    for attempt in (lambda path: check_new_folder(path), lambda path: open_folder(path)):
        with pytest.raises(RunFolderError, match=r"run\.output_dir must be writable.*File name too long"):
            attempt(tmp_path / ("x" * 300))


def test_folder_that_cannot_be_locked_names_the_key(tmp_path, monkeypatch):
    def refuse(lock, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(RunFolderError, match=r"run\.output_dir must be writable.*\(Permission denied\)"):
        open_folder(tmp_path)


def test_second_process_is_refused_and_told_who_holds_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            RunFolderError, match=rf"in use by another process \(host \S+, pid {holder.pid}, since"
        ):
            open_run_folder(tmp_path, {"a": 1}, "a: 1\n", [])
        holder.stdin.close()
    assert holder.returncode == 0
    open_run_folder(tmp_path, {"a": 1}, "a: 1\n", []).close()


def test_killed_process_leaves_the_folder_free(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    open_run_folder(tmp_path, {"a": 1}, "a: 1\n", []).close()


def test_run_file_keeps_the_history(tmp_path):
    with open_folder(tmp_path) as folder:
        folder.start({"world_size": 2})
        assert folder.status() == "running"
        folder.finish("preempted", "SIGTERM")
        assert folder.status() == "preempted"
    with open_folder(tmp_path) as folder:
        folder.start({"world_size": 4})  # and then it vanishes
    with open_folder(tmp_path) as folder:
        assert folder.status() == "running"
        folder.start({"world_size": 1})
        folder.finish("finished")
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["status"], run["reason"], run["world_size"]) == ("finished", None, 1)
    assert run["config"]["lora"]["rank"] == 2
    assert run["start_time"] <= run["end_time"]
    first, second = run["history"]
    assert (first["status"], first["reason"], first["world_size"]) == ("preempted", "SIGTERM", 2)
    assert (second["status"], second["world_size"], second["end_time"]) == ("failed", 4, None)
    assert "killed" in second["reason"]


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_damaged_run_file_is_one_line(tmp_path, text):
    with open_folder(tmp_path) as folder:
        (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(RunFolderError, match=r"run\.json must .*delete the file"):
            folder.status()
