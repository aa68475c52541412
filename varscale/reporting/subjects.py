"""Whose numbers stand beside each other: trained encoders of all runs, then what they are compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from varscale.reporting.plotting import COLOURS, GREYS
from varscale.reporting.runs import PIXELS, TRAINED, UNTRAINED, Run


@dataclass(frozen=True)
class Subject:
    """One column of the table of metrics, one line in a picture of them.

    records: what was measured on the newest checkpoint that was measured.
    """

    name: str
    is_baseline: bool
    colour: str
    records: list[dict]

    def record(self, evaluator: str) -> dict | None:
        """The newest record of an evaluator."""
        found = [one for one in self.records if one["evaluator"] == evaluator]
        return found[-1] if found else None

    def metrics(self) -> dict[tuple, float | None]:
        """Every value under (evaluator, metric, unit, digest of the data)."""
        return {
            (one["evaluator"], name, unit_of(one, name), data_of(one)): value
            for one in self.records
            for name, value in one["metrics"].items()
        }


def unit_of(record: dict, metric: str) -> str:
    """The unit of a metric; percent where a record names none."""
    return record.get("units", {}).get(metric, "%")


def data_of(record: dict) -> str:
    """The digest of the data that a record is about."""
    return record.get("data", {}).get("digest", "")


def subjects(runs: Sequence[Run]) -> list[Subject]:
    """The trained encoders, then the baselines; of several runs' baselines one, where it is the same and they agree."""
    measured = [(number, run, run.evaluations[-1].records) for number, run in enumerate(runs) if run.evaluations]
    trained = [
        Subject(run.name, False, COLOURS[number % len(COLOURS)], [one for one in records if one["model"] == TRAINED])
        for number, run, records in measured
    ]
    baselines: dict[str, list[Subject]] = {}
    for _, run, records in measured:
        for name, own in _baselines(run, records):
            same = baselines.setdefault(name, [])
            candidate = Subject(name, True, GREYS[0], own)
            if not any(_agree(candidate, other) for other in same):
                same.append(Subject(name if not same else f"{name}, {run.name}", True, "", own))
    found = [one for same in baselines.values() for one in same]
    return trained + [
        Subject(one.name, True, GREYS[number % len(GREYS)], one.records) for number, one in enumerate(found)
    ]


def _baselines(run: Run, records: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """By a name that is the same where the baseline is: the pixels do not depend on the encoder or the seed."""
    size = "{0}x{0}".format(run.config["data"]["image_size"])
    names = {PIXELS: f"raw pixels, {size}", UNTRAINED: f"untrained {run.encoder}, {size}, seed {run.config['seed']}"}
    for model in sorted({one["model"] for one in records} - {TRAINED}):
        own = [one for one in records if one["model"] == model]
        yield names.get(model, model), own


def _agree(subject: Subject, other: Subject) -> bool:
    """Whether all that was measured on one was measured on the other too, with the same result."""
    theirs = other.metrics()
    return all(key in theirs and theirs[key] == value for key, value in subject.metrics().items())
