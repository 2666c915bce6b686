import logging
import os
import subprocess
import sys

import pytest

from fedsim.config.schema import Config
from fedsim.stopping import EXIT_PREEMPTED
from fedsim.tracking.metrics import CLIENT_COLUMNS, ClientTable
from fedsim.tracking.run_folder import open_run_folder
from fedsim.tracking.wandb_run import MAX_TABLE_ROWS, NoTracker, build_tracker

ROW = dict.fromkeys(CLIENT_COLUMNS, 1) | {"train_loss_mean": 4.5, "test_loss_after": None}


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


@pytest.fixture
def folder(tmp_path):
    with open_run_folder(tmp_path / "run", {"a": 1}, "a: 1\n", []) as opened:
        yield opened


def config(mode, **more):
    return Config.model_validate({"tracking": {"wandb": {"mode": mode, "tags": ("t",), **more}}})


def use(tracker, folder):
    """What a run does with its tracker."""
    table = ClientTable(folder.path / "clients.parquet")
    table.append_rows([ROW, ROW])
    adapter = folder.path / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text("{}")
    tracker.log_round({"round_index": 0, "test/loss": 4.5, "fairness/test_loss_variance": None})
    tracker.log_round({"round_index": 1, "test/loss": 4.4})
    tracker.log_clients(table)
    tracker.log_adapter(adapter)
    tracker.finish(0)


def offline_runs(folder):
    return sorted(path.name for path in (folder.path / "wandb").glob("offline-run-*"))


def test_offline_run_is_recorded_inside_the_folder_and_continued(folder, capfd):
    import wandb

    before = dict(os.environ)
    home = {
        path: path.exists()
        for path in (folder.path.home() / ".local/share/wandb", folder.path.home() / ".cache/wandb")
    }
    use(build_tracker(config("offline"), folder, {"lora": {"rank": 2}}), folder)
    wandb.teardown()
    use(build_tracker(config("offline"), folder, {"lora": {"rank": 2}}), folder)
    wandb.teardown()

    run_id = (folder.path / "wandb" / "run_id.txt").read_text().strip()
    runs = offline_runs(folder)
    assert len(set(runs)) >= 1
    assert all(run_id in name for name in runs)
    recorded = b"".join(
        path.read_bytes() for path in (folder.path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    )
    for text in (b"test/loss", b"round_index", b"clients", b"adapter_config.json", b"quickstart"):
        assert text in recorded
    assert list((folder.path / "wandb").glob("offline-run-*/files/media/table/clients*.json"))
    assert list((folder.path / "wandb" / "data").glob("artifacts/staging/*"))
    assert {path: path.exists() for path in home} == home
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")


def test_a_preempted_run_goes_on_under_its_id(folder, caplog):
    import wandb

    with caplog.at_level(logging.WARNING, logger="fedsim"):
        for round_index, code in ((0, EXIT_PREEMPTED), (1, 0)):
            tracker = build_tracker(config("offline"), folder, {})
            tracker.log_round({"round_index": round_index, "test/loss": 4.5})
            tracker.finish(code)
            wandb.teardown()
    run_id = (folder.path / "wandb" / "run_id.txt").read_text().strip()
    assert not caplog.records
    assert all(run_id in name for name in offline_runs(folder))


def test_disabled_never_imports_wandb(folder):
    assert isinstance(build_tracker(config("disabled"), folder, {}), NoTracker)
    use(NoTracker(), folder)
    code = "import sys, fedsim.tracking.wandb_run; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_online_without_a_login_is_recorded_offline(folder, caplog):
    import wandb

    with caplog.at_level(logging.WARNING, logger="fedsim"):
        use(build_tracker(config("online"), folder, {}), folder)
    wandb.teardown()
    (message,) = [one.getMessage() for one in caplog.records if one.name.startswith("fedsim")]
    assert "there is no login" in message
    assert f"wandb sync {folder.path}/wandb/offline-run-*" in message
    assert offline_runs(folder)


def test_online_without_a_network_is_recorded_offline(folder, caplog, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of nobody
    monkeypatch.setattr("fedsim.tracking.wandb_run.INIT_TIMEOUT_S", 1.0)
    wandb.teardown()
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        use(build_tracker(config("online"), folder, {}), folder)
    wandb.teardown()
    (message,) = [one.getMessage() for one in caplog.records if one.name.startswith("fedsim")]
    assert "W&B cannot be used (" in message
    assert offline_runs(folder)


@pytest.mark.parametrize("login", ["key", "netrc", "other host"])
def test_a_login_is_found_without_asking(folder, monkeypatch, tmp_path, login):
    import wandb

    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    else:
        host = {"netrc": "api.wandb.ai", "other host": "example.org"}[login]
        (tmp_path / "netrc").write_text(f"machine {host} login user password {'0123456789' * 4}\n")
        (tmp_path / "netrc").chmod(0o600)
    modes = []
    monkeypatch.setattr(
        "wandb.init", lambda **options: modes.append(options["mode"]) or Broken(("define_metric",))
    )
    wandb.teardown()
    build_tracker(config("online"), folder, {})
    wandb.teardown()
    assert modes == ["offline" if login == "other host" else "online"]
    assert not (tmp_path / "wandb-config").exists()


def test_key_of_no_known_form_is_recorded_offline(folder, monkeypatch, caplog):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "too short")
    wandb.teardown()
    use(build_tracker(config("online"), folder, {}), folder)
    wandb.teardown()
    assert "WANDB_API_KEY invalid" in caplog.text
    assert offline_runs(folder)


class Broken:
    """A W&B run in which everything fails."""

    def __init__(self, working=()):
        self.working = working
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append(name)
            if name not in self.working:
                raise ConnectionError("service\nis gone")

        return call


@pytest.mark.parametrize("working", [(), ("define_metric",), ("define_metric", "log")])
def test_broken_wandb_is_said_once_and_harms_nobody(folder, monkeypatch, caplog, working):
    broken = Broken(working)
    before = dict(os.environ)
    monkeypatch.setattr("wandb.init", lambda **options: broken)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        use(build_tracker(config("offline"), folder, {}), folder)
    (message,) = [one.getMessage() for one in caplog.records if one.name.startswith("fedsim")]
    assert "off for the rest of this run" in message
    assert "\n" not in message
    assert [name for name in broken.calls if name not in working][1:] == []
    assert set(os.environ) - set(before) - {"WANDB_SERVICE"} == set()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("service died"), ImportError("x")]
)
def test_wandb_that_cannot_start_harms_nobody(folder, monkeypatch, caplog, error):
    def fail(**options):
        raise error

    monkeypatch.setattr("wandb.init", fail)
    use(build_tracker(config("offline"), folder, {}), folder)
    assert "W&B failed to start" in caplog.text


def test_interrupt_passes(folder, monkeypatch):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("wandb.init", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_tracker(config("offline"), folder, {})


def test_wandb_folder_that_cannot_be_made_harms_nobody(folder, caplog):
    (folder.path / "wandb").write_text("a file in the way")
    use(build_tracker(config("offline"), folder, {}), folder)
    assert "W&B failed to start" in caplog.text


def test_run_is_described_by_the_configuration(folder, monkeypatch):
    seen = {}

    def init(**options):
        seen.update(options)
        return Broken(("define_metric", "log_artifact", "finish"))

    monkeypatch.setattr("wandb.init", init)
    chosen = config("offline", project="p", entity="e", group="g", log_adapter=False)
    tracker = build_tracker(chosen, folder, {"lora": {"rank": 2}})
    tracker.log_adapter(folder.path / "no such folder")
    tracker.finish(0)
    settings = seen.pop("settings")
    assert seen == {
        "mode": "offline",
        "dir": folder.path,
        "id": (folder.path / "wandb" / "run_id.txt").read_text().strip(),
        "resume": "allow",
        "project": "p",
        "entity": "e",
        "group": "g",
        "tags": ["t"],
        "name": "quickstart",
        "config": {"lora": {"rank": 2}},
    }
    assert (settings.silent, settings.console) == (True, "off")
    assert 0 < settings.init_timeout < 60


def test_client_table_is_capped(folder, monkeypatch):
    logged = []
    run = Broken(("define_metric", "finish"))
    run.log = logged.append
    monkeypatch.setattr("wandb.init", lambda **options: run)
    table = ClientTable(folder.path / "clients.parquet")
    table.append_rows([ROW | {"client_id": index} for index in range(MAX_TABLE_ROWS + 3)])
    tracker = build_tracker(config("offline"), folder, {})
    tracker.log_clients(table)
    tracker.finish(0)
    rows = logged[0]["clients"].data
    assert len(rows) == MAX_TABLE_ROWS
    assert rows[-1][1] == MAX_TABLE_ROWS + 2
