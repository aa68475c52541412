"""Submit a training to Slurm.

    python slurm/submit.py --config imagenet1k-varcon --nodes 4 --gpus-per-node 8 [key=value ...]

Afterwards `python slurm/submit.py status|follow|cancel RUN`, where RUN is the run's directory or the job's number. The
same with `--cluster local` trains on this machine. A sweep, `--sweep objective.epsilon=0.0,0.02`, is a job array; so
are several configurations, `--config A --config B`, whose runs lie in one folder.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the package beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import io
import itertools
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from varscale.cluster import slurm, watching
from varscale.cluster.settings import ClusterSettings, load_settings, minutes
from varscale.cluster.submission import Run, Submission, find, new_folder, snapshot, submissions_of, write_config
from varscale.config import Config, load_config, recipe_names, resolve_batch, resolve_deepspeed
from varscale.errors import UserError

SETTINGS = Path(__file__).with_name("cluster.yaml")
OPTIONS = {
    "partition": "where to queue",
    "account": "who pays",
    "qos": "quality of service",
    "constraint": "features that nodes must have",
    "time": "limit of one start: minutes, HH:MM:SS or D-HH:MM:SS",
    "nodes": "how many",
    "gpus_per_node": "as many ranks run on each node",
    "ranks_per_node": "on CPU, or to differ from --gpus-per-node",
    "cpus_per_rank": "cores for a rank and its loader",
    "memory_gb": "of each node",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        match arguments:
            case ["status", target]:
                return watching.print_status(find_submission(target))
            case ["follow", target]:
                return watching.follow(find_submission(target))
            case ["cancel", target]:
                return cancel(find_submission(target))
            case ["status" | "follow" | "cancel" as command, *_]:
                raise UserError(f"{command} takes one argument: a run's directory or a job's number")
        return submit(parse_arguments(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    recipe = "a recipe's name, or the path of a YAML file; given several times, a run for each"
    parser.add_argument("--config", required=True, action="append", metavar="RECIPE", help=recipe)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for varscale/train.py")
    parser.add_argument("--sweep", action="append", default=[], metavar="key=A,B,C", help="a run for each value")
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm", help="local: on this machine")
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="defaults of what follows (slurm/cluster.yaml)")
    for name, meaning in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=meaning)
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and the plan, submit nothing")
    parser.add_argument("--follow", action="store_true", help="stay, and print what rank 0 and failing ranks say")
    return parser.parse_intermixed_args(arguments)


def submit(options: argparse.Namespace) -> int:
    """Check everything that can be checked here, freeze code and configuration, and put the job into the queue."""
    chosen = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    settings = load_settings(options.settings, chosen)
    base, configs = runs_of(options)
    if options.dry_run:
        return dry_run(settings, base.absolute().name, configs)
    if options.cluster == "slurm":
        slurm.check_fits(settings)
    elif settings.nodes > 1:
        raise UserError(f"--nodes is {settings.nodes}, but --cluster local is this machine alone")
    steps = {name: check_run(config, settings.world_size) for name, config in configs.items()}
    refuse_second_job([base, *(config.output_dir for config in configs.values())])

    folder = new_folder(base)
    snapshot(folder)
    runs = [
        Run(name, config.output_dir.absolute(), write_config(folder, number, config), steps[name])
        for number, (name, config) in enumerate(configs.items())
    ]
    submission = Submission(folder, options.cluster, settings.nodes, settings.ranks, settings.idle_requeues, runs)
    submission.save()
    start = submit_to_slurm if options.cluster == "slurm" else start_here
    submission.job = start(submission, settings)
    submission.save()
    print(f"submitted {base} as job {submission.job}: {settings.world_size} ranks on {settings.nodes} node(s)")
    print(f"python slurm/submit.py status|follow|cancel {base}", flush=True)
    return watching.follow(submission) if options.follow else 0


def runs_of(options: argparse.Namespace) -> tuple[Path, dict[str, Config]]:
    """The folder that a submission belongs to, and the configuration of each run by the run's name."""
    recipe, *others = options.config
    config = load_config(recipe, options.overrides)
    if not others:
        base = config.output_dir
        return base, {name: load_config(recipe, overrides) for name, overrides in sweep(options, base).items()}
    if options.sweep:
        raise UserError("--sweep goes with a single --config")
    base, found = config.output_dir.parent, {config.output_dir.name: (recipe, config)}
    for other in others:
        directory = (config := load_config(other, options.overrides)).output_dir
        if directory.parent.absolute() != base.absolute():
            raise UserError(f"--config {other}: output_dir is {directory}, but that of {recipe} lies in {base}")
        if directory.name in found:
            raise UserError(f"--config {other}: output_dir is {directory}, as that of {found[directory.name][0]}")
        found[directory.name] = other, config
    return base, {name: config for name, (_, config) in found.items()}


def sweep(options: argparse.Namespace, base: Path) -> dict[str, list[str]]:
    """The overrides of each run by its name: every combination of the values to try, each in its own directory."""
    if not options.sweep:
        return {base.name: options.overrides}
    axes = []
    for text in options.sweep:
        key, equals, values = text.partition("=")
        if not equals or not values or key == "output_dir":
            raise UserError(f"--sweep {text!r} is not of the form key.sub=A,B,C")
        axes.append([f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values)])  # not within [1, 2]
    runs = {}
    for choice in itertools.product(*axes):
        name = ",".join(choice).replace("/", "_")
        runs[name] = [*options.overrides, *choice, f"output_dir={base / name}"]
    return runs


def check_run(config: Config, world_size: int) -> int:
    """What train.py checks when it starts, before hours in the queue; returns how many steps the run takes."""
    from varscale.data.sampling import steps_per_epoch
    from varscale.engine.launch import check_run_directory, check_training_data

    sizes = resolve_batch(config.batch, world_size)
    resolve_deepspeed(config, sizes)
    data = check_training_data(config, sizes)
    check_run_directory(config, data.info.digest, "auto")
    return config.schedule.epochs * steps_per_epoch(data.train.num_samples, sizes.global_batch_size)


def refuse_second_job(directories: list[Path]) -> None:
    """Two jobs of one run would overwrite each other's checkpoints."""
    for submission in {s.folder: s for directory in directories for s in submissions_of(directory)}.values():
        for number, run in enumerate(submission.runs):
            if run.directory in [path.absolute() for path in directories] and watching.is_alive(submission, number):
                raise UserError(f"{run.directory}: job {submission.job} is at it already; cancel it first")


def dry_run(settings: ClusterSettings, name: str, configs: dict[str, Config]) -> int:
    from varscale.engine.plan import describe

    config = next(iter(configs.values()))
    folder = Path("SUBMISSION").absolute()
    print(f"== sbatch script ==\n{script(folder, settings, name, len(configs))}\n")
    if len(configs) > 1:
        print("== runs ==", *(c.output_dir for c in configs.values()), "\n== of the first ==", sep="\n")
    sizes = resolve_batch(config.batch, settings.world_size)
    print(describe(config, sizes, resolve_deepspeed(config, sizes)))
    return 0


def script(folder: Path, settings: ClusterSettings, name: str, runs: int) -> str:
    """The sbatch script as submitit will write it; SUBMISSION stands for a folder that is made on submission."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder)])
    count = {"map_count": runs} if runs > 1 else {}
    return _make_sbatch_string(command=command, folder=folder, **sbatch_parameters(folder, settings, name), **count)


def sbatch_parameters(folder: Path, settings: ClusterSettings, name: str) -> dict:
    """What submitit writes into the sbatch script; keys in Slurm's terms."""
    python = f"{shlex.quote(sys.executable)} -m varscale.cluster.job"
    environment = {
        "PYTHONPATH": f"{shlex.quote(str(folder / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "PYTHONSAFEPATH": "1",  # or the package in the current directory would come before the snapshot
        "VARSCALE_SUBMISSION": shlex.quote(str(folder)),
        "VARSCALE_RUN": "${SLURM_ARRAY_TASK_ID:-0}",
        "VARSCALE_JOB": "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        "VARSCALE_START": "${SLURM_RESTART_COUNT:-0}",
        "MASTER_PORT": f"$({python} begin)",  # this script runs on the node of rank 0
    }
    # Without --cpu-bind=none each rank would see its own cores alone, and take its share of them once more.
    srun = ["--kill-on-bad-exit=1", "--cpu-bind=none"]
    if settings.cpus_per_rank:
        srun.append(f"--cpus-per-task={settings.cpus_per_rank}")  # since 22.05 srun does not take it from sbatch
    parameters = {
        "job_name": name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": minutes(settings.time),
        "nodes": settings.nodes,
        "ntasks_per_node": settings.ranks,
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_rank,
        "mem": f"{round(settings.memory_gb * 1024)}M" if settings.memory_gb else None,
        "signal_delay_s": settings.signal_delay,
        "stderr_to_stdout": True,
        "setup": [*settings.setup, *(f"export {key}={value}" for key, value in environment.items())],
        "srun_args": srun,
        "teardown": [f"{python} end $?"],
        "additional_parameters": {"requeue": True, **settings.sbatch},
    }
    return {key: value for key, value in parameters.items() if value is not None}


def submit_to_slurm(submission: Submission, settings: ClusterSettings) -> str:
    """Put the submission into Slurm's queue, as a job array where it has several runs; returns the job's number."""
    import submitit

    from varscale.cluster.job import run_task

    executor = submitit.SlurmExecutor(submission.folder)
    name = Path(submission.folder).parents[1].name
    executor.update_parameters(**sbatch_parameters(submission.folder, settings, name))
    try:
        with redirect_stderr(io.StringIO()):  # the error holds what submitit would print
            jobs = executor.submit_array([run_task] * len(submission.runs))
    except submitit.core.utils.FailedJobError as error:
        shutil.rmtree(submission.folder)
        raise UserError(" ".join(str(error).replace("sbatch: error", "sbatch").split())) from None
    return jobs[0].job_id.partition("_")[0]


def start_here(submission: Submission, settings: ClusterSettings) -> str:
    """Start the submission on this machine; returns the id of the process that leads it."""
    import submitit

    from varscale.cluster.job import run_here

    executor = submitit.LocalExecutor(submission.folder)
    executor.update_parameters(
        timeout_min=60 * 24 * 365, tasks_per_node=1, gpus_per_node=settings.gpus_per_node, stderr_to_stdout=True
    )
    paths = [str(submission.folder / "code"), os.environ.get("PYTHONPATH")]
    os.environ.update(PYTHONPATH=os.pathsep.join(filter(None, paths)), PYTHONSAFEPATH="1")
    with outliving_this_program(submission.folder / "leader.log"):
        return executor.submit(run_here, str(submission.folder)).job_id


@contextmanager
def outliving_this_program(log: Path) -> Iterator[None]:
    """What is started within ignores Ctrl-C and the terminal's end, and does not hold this program's output open."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    sys.stdout.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    with log.open("w") as file:
        for number in saved:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, handle in saved.items():
            os.dup2(handle, number)
            os.close(handle)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def find_submission(target: str) -> Submission:
    """The newest submission of a run's directory, or the one of a job that Slurm still knows."""
    if not target.isdigit():
        return find(target)
    log = slurm.log_of(target)
    if log is None:
        raise UserError(f"Slurm does not know job {target} (any more); give the run's directory")
    if not (Path(log).parent / "submission.json").is_file():
        raise UserError(f"job {target} was not submitted by this program")
    return Submission.load(Path(log).parent)


def cancel(submission: Submission) -> int:
    if submission.cluster == "slurm":
        slurm.cancel(submission.job)
    else:
        watching.end_local(submission)
    print(f"cancelled job {submission.job}; what it had saved is kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
