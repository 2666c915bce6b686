"""Files, overrides and the command line become a configuration, or one clear line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.config.loader import (
    SAFE_KEYS,
    config_hash,
    differences,
    load_config,
    parse_command_line,
    to_tree,
    to_yaml,
)
from fedsim.config.schema import Config
from fedsim.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_given_is_the_defaults() -> None:
    assert load_config() == Config()


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "lora: {rank: 4, lora_alpha: 32}\nrun: {rounds: 3}")

    config = load_config(path, ["lora.rank=8", "data.partition.dirichlet_alpha=0.1"])

    assert (config.lora.rank, config.lora.lora_alpha, config.run.rounds) == (8, 32.0, 3)
    assert config.data.partition.dirichlet_alpha == 0.1
    assert config.lora.dropout == Config().lora.dropout


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lora.target_modules=[q_proj,k_proj]", "target_modules", ("q_proj", "k_proj")),
        ("lora.target_modules=['q_proj', \"k_proj\"]", "target_modules", ("q_proj", "k_proj")),
        ("lora={target_modules: [fc1], rank: 3}", "target_modules", ("fc1",)),
        ("lora.lora_alpha=32", "lora_alpha", 32.0),
        ("lora.lora_alpha=1e1", "lora_alpha", 10.0),
        ("lora.use_rslora=true", "use_rslora", True),
        ("lora.rank=1_000", "rank", 1000),
        ("lora.dropout= 0.5 ", "dropout", 0.5),
    ],
)
def test_an_override_is_yaml(override: str, key: str, value: object) -> None:
    assert getattr(load_config(None, [override]).lora, key) == value


@pytest.mark.parametrize("word", ["model.dropout=off", "evaluation.client_test=off", "tracking.progress=off"])
def test_off_is_a_word_and_not_false(word: str, tmp_path: Path) -> None:
    key, _, value = word.partition("=")
    section, _, leaf = key.rpartition(".")
    from_file = load_config(write(tmp_path, f"{section}:\n  {leaf}: {value}\n"))

    assert getattr(getattr(load_config(None, [word]), section), leaf) == "off"
    assert getattr(getattr(from_file, section), leaf) == "off"


def test_a_fixed_cohort_needs_no_null_for_the_default_size() -> None:
    assert load_config(None, ["cohort.client_ids=[3,1]"]).cohort.client_ids == (3, 1)
    assert load_config(None, ["cohort.fraction=1"]).cohort.size is None
    assert load_config(None, ["training.local_steps=5"]).training.local_epochs is None


def test_interpolations_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_TEST_FOLDER", "/scratch/me")
    text = (
        "run: {output_dir: '${oc.env:FEDSIM_TEST_FOLDER}/runs', name: 'r${lora.rank}-s${run.seed}'}\n"
        "lora: {rank: 4, lora_alpha: '${lora.rank}'}\n"
    )
    config = load_config(write(tmp_path, text), ["run.seed=7"])

    assert (config.run.output_dir, config.run.name) == ("/scratch/me/runs", "r4-s7")
    assert config.lora.lora_alpha == 4.0


def test_an_interpolation_of_a_default_does_not_count_as_setting_it() -> None:
    config = load_config(None, ["cohort.fraction=0.5", "tracking.wandb.group=n${data.partition.num_clients}"])

    assert (config.cohort.size, config.tracking.wandb.group) == (None, "n20")


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        ("opt-1.3b.yaml", "opt-1.3b"),
        ("my run (2).yml", "my-run-2"),
        ("_draft.yaml", "draft"),
        ("a" * 150 + ".yaml", "a" * 120),
        ("no_suffix", "no_suffix"),
    ],
)
def test_the_run_is_named_after_its_file(file_name: str, name: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "", file_name)).run.name == name


def test_a_name_that_is_set_stands(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "run: {name: mine}")).run.name == "mine"
    assert load_config(write(tmp_path, ""), ["run.name=yours"]).run.name == "yours"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n", "\ufeffrun: {rounds: 8}\n"])
def test_an_empty_file_is_the_defaults(text: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, text)) == load_config(None, ["run.name=a"])


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    text = "data:\n  partition: &p {num_clients: 9}\nlora: {<<: {rank: 3}, lora_alpha: 4}\n"
    config = load_config(write(tmp_path, text))

    assert (config.data.partition.num_clients, config.lora.rank, config.lora.lora_alpha) == (9, 3, 4.0)


def test_options_stand_anywhere(tmp_path: Path) -> None:
    path = str(write(tmp_path, "lora: {rank: 4}"))
    arguments = ["run.rounds=2", "--dry-run", path, "run.seed=1"]
    for _ in arguments:
        arguments = [*arguments[1:], arguments[0]]
        command = parse_command_line(arguments)

        assert command.dry_run
        assert command.config_path == Path(path)
        config = command.config
        assert (config.lora.rank, config.run.rounds, config.run.seed, config.run.name) == (4, 2, 1, "a")


def test_no_argument_is_the_quick_start() -> None:
    command = parse_command_line([])

    assert (command.config, command.dry_run, command.config_path) == (Config(), False, None)


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "alpha=0.1"
    folder.mkdir()

    assert parse_command_line([str(write(folder, "lora: {rank: 5}"))]).config.lora.rank == 5


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(["--version"])

    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("fedsim 0.")


def test_the_tree_is_written_in_its_order_and_read_back(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "training.optimizer.eps=1e-08",
            "training.max_grad_norm=1e+20",
            "tracking.wandb.tags=['off', '1e5', '010', 'null', 'a: b', '#', ' x ', \"two\\nlines\"]",
            "tracking.wandb.group='\\${run.name}'",
            "data.source='~/texts/*.jsonl'",
        ],
    )

    text = to_yaml(config)

    assert config.tracking.wandb.group == "${run.name}"
    assert load_config(write(tmp_path, text)) == config
    assert [line[:-1] for line in text.splitlines() if not line.startswith(" ")] == list(to_tree(config))
    assert "  target_modules: [q_proj, v_proj]\n" in text


def test_other_yaml_readers_agree(tmp_path: Path) -> None:
    import yaml
    from omegaconf import OmegaConf

    tags = "tracking.wandb.tags=['off', '1e5', '010', 'null', '1:30', '=', '1_0', '0x1f', '.5', '+.inf']"
    text = to_yaml(load_config(None, [tags, "model.dropout=off"]))
    tree = to_tree(load_config(None, [tags, "model.dropout=off"]))

    assert yaml.safe_load(text) == tree
    assert OmegaConf.to_container(OmegaConf.load(write(tmp_path, text))) == tree


def test_differences_name_key_old_and_new() -> None:
    new = load_config(
        None, ["lora.rank=4", "run.rounds=9", "tracking.wandb.mode=disabled", "cohort.fraction=0.5"]
    )

    assert differences(Config(), new) == [
        "run.rounds: 8 -> 9",
        "lora.rank: 2 -> 4",
        "cohort.size: 8 -> null",
        "cohort.fraction: null -> 0.5",
        "tracking.wandb.mode: 'offline' -> 'disabled'",
    ]
    assert [text.partition(":")[0] for text in differences(Config(), new, SAFE_KEYS)] == [
        "lora.rank",
        "cohort.size",
        "cohort.fraction",
    ]
    assert differences(new, new) == []


def test_safe_keys_exist() -> None:
    for pattern in SAFE_KEYS:
        node: object = Config()
        for part in pattern.removesuffix(".*").split("."):
            node = getattr(node, part)


def test_the_hash_sees_every_value_and_nothing_else() -> None:
    same = load_config(None, ["lora.lora_alpha=16", "lora.target_modules=[q_proj, v_proj]"])

    assert config_hash(same) == config_hash(Config())
    assert config_hash(load_config(None, ["lora.rank=3"])) != config_hash(Config())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_shipped_file_loads(path: Path) -> None:
    load_config(path)


def test_the_quick_start_file_spells_out_the_defaults() -> None:
    from fedsim.config.keys import all_keys, flatten
    from fedsim.config.yaml_text import read_yaml

    path = ROOT / "configs" / "quickstart.yaml"
    written = flatten(read_yaml(path.read_text(encoding="utf-8"), path.name))

    assert differences(load_config(path), Config()) == [], "configs/quickstart.yaml -> schema.py"
    assert list(written) == list(all_keys()), (
        "configs/quickstart.yaml lists every key in the order of the tree"
    )


def test_the_room_is_quick_to_import() -> None:
    code = (
        "import sys, fedsim.config.loader\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'wandb', 'rich', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


BAD_OVERRIDES = [
    # unknown keys
    (
        "lora.tiers=[{rank: 1}, {rnk: 2, rank: 1}]",
        "unknown key lora.tiers[1].rnk; an item of lora.tiers has share, rank",
    ),
    (
        "lora.tiers=[{rank: 1, module_ranks: {q_proj: x}}]",
        "lora.tiers[0].module_ranks.q_proj must be an integer > 0, got 'x'",
    ),
    ("lora.lora_rnak=3", "unknown key lora.lora_rnak; did you mean 'lora.rank'?"),
    ("training.lr=1", "unknown key training.lr; did you mean 'training.optimizer.lr'?"),
    ("lr=1", "unknown key lr; did you mean 'training.optimizer.lr'?"),
    ("cohort.cohort_size=3", "unknown key cohort.cohort_size; did you mean 'cohort.size'?"),
    ("lora.alpha=3", "did you mean 'lora.lora_alpha'?"),
    ("learning_rate=3", "did you mean 'training.optimizer.lr'?"),
    ("num_clients=3", "did you mean 'data.partition.num_clients'?"),
    ("wandb.mode=offline", "did you mean 'tracking.wandb.mode'?"),
    ("model.name=x", "did you mean 'model.name_or_path'?"),
    ("Lora.Rank=3", "did you mean 'lora.rank'?"),
    ("zzz=1", "unknown key zzz; see --help for all keys"),
    ("lora={rnak: 3}", "unknown key lora.rnak; did you mean 'lora.rank'?"),
    ("lora.rank.x=3", "unknown key lora.rank.x; lora.rank is a single value (an integer > 0)"),
    # wrong types
    ("run.rounds='3'", "run.rounds must be an integer > 0, got '3' (a text; a number has no quotes)"),
    ("run.rounds=many", "run.rounds must be an integer > 0, got 'many'"),
    ("run.rounds=3.0", "run.rounds must be an integer > 0, got 3.0"),
    ("run.rounds=true", "run.rounds must be an integer > 0, got true"),
    ("run.rounds=null", "run.rounds must be an integer > 0, got null"),
    ("run.rounds=010", "run.rounds must be an integer > 0, got '010' (a text; a number has no quotes)"),
    ("run.rounds=[3]", "run.rounds must be an integer > 0, got [3]"),
    ("run.rounds={a: 3}", "run.rounds must be an integer > 0, got a section with a"),
    ("data.max_examples=all", "data.max_examples must be an integer > 0 or null, got 'all'"),
    ("lora.use_rslora=yes", "lora.use_rslora must be true or false, got 'yes'"),
    ("lora.use_rslora=1", "lora.use_rslora must be true or false, got 1"),
    ("lora.lora_alpha=true", "lora.lora_alpha must be a number > 0, got true"),
    (
        "data.text_field=3",
        "data.text_field must be a non-empty text, got 3; put it in quotes to make it a text",
    ),
    ("data.text_field=''", "data.text_field must be a non-empty text, got ''"),
    ("lora.target_modules=q_proj", "a non-empty list of non-empty texts, got 'q_proj'; write [q_proj]"),
    ("lora.target_modules=[q_proj,3]", "lora.target_modules[1] must be a non-empty text, got 3"),
    ("lora.target_modules=[]", "lora.target_modules must be a non-empty list of non-empty texts, got []"),
    ("cohort.client_ids=[0,-1]", "cohort.client_ids[1] must be an integer >= 0, got -1"),
    ("lora=3", "lora must be a section with keys such as lora.rank, got 3"),
    (
        "lora=null",
        "lora must be a section with keys such as lora.rank, got null; remove it or put keys below",
    ),
    (
        "training.optimizer=sgd",
        "training.optimizer must be a section with keys such as training.optimizer.name",
    ),
    ("run.name={a: b}", "run.name must be a text of 1 to 120 letters"),
    # wrong values
    ("run.rounds=0", "run.rounds must be an integer > 0, got 0"),
    ("run.seed=-1", "run.seed must be an integer in [0, 2**63), got -1"),
    ("run.threads_per_process=0", "run.threads_per_process must be an integer in [1, 1024], got 0"),
    ("run.device=gpu", "run.device must be one of auto|cpu|cuda, got 'gpu'"),
    ("strategy.name=fedavgg", "got 'fedavgg'; did you mean 'fedavg'?"),
    ("data.partition.dirichlet_alpha=-1", "data.partition.dirichlet_alpha must be a number > 0, got -1"),
    ("data.partition.num_clients=0", "data.partition.num_clients must be an integer > 0, got 0"),
    ("data.test_fraction=1", "data.test_fraction must be a number in (0, 1), got 1"),
    ("training.optimizer.lr=.nan", "training.optimizer.lr must be a finite number >= 0, got nan"),
    ("training.optimizer.lr=nan", "training.optimizer.lr must be a number >= 0, got 'nan'"),
    ("training.optimizer.lr=1e400", "training.optimizer.lr must be a finite number >= 0, got inf"),
    ("lora.lora_alpha=" + "9" * 400, "lora.lora_alpha must be a number > 0, got a huge integer"),
    ("run.name=a/b", "the first a letter or digit, got 'a/b'"),
    ("run.name=../x", "the first a letter or digit, got '../x'"),
    ('run.name="a\\nb"', "the first a letter or digit, got 'a\\nb'"),
    (
        "tracking.wandb.tags=[" + "t" * 65 + "]",
        "tracking.wandb.tags[0] must be a non-empty text of at most 64",
    ),
    (
        'data.source="a\\0b"',
        "data.source must be a text without null and surrogate characters, got 'a\\x00b'",
    ),
    ('data.source="\\ud800"', "data.source must be a text without null and surrogate characters"),
    # the form of an override
    ("run.name=", "run.name has no value in 'run.name='"),
    ("data.subset= ", "data.subset has no value in 'data.subset= '; write data.subset=null for null"),
    ("run.name=#3", "run.name has no value in 'run.name=#3', since '#' starts a comment; quote the value"),
    ("=3", "override '=3' must begin with a dotted key such as lora.rank, got ''"),
    ("lora..rank=3", "must begin with a dotted key"),
    ("+lora.rank=3", "must begin with a dotted key"),
    ("lora.rank =3", "must begin with a dotted key"),
    ("lora.target_modules[0]=x", "must begin with a dotted key"),
    ("lora.target_modules=[a", "must be YAML (line 1, column 3): expected ',' or ']'"),
    ("data.source=@x", "must be YAML (line 1, column 1): found character '@'"),
    ("run.rounds=" + "9" * 5000, "must not hold a number of thousands of digits"),
    ("run.rounds=" + "[" * 2000, "must be"),
    ("lora={rank: 1, rank: 2}", "must name a key once, got 'rank' in line 1 and again in line 1"),
    ("lora={1: 2}", "must have texts as keys, got '1' in line 1"),
    ("run.name=!!python/name:os.system", "must hold plain values only, got the tag"),
    ("run.output_dir=\udcff", "must be YAML text, but character 0 is U+DCFF"),
    # interpolations
    (
        "run.name=${nope}",
        "the interpolation in run.name cannot be resolved: Interpolation key 'nope' not found",
    ),
    ("run.name=${run.name}", "the interpolation in run.name cannot be resolved"),
    ("run.name=${oc.env:FEDSIM_NOT_SET}", "Environment variable 'FEDSIM_NOT_SET' not found"),
    ("run.name=${", "the interpolation in run.name cannot be resolved"),
    ("run.name=???", "run.name must be set, got '???'"),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES, ids=lambda text: text[:40])
def test_a_bad_override_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line([override])

    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 400


BAD_FILES = [
    ("a: [b", "must be YAML (line 1, column 6)"),
    ("lora:\n  rank: 3\n bad: 1\n", "must be YAML (line 3, column 2)"),
    (
        "lora:\n\trank: 3",
        "(line 2, column 1): found character '\\t' that cannot start any token; indent with spaces",
    ),
    ("lora:\n  rank: 3\n  rank: 4\n", "must name a key once, got 'rank' in line 2 and again in line 3"),
    ("hello", "must hold sections such as 'run:' at its top level, got 'hello'"),
    ("- lora\n- run\n", "must hold sections such as 'run:' at its top level, got ['lora', 'run']"),
    (
        "lora:\n",
        "lora must be a section with keys such as lora.rank, got null; remove it or put keys below it",
    ),
    ("lora.rank: 3", "key 'lora.rank' in a file must be nested"),
    ("optimizer: {lr: 1}", "unknown key optimizer; did you mean 'training.optimizer'?"),
    ("lora: {rank: {a: 1}}", "lora.rank must be an integer > 0, got a section with a"),
    ("1: 2", "must have texts as keys, got '1' in line 1"),
    ("? [a]\n: 2", "must have texts as keys, got 'a list or mapping' in line 1"),
    ("run: {name: 12}", "got 12; put it in quotes to make it a text"),
    ("a: !!python/object/apply:os.getcwd []", "must hold plain values only, got the tag"),
    ("a: &a [*a]", "must be nested at most 20 deep"),
    (
        "a0: &a0 [x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 9)),
        "must hold at most 10000 values",
    ),
    (
        "lora: {rank: 3}\n---\nrun: {rounds: 3}\n",
        "must be YAML (line 2, column 1): but found another document",
    ),
    ("lora: {rank: *x}", "found undefined alias 'x'"),
    ("run: {name: a\x01b}", "must be YAML text, but character 13 is U+0001"),
    ("lora:\n  rank: ???", "lora.rank must be set, got '???'"),
    ("# " + "x" * 300_000, "must be at most 262144 bytes long"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=lambda text: text[:30])
def test_a_bad_file_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "", "quickstart.yaml")

    text = refusal(tmp_path / "quickstrat.yaml")

    assert "quickstrat.yaml' does not exist; did you mean" in text
    assert "quickstart.yaml'?" in text
    assert "there is no folder" in refusal(tmp_path / "nope" / "a.yaml")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "", "config.yaml")

    assert "must be a YAML file, got a folder; did you mean" in refusal(tmp_path)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("run: {output_dir: café}".encode("latin-1"))
    (tmp_path / "binary.yaml").write_bytes(b"\x7fELF\x02\x01\x01\x00" * 10)
    (tmp_path / "utf16.yaml").write_bytes("run: {}".encode("utf-16"))

    assert "must be UTF-8 text, but byte 21 is not" in refusal(tmp_path / "latin.yaml")
    assert "must be YAML text, but character 0 is U+007F" in refusal(tmp_path / "binary.yaml")
    assert "must be UTF-8 text" in refusal(tmp_path / "utf16.yaml")


def test_a_file_below_a_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: Not a directory" in refusal(write(tmp_path, "") / "b.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.chmod(0)

    assert "cannot be read: Permission denied" in refusal(path)


def test_a_file_without_a_usable_name_asks_for_one(tmp_path: Path) -> None:
    path = write(tmp_path, "", "配置.yaml")

    assert "run.name must be set, since none can be made from" in refusal(path)
    assert load_config(path, ["run.name=x"]).run.name == "x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--foo"], "unknown option '--foo'; options are --help, --version, --dry-run and --estimate"),
        (["--run.rounds=3"], "unknown option '--run.rounds=3'; a key is set without dashes: 'run.rounds=3'"),
        (["--dry"], "unknown option '--dry'"),
        (["-x", "lora.rank=3"], "unknown option '-x'"),
        (["--dry-run=yes"], "command line: argument --dry-run: ignored explicit argument 'yes'; see --help"),
        (["a.yaml", "b.yaml"], "the command line takes one configuration file, got 'a.yaml' and 'b.yaml'"),
        (["lora.rank"], "lora.rank has no value; write lora.rank=VALUE"),
        (["lora.rank", "4"], "lora.rank has no value; write lora.rank=VALUE"),
        (["lora.rank", "=", "4"], "write lora.rank=VALUE, without blanks around '='"),
        ([""], "an argument must be a configuration file or key=value, got ''"),
        (["lora.rank=3", "lora.rank=4"], "lora.rank must be set once on the command line"),
        (["lora={rank: 3}", "lora.rank=4"], "lora.rank must be set once on the command line"),
        (["no-such-file.yaml"], "configuration file 'no-such-file.yaml' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_line_is_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(arguments)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_without_an_equals_sign_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"override 'lora\.rank' must have the form key=value"):
        load_config(None, ["lora.rank"])


def test_several_problems_are_named_in_one_line() -> None:
    bad = [
        "lora.rank=0",
        "lora.dropout=2",
        "lora.lora_alpha=-1",
        "run.rounds=x",
        "run.seed=-1",
        "comm.timeout_s=0",
    ]
    messages = []
    for overrides in (bad, bad[::-1]):
        with pytest.raises(ConfigError) as caught:
            load_config(None, overrides)
        messages.append(str(caught.value))

    assert messages[0] == messages[1]
    assert messages[0].count("; ") == 5
    assert messages[0].startswith("run.rounds must be an integer > 0, got 'x'; run.seed must be")
    assert messages[0].endswith("; and 1 more")


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["run.rounds=" + "x" * 10_000])

    assert len(str(caught.value)) < 150
