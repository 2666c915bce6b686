"""Which runs a person means by the folders on the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import RunFolderError
from launch import records
from launch.manifest import read_manifest


@dataclass(frozen=True)
class Target:
    """A folder that was named.

    Attributes:
        folder: of a run or of a sweep, absolute.
        runs: run folders that belong to it: itself, or those of the sweep.
    """

    folder: Path
    runs: tuple[Path, ...]


def find_targets(names: Sequence[str]) -> list[Target]:
    """Runs and sweeps; a folder that holds some stands for all of them.

    Raises:
        RunFolderError: a name is none of these.
    """
    found: dict[Path, Target] = {}
    for name in names:
        folder = Path(name).absolute()
        if not folder.is_dir():
            raise RunFolderError(
                f"there is no folder {name}; name a run's folder, a sweep's, or one that holds them"
            )
        inside = [_target(path) for path in sorted(folder.iterdir()) if path.is_dir()]
        targets = [one for one in ([_target(folder)] if _target(folder) else inside) if one is not None]
        if not targets:
            raise RunFolderError(f"{name} is no run, no sweep, and holds none; name a run's folder")
        in_sweeps = {run for target in targets for run in target.runs if run != target.folder}
        for target in targets:
            if target.folder not in in_sweeps:
                found.setdefault(target.folder, target)
    return list(found.values())


def _target(folder: Path) -> Target | None:
    if (folder / records.MANIFEST).is_file():
        return Target(folder, tuple(element.folder for element in read_manifest(folder / records.MANIFEST)))
    if (folder / "run.json").is_file() or records.read_submissions(folder):
        return Target(folder, (folder,))
    return None
