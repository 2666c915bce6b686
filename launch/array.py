"""A sweep as job arrays of Slurm: a manifest, one run folder for each element, and what has not finished yet."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.config.loader import parse_command_line, to_yaml
from fedsim.config.schema import Config
from fedsim.errors import RunFolderError
from launch import records, slurm
from launch.arms import Arm, arm_arguments
from launch.manifest import Element, Slice, make_slices, read_manifest, write_manifest
from launch.options import Job, build_job
from launch.runs import refuse_unusable, run_folder
from launch.script import Batch, render_script, slurm_path
from launch.submission import Part, chain_name, commands, see_folder, submit_parts
from launch.submit import advice


@dataclass(frozen=True)
class Planned:
    """A run of a sweep that is to be submitted.

    Attributes:
        element: its line of the manifest.
        config: resolved.
        place: folder of the submission in its run folder.
    """

    element: Element
    config: Config
    place: Path


def submit_sweep(options: argparse.Namespace, arms: Sequence[Arm]) -> int:
    """Check every configuration, then submit those that have not finished.

    Raises:
        ConfigError: a configuration, an option or the profile is wrong.
        RunFolderError: a run cannot use its folder, or the sweep was submitted before and --resubmit is not given.
        SchedulerError: Slurm is not there, or refuses the jobs.
    """
    job = build_job(options, os.environ)
    base = parse_command_line(list(options.rest)).config
    folder = sweep_folder(base)
    planned = plan_elements(options.rest, arms, base)
    _refuse_second(folder, options.resubmit)
    if not options.dry_run:
        slurm.require("sbatch", "squeue", remedy="--dry-run shows the script anywhere")
    idle = planned if options.dry_run or options.test else _without_active(planned, options.resubmit)
    unfinished = [run for run in idle if not refuse_unusable(run.config).is_finished(run.config)]
    if not unfinished:
        print(f"{folder}: of {len(planned)} runs none is left to submit: all are finished, or have a job")
        return 0
    place = records.next_submission_folder(folder)
    script = render_script(build_array(base, job, folder, place))
    slices = make_slices(len(unfinished), slurm.max_array_size())
    parts = [Part(each.array_option(options.parallel), (str(each.offset),)) for each in slices]
    one_by_one = options.parallel is not None
    if options.dry_run:
        print(script)
        for command in commands(place, job, parts, one_by_one):
            print(f"# {command}")
        for index, run in enumerate(unfinished):
            print(f"# line {index}: {run.element.folder} {shlex.join(run.element.overrides)}".rstrip())
        return 0
    if options.test:
        print(slurm.test_only(script, parts[0].options(job)))
        return 0
    for note in advice(base, job):
        sys.stderr.write(f"launch: note: {note}\n")
    jobs = _submit(place, script, job, unfinished, parts, one_by_one, base)
    _record(folder, place, unfinished, slices, jobs)
    _record_manifest(folder, [run.element for run in planned])
    told = ", ".join(job_id for chain in jobs for job_id in chain)
    print(f"submitted {told}: {len(unfinished)} of {len(planned)} runs of {folder}")
    sys.stderr.write(f"launch: python -m launch status {shlex.quote(str(folder))} says how far they are\n")
    return 0


def sweep_folder(base: Config) -> Path:
    """Where the files that belong to no single run of a sweep are kept."""
    return run_folder(base).with_name(f"{base.run.name}.sweep")


def plan_elements(run_arguments: Sequence[str], arms: Sequence[Arm], base: Config) -> list[Planned]:
    """The runs of a sweep, all of them checked. Those without a W&B group get the sweep's name for one.

    Args:
        run_arguments: of fedsim.main, common to all.
        arms: what differs.
        base: the configuration without arms.

    Raises:
        ConfigError: a configuration is wrong.
    """
    planned = []
    for arm in arms:
        config = parse_command_line(arm_arguments(run_arguments, arm, base)).config
        folder = run_folder(config)
        place = records.next_submission_folder(folder)
        arguments = (str(place / records.CONFIG),)
        planned.append(Planned(Element(config.run.name, folder, arm.overrides, arguments), config, place))
    return planned


def build_array(base: Config, job: Job, folder: Path, place: Path) -> Batch:
    """The script that all elements run.

    Args:
        base: the configuration without arms.
        job: what is asked for.
        folder: of the sweep.
        place: of this submission.
    """
    return Batch(
        name=f"fedsim-{base.run.name}",
        folder=Path.cwd(),
        library=place / records.LIBRARY.name,
        log=f"{slurm_path(folder / 'logs')}/%A_%a.out",
        manifest=place / records.MANIFEST,
        resources=job.resources,
        launcher=job.launcher,
        container=see_folder(job.container, folder.parent),
        setup=job.setup,
        restarts=chain_name(job, place),
    )


def _refuse_second(folder: Path, resubmit: bool) -> None:
    known = (folder / records.MANIFEST).exists()
    if (folder / "config.yaml").exists():
        raise RunFolderError(
            f"{folder} is the folder of a run, and a sweep of that name needs it; choose another run.name"
        )
    if known and not resubmit:
        raise RunFolderError(
            f"sweep {folder} was submitted before; --resubmit sends what has not finished, and "
            f"`python -m launch status {shlex.quote(str(folder))}` says what has"
        )
    if resubmit and not known:
        raise RunFolderError(f"--resubmit needs a sweep that was submitted before, and {folder} is none")


def _without_active(planned: Sequence[Planned], resubmit: bool) -> list[Planned]:
    """Those that no job is about to run, or runs."""
    of_run = {run.element.name: records.submitted_jobs(run.element.folder) for run in planned}
    active = {
        job.job_id for job in slurm.active_jobs([job_id for jobs in of_run.values() for job_id in jobs])
    }
    busy = {name for name, jobs in of_run.items() if active & set(jobs)}
    if busy and not resubmit:
        name = min(busy)
        raise RunFolderError(
            f"run {name} of this sweep has a job already ({of_run[name][-1]}); wait for it, or cancel it"
        )
    return [run for run in planned if run.element.name not in busy]


def _submit(
    place: Path,
    script: str,
    job: Job,
    planned: Sequence[Planned],
    parts: Sequence[Part],
    one_by_one: bool,
    base: Config,
) -> list[list[str]]:
    """The ids of each part's jobs; where Slurm refuses one, no file is left."""
    texts = {
        records.SCRIPT: script,
        records.MANIFEST: write_manifest([run.element for run in planned]),
        records.CONFIG: to_yaml(base),
    }
    written: list[Path] = []
    try:
        for run in planned:
            records.write_files(run.place, {records.CONFIG: to_yaml(run.config)})
            written.append(run.place)
        return submit_parts(place, texts, job, parts, one_by_one)
    except BaseException:
        for path in written:
            records.remove_files(path)
        raise


def _record(
    folder: Path,
    place: Path,
    planned: Sequence[Planned],
    slices: Sequence[Slice],
    jobs: Sequence[Sequence[str]],
) -> None:
    """Write down the jobs, in the sweep's folder and in that of each run."""
    logs = folder / "logs"
    every = [job_id for chain in jobs for job_id in chain]
    records.record(place, every, [str(logs / f"{job_id}_*.out") for job_id in every])
    for each, chain in zip(slices, jobs, strict=True):
        for index in range(each.size):
            ids = [f"{job_id}_{index}" for job_id in chain]
            records.record(planned[each.offset + index].place, ids, [str(logs / f"{one}.out") for one in ids])


def _record_manifest(folder: Path, elements: Sequence[Element]) -> None:
    """Put all runs of the sweep into its manifest, those of earlier submissions first."""
    path = folder / records.MANIFEST
    before = read_manifest(path) if path.exists() else []
    now = {element.name: element for element in elements}
    whole = [now.pop(element.name, element) for element in before] + list(now.values())
    unfinished = path.with_name(f".{records.MANIFEST}")
    unfinished.write_text(write_manifest(whole), encoding="utf-8")
    unfinished.replace(path)
