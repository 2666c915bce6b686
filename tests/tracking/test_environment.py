import json
import subprocess
import sys

import numpy
import pytest

import fedsim
from fedsim.tracking.environment import describe_environment


def test_environment_is_json_and_says_what_ran():
    described = json.loads(json.dumps(describe_environment(4, ["fedsim", "lora.rank=4"]), allow_nan=False))
    assert described["world_size"] == 4
    assert described["command_line"] == ["fedsim", "lora.rank=4"]
    assert described["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["versions"]["fedsim"] == fedsim.__version__
    assert described["versions"]["numpy"] == numpy.__version__
    assert described["hardware"]["cpu_cores"] >= 1
    assert described["hardware"]["memory_bytes"] > 2**28


@pytest.fixture
def package_folder(tmp_path, monkeypatch):
    package = tmp_path / "fedsim"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(fedsim, "__file__", str(package / "__init__.py"))
    return package


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_commit_and_dirty_flag_of_a_checkout(package_folder):
    root = package_folder.parent
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    commit = git(root, "rev-parse", "HEAD")
    assert describe_environment(1, [])["source"] == {"commit": commit, "dirty": False}
    (root / "new.py").touch()
    assert describe_environment(1, [])["source"] == {"commit": commit, "dirty": True}


def test_repository_that_only_surrounds_an_installed_fedsim_is_not_its_source(package_folder):
    git(package_folder.parent, "init", "-q")
    assert describe_environment(1, [])["source"] == {"commit": None, "dirty": None}


@pytest.mark.parametrize("failure", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_without_git_there_is_no_commit(monkeypatch, failure):
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr("fedsim.tracking.environment.subprocess.run", fail)
    assert describe_environment(1, [])["source"] == {"commit": None, "dirty": None}
