#!/usr/bin/env python
"""Run one of the papers' experiments: runs, trained and measured one after another, then a table, a plot and a page.

    python tools/experiment.py                                    # which there are
    python tools/experiment.py temperature --scale digits         # minutes on two cores
    python tools/experiment.py compare --scale cifar --seeds 3
    python tools/experiment.py epsilon --scale imagenet --submit --nodes 2 --gpus-per-node 8

The experiments are lists in tools/experiments.yaml. Given again, the command goes on where it was interrupted: finished
runs are not trained again, and what was measured is not measured again. With --submit the runs become one Slurm job
array (what else is given goes to slurm/submit.py); the same command without it measures them once they are done. The
table has every run that came to its end with these settings and was measured, also by an earlier command with another
--only or --seeds; the page is the report of all these runs. Experiments that only measure something else share their
runs.
"""

import argparse
import difflib
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from experiment_measures import BASELINES, ROOT, TRAINED, Columns, Measures, code_of, measure, not_measured, results
from experiment_tables import Values, draw, table

from varscale.config import Config, load_config, to_yaml
from varscale.data.dataset import read_dataset_info
from varscale.engine.launch import EXIT_BAD_STEP
from varscale.engine.manifest import refuse_another_run
from varscale.engine.rundir import latest_checkpoint, read_manifest
from varscale.engine.stopping import INTERRUPTED, PREEMPTED
from varscale.errors import UserError
from varscale.files import replace_text

LISTS = Path(__file__).with_name("experiments.yaml")
SCALES = ("digits", "smoke", "cifar10", "cifar", "imagenet")
OPTION_OF = {"seed": "--seeds", "data.dir": "--data", "output_dir": "--out"}


@dataclass(frozen=True)
class Trial:
    """One run of an experiment: `label` is what it varies, the same for all its seeds."""

    label: str
    config: Config


def main(arguments: list[str] | None = None) -> int:
    options, passed_on = parse_arguments(arguments)
    try:
        lists = yaml.safe_load(LISTS.read_text())
        if options.name is None:
            print(catalogue(lists["experiments"]))
            return 0
        experiment = chosen(lists["experiments"], options.name)
        scale = lists["scales"][options.scale]
        trials = plan(experiment, scale, options)
        measures = measures_of(experiment, lists["columns"], options.scale)
        runs = folder_of(experiment["runs_of"], options)
        check_data(trials[0].config.data.dir, scale)
        for trial in trials:
            check_made(trial.config)
        if options.submit:
            return submit(trials, runs, passed_on)
        refuse_while_submitted(trials, runs)
        for number, trial in enumerate(trials, start=1):
            print(f"\n== {number} of {len(trials)}: {trial.config.output_dir} ==", flush=True)
            if is_finished(trial.config) or train(trial.config, runs):
                measure(trial.config.output_dir, measures, baselines=trial.label == measures.baselines_of)
        measured = all_measured(experiment, scale, options, measures)
        show(experiment["question"], measures, measured, folder_of(options.name, options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="of the experiment; none: list them")
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a converted data set (default: the scale's)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat every run with seeds 0 to N - 1")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="these of its runs, by their names in the table")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), metavar="DIR")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides of every run")
    parser.add_argument("--submit", action="store_true", help="to Slurm, as a job array; more options go to submit.py")
    options, passed_on = parser.parse_known_args(arguments)
    if passed_on and not options.submit:
        parser.error(f"unknown: {' '.join(passed_on)} (options of slurm/submit.py go with --submit)")
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}, but must be at least 1")
    return options, passed_on


def catalogue(experiments: dict[str, dict]) -> str:
    """The experiments that there are, a line each."""
    width = max(map(len, experiments))
    return "\n".join(f"{name:{width}}  {experiment['question']}" for name, experiment in experiments.items())


def chosen(experiments: dict[str, dict], name: str) -> dict:
    """The experiment of this name, with the runs of another where it has none. Raises UserError where there is none."""
    if name not in experiments:
        nearest = difflib.get_close_matches(name, experiments, 1, 0)[0]
        raise UserError(f"unknown experiment {name!r}; choose from {', '.join(experiments)}; nearest: {nearest}")
    source = experiments[name].get("runs_of", name)
    return experiments[source] | experiments[name] | {"runs_of": source}


def folder_of(name: str, options: argparse.Namespace) -> Path:
    """Where an experiment of this name has what belongs to it at the chosen scale."""
    return options.out / f"{name}-{options.scale}"


def plan(experiment: dict, scale: dict, options: argparse.Namespace) -> list[Trial]:
    """All runs of an experiment, each with its whole configuration checked. Raises UserError for a bad one."""
    trials = []
    of_all = variants(experiment, options.scale)
    if unknown := set(options.only or ()) - of_all.keys():
        raise UserError(f"--only: no run is called {' or '.join(sorted(unknown))}; choose from {', '.join(of_all)}")
    for label in options.only or of_all:
        overrides = of_all[label]
        named = next((text.partition("=")[2] for text in overrides if text.startswith("objective=")), None)
        objective = named or experiment["objective"]
        own = [text for text in overrides if not text.startswith("objective=")]
        check_set(options.set, label, own)
        scales_own = [*scale["overrides"], *scale.get("of_objective", {}).get(objective, [])]
        shared = [*scales_own, *experiment.get("overrides", {}).get(options.scale, [])]
        recipe = scale["recipe"].format(objective=objective)
        for seed in range(options.seeds):
            run = folder_of(experiment["runs_of"], options) / f"{_as_file_name(label)}-seed{seed}"
            last = [f"seed={seed}", f"data.dir={options.data or scale['data']}", f"output_dir={run}"]
            trials.append(Trial(label, load_config(recipe, [*shared, *own, *options.set, *last])))
    return trials


def measures_of(experiment: dict, columns: Columns, scale: str) -> Measures:
    """What an experiment measures at a scale; `columns` where it has none of its own."""
    settings = _at_scale(experiment.get("settings", []), scale)
    every, baselines_of = experiment.get("of_every_checkpoint", False), experiment.get("baselines_of")
    return Measures(experiment.get("columns", columns), settings, every, baselines_of)


def check_set(given: list[str], label: str, own: list[str]) -> None:
    """Raises UserError where an override of all runs would undo what one of them varies, or what an option is for."""
    for key in (text.partition("=")[0] for text in given):
        if key in OPTION_OF:
            raise UserError(f"--set {key}=...: use {OPTION_OF[key]}")
        if key in (text.partition("=")[0] for text in own):
            raise UserError(f"--set {key}=...: the run {label!r} varies it itself; leave that run out by --only")


def check_data(folder: Path, scale: dict) -> None:
    """Raises UserError where there is no data set, with the command that makes the scale's."""
    if not (folder / "dataset.json").is_file():
        made = f"python tools/convert_dataset.py {scale['source']} {scale['data']}"
        raise UserError(f"{folder}: no data set; {made} makes this scale's, --data DIR names another")


def variants(experiment: dict, scale: str) -> dict[str, list[str]]:
    """Overrides by label, at this scale. Raises UserError where the experiment has none for it."""
    if "vary" in experiment:
        ((key, values),) = experiment["vary"].items()
        values = _at_scale(values, scale)
        return {str(value).lower() if isinstance(value, bool) else str(value): [f"{key}={value}"] for value in values}
    return _at_scale(experiment["runs"], scale)


def _at_scale(values: list | dict, scale: str) -> list | dict:
    """Values that differ from scale to scale are given by its name."""
    by_scale = isinstance(values, dict) and values.keys() <= set(SCALES)
    if by_scale and scale not in values:
        raise UserError(f"this experiment has no runs at --scale {scale}; choose from {', '.join(values)}")
    return values[scale] if by_scale else values


def _as_file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-_" else "_" for letter in label)


def train(config: Config, folder: Path) -> bool:
    """Train a run to its end, from where it stands; whether it got there: some settings of a sweep lead to a loss that
    is not finite, and such a run is left out. Raises UserError where it fails otherwise."""
    path = write_config(config, folder)
    code = code_of(str(ROOT / "varscale/train.py"), "--config", str(path), "--resume", "auto")
    if code == EXIT_BAD_STEP:
        print(f"{config.output_dir} is left out: it was stopped by a bad step (above)", file=sys.stderr)
        return False
    if code:
        again = "; the same command goes on" if code in (PREEMPTED, INTERRUPTED) or code < 0 else ""
        raise UserError(f"{config.output_dir}: training ended with exit code {code}{again}")
    return True


def is_finished(config: Config) -> bool:
    """Whether nothing is left of a run: its newest checkpoint is the last, and its accuracy measured where wanted."""
    checkpoint = latest_checkpoint(config.output_dir)
    if checkpoint is None:
        return False
    from varscale.data.sampling import steps_per_epoch
    from varscale.engine.checkpoints import read_state

    try:
        check_made(config)
        state, epochs = read_state(checkpoint)["state"], config.schedule.epochs
    except UserError:  # of other settings, or damaged: train.py falls back to the checkpoint before
        return False
    images = read_dataset_info(config.data.dir).num_samples("train")
    is_measured = not config.online_knn.every_epochs or state["epochs_measured"] == epochs
    return is_measured and state["step"] == epochs * steps_per_epoch(images, config.batch.global_batch_size)


def write_config(config: Config, folder: Path) -> Path:
    """The resolved configuration of a run as a file."""
    path = folder / "configs" / f"{config.output_dir.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, to_yaml(config))
    return path


def all_measured(experiment: dict, scale: dict, options: argparse.Namespace, measures: Measures) -> list[Trial]:
    """Those of an experiment's runs, of any name and seed, that ended with these settings and were measured."""
    runs = folder_of(experiment["runs_of"], options).glob("*-seed[0-9]*")
    seeds = [int(run.name.rpartition("-seed")[2]) + 1 for run in runs]
    trials: list[Trial] = []
    for label in variants(experiment, options.scale):
        one = argparse.Namespace(**vars(options) | {"only": [label], "seeds": max(seeds, default=1)})
        with suppress(UserError):  # overrides for some of the runs need not fit the others
            trials += plan(experiment, scale, one)
    return [one for one in trials if is_finished(one.config) and not not_measured(one.config.output_dir, measures)]


def check_made(config: Config) -> None:
    """Raises UserError where there is a run in its directory, but not one of this configuration and data."""
    run = config.output_dir
    if not (run / "manifest.json").is_file():
        return
    digest = read_dataset_info(config.data.dir).digest
    try:
        refuse_another_run(read_manifest(run), config, digest, run, same_split=True)
    except UserError as error:
        raise UserError(f"{error}; --out DIR keeps these runs apart from those") from None


def refuse_while_submitted(trials: list[Trial], folder: Path) -> None:
    """Raises UserError while a job of the folder's runs waits or runs: both would train the same directories."""
    from varscale.cluster import watching
    from varscale.cluster.submission import submissions_of

    places = [folder, *(trial.config.output_dir for trial in trials)]
    for submission in {one.folder: one for place in places for one in submissions_of(place)}.values():
        if not all(state.is_over for state in watching.states(submission)):
            raise UserError(
                f"{folder}: job {submission.job} is at its runs; give this command again when it has ended "
                f"(python slurm/submit.py status {submission.folder.parents[1]})"
            )


def submit(trials: list[Trial], folder: Path, options: list[str]) -> int:
    """Put all runs into the queue as one job array; returns submit.py's exit code."""
    configs = [f"--config={write_config(trial.config, folder)}" for trial in trials]
    return subprocess.run([sys.executable, str(ROOT / "slurm/submit.py"), *configs, *options]).returncode


def show(question: str, measures: Measures, trials: list[Trial], folder: Path) -> None:
    """Print the table, and write it, its picture and the report of all runs into the experiment's folder."""
    if not trials:
        raise UserError("no run came to its end: there is nothing to show")
    found: dict[str, Values] = {}
    units, places = {}, {}
    rows = [(trial.label, trial, TRAINED) for trial in trials]
    beside = [one for one in trials if one.label == measures.baselines_of]
    rows += [
        (name, trial, model)
        for model, name in BASELINES.items()
        for trial in beside
        if not not_measured(trial.config.output_dir, measures, model)
    ]
    for label, trial, model in rows:
        measured = results(trial.config.output_dir, measures.settings, model)
        for column, (evaluator, metric) in measures.columns.items():
            found.setdefault(label, {}).setdefault(column, []).append(measured[evaluator]["metrics"][metric])
            units[column] = measured[evaluator]["units"].get(metric, "%")
            places[Path(measured[evaluator]["data"]["dir"]).name] = None
    folder.mkdir(parents=True, exist_ok=True)
    runs = [str(one.config.output_dir) for one in trials]
    if code := code_of("-m", "varscale.report", *runs, "--out", str(folder / "report")):
        raise UserError(f"varscale.report ended with exit code {code}")
    text = table(question, found, units, ", ".join(places), [trial.config for trial in trials])
    replace_text(folder / "table.md", text)
    draw(question, found, units, folder / "plot.png")
    print(f"\n{text}\nwritten to {folder / 'table.md'} and {folder / 'plot.png'}; page {folder / 'report/index.html'}")


if __name__ == "__main__":
    sys.exit(main())
