"""`python -m launch submit`: one run as a Slurm job, from the checked configuration to the job's id."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.config.loader import parse_command_line, to_yaml
from fedsim.config.schema import Config
from fedsim.errors import ConfigError, RunFolderError
from launch import records, slurm
from launch.arguments import Parser
from launch.local import idle_note, split_arguments
from launch.options import Job, add_slurm_options, build_job, parse_options
from launch.runs import refuse_unusable, run_folder
from launch.script import Batch, render_script, slurm_path
from launch.submission import Part, chain_name, commands, refuse_active, see_folder, submit_parts


def main(arguments: Sequence[str]) -> int:
    """Check everything, write the script into the run folder, submit it and return at once.

    Raises:
        ConfigError: the configuration, an option or the profile is wrong.
        RunFolderError: the run cannot use its folder, is finished, or has a job already.
        SchedulerError: Slurm is not there, or refuses the job.
    """
    own, extra = split_arguments(arguments)
    options = parse_options(_parser(), own)
    config = checked_config([*options.rest, *extra])
    job = build_job(options, os.environ)
    folder = run_folder(config)
    if not options.dry_run:
        slurm.require("sbatch", remedy="--dry-run shows the script anywhere")
        refuse_active(folder)
    state = refuse_unusable(config)
    if state.is_finished(config):
        longer = "run.rounds" if state.round >= config.run.rounds else "early_stopping.patience"
        raise RunFolderError(
            f"run {folder} is finished after {state.round} rounds, nothing to submit; a larger {longer} extends it"
        )
    place = records.next_submission_folder(folder)
    script = render_script(build_batch(config, job, place))
    parts = [Part()]
    if options.dry_run:
        print(script)
        for command in commands(place, job, parts):
            print(f"# {command}")
        return 0
    if options.test:
        print(slurm.test_only(script, parts[0].options(job)))
        return 0
    for note in advice(config, job):
        sys.stderr.write(f"launch: note: {note}\n")
    texts = {records.CONFIG: to_yaml(config), records.SCRIPT: script}
    ((jobs),) = submit_parts(place, texts, job, parts)
    records.record(place, jobs, [str(folder / "logs" / f"{job_id}.out") for job_id in jobs])
    print(f"submitted {', '.join(jobs)}: {folder}")
    sys.stderr.write(
        f"launch: python -m launch status {shlex.quote(str(folder))} says how far it is; logs and cancel likewise\n"
    )
    return 0


def checked_config(arguments: Sequence[str]) -> Config:
    """The configuration of a run that is to be submitted.

    Raises:
        ConfigError: it is wrong, or the arguments ask for something else than a run.
    """
    command = parse_command_line(list(arguments))
    if command.dry_run:
        raise ConfigError("--dry-run of fedsim.main cannot be submitted; before -- it shows the script")
    if command.estimate is not None:
        raise ConfigError(
            "--estimate cannot be submitted; `python -m fedsim.main ... --estimate` answers at once"
        )
    return command.config


def build_batch(config: Config, job: Job, place: Path) -> Batch:
    """The script of a single run; it reads the resolved configuration that is kept in `place`.

    Args:
        config: of the run.
        job: what is asked for.
        place: folder of the submission.
    """
    folder = run_folder(config)
    return Batch(
        name=f"fedsim-{config.run.name}",
        folder=Path.cwd(),
        library=place / records.LIBRARY.name,
        log=f"{slurm_path(folder / 'logs')}/%j.out",
        arguments=(str(place / records.CONFIG),),
        resources=job.resources,
        launcher=job.launcher,
        container=see_folder(job.container, folder.parent),
        setup=job.setup,
        restarts=chain_name(job, place),
    )


def advice(config: Config, job: Job) -> list[str]:
    """What is allowed and yet hardly meant."""
    processes = job.resources.processes_per_node or job.resources.gpus_per_node or 1
    idle = idle_note(config, processes * job.resources.nodes)
    found = [] if idle is None else [idle]
    if config.run.device == "cuda" and not job.resources.gpus_per_node:
        found.append("run.device is cuda, and no GPU is asked for; give --gpus-per-node")
    return found


def _parser() -> Parser:
    parser = Parser(
        prog="python -m launch submit",
        description="Submit a run to Slurm. The job requeues itself before its time limit, after preemption and after "
        "failures, and goes on from the newest checkpoint.",
        epilog="example: python -m launch submit configs/quickstart.yaml run.rounds=50 --nodes 2 --gpus-per-node 4 "
        "--time 04:00:00",
        allow_abbrev=False,
    )
    parser.add_argument("rest", nargs="*", metavar="CONFIG.yaml | KEY=VALUE", help="as for fedsim.main")
    add_slurm_options(parser)
    return parser
