"""Whose numbers stand beside each other: trained encoders of all runs, then what they are compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from varscale.reporting.plotting import GREYS
from varscale.reporting.runs import PIXELS, TRAINED, UNTRAINED, Run, data_of, label_of


@dataclass(frozen=True)
class Subject:
    """One column of the table of metrics, one line in a picture of them.

    records: what was measured on the newest checkpoint that was measured.
    data_digest: of the data that the run was trained on.
    group: its name together with others that differ in nothing but the seed.
    """

    name: str
    is_baseline: bool
    colour: str
    records: list[dict]
    data_digest: str
    group: str = ""
    line: str = "-"

    def record(self, evaluator: str) -> dict | None:
        """The record of an evaluator on the run's own data: its usual variant, else linear's other protocol."""
        found = self.variants(evaluator)
        return found.get("") or found.get("imagenet")

    def variants(self, evaluator: str) -> dict[str, dict]:
        """The records of an evaluator on the run's own data, by their variants."""
        found = [one for one in self.records if (one["evaluator"], data_of(one)) == (evaluator, self.data_digest)]
        return {one.get("variant", ""): one for one in found}

    def metrics(self) -> dict[tuple, float | None]:
        """Every number under (evaluator with its variant, metric, unit, digest of the data)."""
        return {
            (label_of(one), name, unit_of(one, name), data_of(one)): value
            for one in self.records
            for name, value in one["metrics"].items()
            if value is None or isinstance(value, int | float)
        }


def unit_of(record: dict, metric: str) -> str:
    """The unit of a metric; percent where a record names none."""
    return record.get("units", {}).get(metric, "%")


def subjects(runs: Sequence[Run]) -> list[Subject]:
    """The trained encoders, then the baselines; of several runs' baselines one, where it is the same and they agree.

    Repetitions that were measured at another step than the others are a group of their own.
    """
    measured = [(run, run.evaluations[-1].records) for run in runs if run.evaluations]
    trained = [
        Subject(
            run.name, False, run.look.colour, _of(TRAINED, found), run.data_digest, _group(run, runs), run.look.line
        )
        for run, found in measured
    ]
    baselines: dict[str, list[Subject]] = {}
    for run, records in measured:
        for name, own in _baselines(run, records):
            same = baselines.setdefault(name, [])
            group = name.partition(", seed")[0]
            candidate = Subject(name, True, "", own, run.data_digest, group, "--")
            if not any(_agree(candidate, other) for other in same):
                same.append(candidate if not same else replace(candidate, name=f"{name}, {run.name}"))
    found = [one for same in baselines.values() for one in same]
    groups = list(dict.fromkeys(one.group for one in found))
    return trained + [replace(one, colour=GREYS[groups.index(one.group) % len(GREYS)]) for one in found]


def _group(run: Run, runs: Sequence[Run]) -> str:
    """What a run and its repetitions measured at the same step are called together."""
    steps = [one.evaluations[-1].step for one in runs if one.evaluations and one.look == run.look]
    own = run.evaluations[-1].step
    if steps.count(own) == len(steps):
        return run.look.name
    return f"{run.look.name}: {steps.count(own)} at step {own}"


def _baselines(run: Run, records: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """By a name that is the same where the baseline is: the pixels do not depend on the encoder or the seed."""
    size = "{0}x{0}".format(run.config["data"]["image_size"])
    names = {PIXELS: f"raw pixels, {size}", UNTRAINED: f"untrained {run.encoder}, {size}, seed {run.config['seed']}"}
    for model in sorted({one["model"] for one in records} - {TRAINED}):
        yield names.get(model, model), _of(model, records)


def _of(model: str, records: list[dict]) -> list[dict]:
    return [one for one in records if one["model"] == model]


def _agree(subject: Subject, other: Subject) -> bool:
    """Whether all that was measured on one was measured on the other too, with the same result."""
    theirs = other.metrics()
    return all(key in theirs and theirs[key] == value for key, value in subject.metrics().items())
