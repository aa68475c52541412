"""The sections of a report, in the order in which they are read."""

import shlex
from collections.abc import Iterator, Sequence

from varscale.reporting import curves, measured, step_profile, tables
from varscale.reporting.content import (
    Block,
    Column,
    Commands,
    Fold,
    Gallery,
    Items,
    Paragraph,
    Report,
    Section,
    Table,
)
from varscale.reporting.runs import TRAINED, Run, label_of
from varscale.reporting.subjects import Subject, subjects


def build_report(runs: Sequence[Run], command: str) -> Report:
    """The report of some runs; `command` makes it again."""
    columns = subjects(runs)
    sections = [
        _overview(runs),
        _results(runs, columns),
        _training(runs),
        _embeddings(runs),
        _pictures(runs),
        _throughput(runs),
        _configuration(runs),
        _notes(runs),
        _reproduction(runs, command),
    ]
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    return Report(f"varscale: {title}", [section for section in sections if section.blocks])


def _overview(runs: Sequence[Run]) -> Section:
    told = []
    for run in runs:
        batch, epochs = run.config["batch"]["global_batch_size"], run.config["schedule"]["epochs"]
        reached = f"; measured at {run.moment(run.evaluations[-1].step)}" if run.evaluations else ""
        told.append(
            f"{run.name}: {run.objective}, {run.encoder}, {run.config['data']['dir']}, {epochs} epochs, {batch} images "
            f"a step{reached}"
        )
    missing = [f"{run.name}: {what}" for run in runs for what in run.missing]
    blocks: list[Block] = [Items(told)]
    if missing:
        blocks += [Paragraph("What is missing:"), Items(missing)]
    return Section("Runs", blocks)


def _results(runs: Sequence[Run], columns: Sequence[Subject]) -> Section:
    blocks: list[Block] = []
    told = (
        "All that was measured on each run's newest measured checkpoint, on its data's held-out images unless a row "
        "names others; ± is half the width of a 95 % interval"
    )
    if summary := tables.over_seeds(columns):
        blocks += [Paragraph(f"{told}, of the mean over seeds."), summary]
    if table := tables.metrics(columns):
        blocks += [Fold("Every run", [table])] if summary else [Paragraph(f"{told}."), table]
    if table := tables.published(columns):
        told = (
            "Published by others, not measured here. Beside it, of our runs on the same data, that of the same kind of "
            "classifier, linear or the run's own, whatever their encoder and epochs."
        )
        blocks += [Paragraph(told), table]
    if pictures := measured.comparisons(columns):
        blocks.append(Gallery(pictures))
    if table := tables.corruptions(columns):
        blocks.append(Fold("By corruption: top-1 (%), mean over severities", [table]))
    for run in runs:
        if table := tables.over_checkpoints(run):
            blocks.append(Fold(f"{run.name}: by checkpoint", [table]))
    return Section("Results", blocks)


def _training(runs: Sequence[Run]) -> Section:
    pictures = curves.curves(runs) + curves.histograms(runs)
    return Section("Training", [Gallery(pictures)] if pictures else [])


def _embeddings(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for number, run in enumerate(runs):
        if pictures := measured.embeddings(run, number):
            blocks += [Paragraph(run.name), Gallery(pictures, "small")]
    if blocks:
        blocks.insert(0, Paragraph("Validation embeddings. Every picture was made alone: axes and turns mean nothing."))
    return Section("Embeddings", blocks)


def _pictures(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for number, run in enumerate(runs):
        trained, baselines, missing = measured.stored(run, number)
        if trained or baselines or missing:
            blocks.append(Paragraph(run.name))
        blocks += [Gallery(trained, "wide")] if trained else []
        blocks += [Fold("Of the baselines", [Gallery(baselines, "wide")])] if baselines else []
        blocks += [Items(missing)] if missing else []
    return Section("Evaluators' pictures", blocks)


def _throughput(runs: Sequence[Run]) -> Section:
    told = (
        "Of training itself: checkpoints and evaluation are not in it. Images, views: of all ranks. Times, waits, "
        "operations, memory: of rank 0. Medians are those of the lines of metrics.jsonl."
    )
    blocks: list[Block] = [Paragraph(told), Gallery(measured.throughput(runs)), tables.speed(runs)]
    for number, run in enumerate(runs):
        if run.profile:
            title = f"{run.name}: where the time of a step goes, mean of {run.profile['steps']} profiled steps"
            blocks.append(Gallery([step_profile.draw(f"step-{number + 1}", title, run.profile)], "wide"))
            blocks.append(Fold(f"{run.name}: by phase and operator", [*_step_tables(run.profile)]))
    return Section("Throughput", blocks)


def _step_tables(profile: dict) -> Iterator[Block]:
    yield Paragraph(step_profile.TOLD)
    for head, *rows in (step_profile.phase_rows(profile), step_profile.operator_rows(profile)):
        yield Table([Column(head[0], "label"), *map(Column, head[1:])], rows)


def _configuration(runs: Sequence[Run]) -> Section:
    differing, common = tables.configurations(runs)
    if differing is None:
        return Section("Configuration", [Fold("All keys", [common])])
    return Section(
        "Configuration", [Paragraph("What differs:"), differing, Fold("What is the same in all runs", [common])]
    )


def _notes(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for run in runs:
        records = run.evaluations[-1].records if run.evaluations else []
        notes = [f"{one['model']}, {label_of(one)}: {note}" for one in records for note in one.get("notes", ())]
        table = tables.protocols(run)
        if notes or table:
            blocks.append(Paragraph(run.name))
        blocks += [Items(notes)] if notes else []
        blocks += [Fold("Settings of the evaluators", [table])] if table else []
    return Section("How it was measured", blocks)


def _reproduction(runs: Sequence[Run], command: str) -> Section:
    lines = []
    for run in runs:
        start = run.starts[0] if run.starts else {}
        told = [f"{start.get('world_size', '?')} rank(s)", f"revision {start.get('git_revision')}"]
        lines.append(f"# {run.name}: {', '.join([*told, f'data {run.data_digest}'])}")
        if start.get("command"):
            launcher = "deepspeed" if start["world_size"] > 1 else "python"
            lines.append(shlex.join([launcher, *start["command"]]))
        records = run.evaluations[-1].records if run.evaluations else []
        names = list(dict.fromkeys(one["evaluator"] for one in records))
        if names:
            lines.append("# with the settings under “How it was measured”")
            baselines = ["--baselines"] if any(one["model"] != TRAINED for one in records) else []
            told = ["python", "-m", "varscale.evaluate", "--checkpoint", str(run.path), *names, *baselines]
            lines.append(shlex.join(told))
    return Section("How to make it again", [Commands("\n".join([*lines, "# this report", command]))])
