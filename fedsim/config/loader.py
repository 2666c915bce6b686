"""From a command line, a YAML file and overrides to a checked configuration, and back to text."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

import fedsim
from fedsim.config.checks import cross_checks
from fedsim.config.help import help_text
from fedsim.config.keys import all_keys, flatten, section_names, show
from fedsim.config.messages import plain_words, refuse, unknown_key
from fedsim.config.node import NAME_PATTERN
from fedsim.config.schema import Config
from fedsim.config.yaml_text import read_yaml, write_yaml
from fedsim.errors import ConfigError

SAFE_KEYS = (
    "run.rounds",
    "run.max_minutes",
    "run.output_dir",
    "early_stopping.patience",
    "tracking.*",
    "checkpoint.*",
    "comm.*",
)
"""What a resumed run may change without changing what was computed so far."""

LARGEST_FILE_BYTES = 1 << 18
LONGEST_NAME = 120


@dataclass(frozen=True)
class EstimateOptions:
    """What `--estimate` is to work out.

    Attributes:
        probe: measure a few steps here.
        gpu: name of a GPU to plan for; None for what this machine has.
        processes: to plan for; None for those that are started.
        json_path: file for the figures; None for text alone.
    """

    probe: bool = False
    gpu: str | None = None
    processes: int | None = None
    json_path: Path | None = None


@dataclass(frozen=True)
class CommandLine:
    """What a user asked for.

    Attributes:
        config: resolved and checked.
        dry_run: say what would run, and stop.
        config_path: the YAML file, if one was given.
        estimate: say what the run would cost, and stop; None to run.
    """

    config: Config
    dry_run: bool
    config_path: Path | None
    estimate: EstimateOptions | None = None


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Reads `[config.yaml] [a.b=c ...] [--dry-run] [--estimate ...]` in any order.

    --help and --version print and exit with 0.

    Args:
        arguments: without the name of the program.

    Raises:
        ConfigError: an argument that is none of these, or a configuration that `load_config` refuses.
    """
    parser = _Parser(prog="fedsim", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=f"fedsim {fedsim.__version__}")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    for name in ("--gpu", "--processes", "--json"):
        parser.add_argument(name)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("rest", nargs="*")
    known, unknown = parser.parse_known_intermixed_args(list(arguments))
    if known.help:
        sys.stdout.write(help_text())
        parser.exit(0)
    refuse(_not_an_option(argument) for argument in unknown)
    paths = [argument for argument in known.rest if not _is_override(argument)]
    overrides = [argument for argument in known.rest if _is_override(argument)]
    path = _only_path(paths)
    estimate = _estimate_options(known)
    return CommandLine(load_config(path, overrides), known.dry_run, path, estimate)


def _estimate_options(known: argparse.Namespace) -> EstimateOptions | None:
    given = [f"--{name}" for name in ("probe", "gpu", "processes", "json") if getattr(known, name)]
    if not known.estimate:
        refuse(f"{option} must come with --estimate" for option in given)
        return None
    if known.dry_run:
        raise ConfigError("--dry-run and --estimate must not be given together; --estimate checks as much")
    if known.processes is not None and not re.fullmatch("[1-9][0-9]{0,5}", known.processes):
        raise ConfigError(f"--processes must be a whole number from 1 on, got {show(known.processes)}")
    if known.json is not None:
        target = Path(known.json).absolute()
        if not known.json or target.is_dir() or not target.parent.is_dir():
            raise ConfigError(f"--json must name a file in a folder that exists, got {show(known.json)}")
    return EstimateOptions(
        known.probe,
        known.gpu,
        None if known.processes is None else int(known.processes),
        None if known.json is None else Path(known.json),
    )


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration: defaults, then the file, then the overrides.

    Args:
        path: a YAML file. Its name becomes `run.name` unless the file or an override sets that.
        overrides: texts such as `lora.rank=4`; the value is YAML. OmegaConf's interpolations are resolved.

    Raises:
        ConfigError: the file is unreadable, a key is unknown, or a value breaks a rule, alone or with others.
    """
    given = _merge(_read_file(path) if path is not None else {}, _read_overrides(overrides))
    run = given.get("run", {})
    if path is not None and isinstance(run, dict) and "name" not in run:
        given["run"] = {"name": _name_from(path), **run}
    try:
        resolved = _resolve(given)
        refuse(_unreadable_texts(resolved))
        config = Config.model_validate(_with_tuples(resolved))
    except ValidationError as error:
        refuse(plain_words(error))
        raise
    cross_checks(config)
    return config


def to_tree(config: Config) -> dict[str, Any]:
    """The whole tree as JSON-like values, in the order of the schema."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The whole tree as YAML; `load_config` reads it back equal."""
    return write_yaml(_escaped(to_tree(config)))


def complete_tree(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tree that was written as a whole, by this fedsim or an older one, with keys that it lacks at their defaults.

    A tree that this version would refuse, say because a key is gone since, comes back as it is.
    """
    try:
        return to_tree(Config.model_validate(_with_tuples(tree)))
    except ValidationError:
        return tree


def config_hash(config: Config) -> str:
    """Hex digest of all values."""
    from fedsim.cache import content_hash

    return content_hash(to_tree(config))


def differences(old: Config, new: Config, ignore: Sequence[str] = ()) -> list[str]:
    """Texts such as `lora.rank: 2 -> 4`, in the order of the tree.

    Args:
        old: the configuration to compare with.
        new: the configuration asked for.
        ignore: dotted keys to leave out; `tracking.*` stands for all keys below tracking. See `SAFE_KEYS`.
    """
    before, after = flatten(to_tree(old)), flatten(to_tree(new))
    return [
        f"{name}: {show(before[name])} -> {show(after[name])}"
        for name in all_keys()
        if before[name] != after[name] and not any(_covers(pattern, name) for pattern in ignore)
    ]


def _covers(pattern: str, name: str) -> bool:
    return name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1]))


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def _not_an_option(argument: str) -> str:
    key = argument.lstrip("-")
    if "=" in key and "." in key.partition("=")[0]:
        return f"unknown option {show(argument)}; a key is set without dashes: {show(key)}"
    return f"unknown option {show(argument)}; options are --help, --version, --dry-run and --estimate"


def _is_override(argument: str) -> bool:
    """A path may hold "=" too, as in runs/alpha=0.1/config.yaml, but no key holds a slash."""
    return "=" in argument and "/" not in argument.partition("=")[0]


def _only_path(paths: Sequence[str]) -> Path | None:
    known = {*all_keys(), *section_names()}
    for argument in paths:
        if argument in known and not Path(argument).is_file():
            raise ConfigError(f"{argument} has no value; write {argument}=VALUE, without blanks around '='")
        if not argument:
            raise ConfigError("an argument must be a configuration file or key=value, got ''")
    if len(paths) > 1:
        raise ConfigError(
            f"the command line takes one configuration file, got {' and '.join(map(show, paths))}; "
            "set keys by key=value"
        )
    return Path(paths[0]) if paths else None


def _read_file(path: Path) -> dict[str, Any]:
    where = f"configuration file {str(path)!r}"
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{where} does not exist{_near(path)}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{where} must be a YAML file, got a folder{_yaml_files_in(path)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{where} cannot be read: {reason}") from error
    if len(raw) > LARGEST_FILE_BYTES:
        raise ConfigError(
            f"{where} must be at most {LARGEST_FILE_BYTES} bytes long; it does not look like YAML"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} must be UTF-8 text, but byte {error.start} is not") from error
    tree = read_yaml(text, where)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must hold sections such as 'run:' at its top level, got {show(tree)}")
    return tree


def _near(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    except OSError:
        return f"; there is no folder {str(path.parent)!r} either"
    nearest = get_close_matches(path.name, names, n=2, cutoff=0.6)
    return (
        f"; did you mean {' or '.join(repr(str(path.parent / name)) for name in nearest)}?" if nearest else ""
    )


def _yaml_files_in(folder: Path) -> str:
    files = sorted(entry for entry in folder.glob("*.y*ml") if entry.is_file())[:2]
    return f"; did you mean {' or '.join(repr(str(file)) for file in files)}?" if files else ""


def _name_from(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:LONGEST_NAME].rstrip("-")
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"run.name must be set, since none can be made from {path.name!r}; add run.name=NAME"
        )
    return name


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    seen: set[str] = set()
    for override in overrides:
        branch = _read_override(override)
        names = set(flatten(branch))
        for name in sorted(names & seen):
            raise ConfigError(
                f"{name} must be set once on the command line, got it again in {show(override)}"
            )
        seen |= names
        tree = _merge(tree, branch)
    return tree


def _read_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {show(override)} must have the form key=value")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*", name):
        raise ConfigError(
            f"override {show(override)} must begin with a dotted key such as lora.rank, got {name!r}"
        )
    _check_known(name)
    if not text.strip(" \t\r\n"):  # other blanks, such as no-break spaces, are text to YAML
        remedy = (
            f"; write {name}=null for null" if name in all_keys() and "null" in all_keys()[name].rule else ""
        )
        raise ConfigError(f"{name} has no value in {show(override)}{remedy}")
    value = read_yaml(text, f"the value of {name} in {show(override)}")
    if value is None and text.lstrip().startswith("#"):
        raise ConfigError(
            f"{name} has no value in {show(override)}, since '#' starts a comment; quote the value"
        )
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def _check_known(name: str) -> None:
    """A name below a leaf would otherwise turn the leaf into a mapping."""
    if name in all_keys() or name in section_names():
        return
    parent = name
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if parent in all_keys():
            raise ConfigError(f"unknown key {name}; {parent} is a single value ({all_keys()[parent].rule})")
    raise ConfigError(unknown_key(name))


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined key by key; anything else in `above` replaces what is in `below`."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _resolve(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with its interpolations resolved; they may name keys that are at their defaults."""
    missing = [name for name, value in flatten(given).items() if value == "???"]
    refuse(f"{name} must be set, got '???'" for name in missing)
    try:
        whole = OmegaConf.create(_merge(to_tree(Config()), given))
        resolved: dict[str, Any] = OmegaConf.to_container(whole, resolve=True)  # type: ignore[assignment]
    except (OmegaConfBaseException, RecursionError) as error:
        name = getattr(error, "full_key", None)
        reason = f"{getattr(error, 'msg', None) or error}".partition("\n")[0]
        what = f"the interpolation in {name}" if name else "an interpolation"
        raise ConfigError(f"{what} cannot be resolved: {reason or 'it refers to itself'}") from error
    return {name: _pick(resolved[name], value) for name, value in given.items()}


def _unreadable_texts(tree: Any, name: str = "") -> list[str]:
    """Texts that no file name, table or log can hold."""
    if isinstance(tree, dict):
        return [text for key, value in tree.items() for text in _unreadable_texts(value, f"{name}.{key}")]
    if isinstance(tree, list):
        return [text for value in tree for text in _unreadable_texts(value, name)]
    if isinstance(tree, str) and re.search(r"[\x00\ud800-\udfff]", tree):
        return [f"{name[1:]} must be a text without null and surrogate characters, got {show(tree)}"]
    return []


def _pick(resolved: Any, given: Any) -> Any:
    """The part of `resolved` that `given` names."""
    if isinstance(resolved, dict) and isinstance(given, dict):
        return {name: _pick(resolved[name], value) for name, value in given.items()}
    return resolved


def _with_tuples(value: Any) -> Any:
    """Strict pydantic models want tuples where YAML has lists."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _escaped(value: Any) -> Any:
    """Texts in which `${` stands for itself: OmegaConf reads it so behind an odd number of backslashes."""
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", value)
    return value
