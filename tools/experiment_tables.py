"""The table and the picture in which an experiment ends."""

import math
from pathlib import Path

from varscale.config import Config
from varscale.intervals import estimate

Values = dict[str, list[float | None]]  # title of a column -> one value a seed


def table(
    question: str, found: dict[str, Values], units: dict[str, str], measured_on: str, configs: list[Config]
) -> str:
    """Markdown: a row a variant, with several seeds mean and 95 % interval of the mean."""
    config = configs[0]
    shared = [config.encoder.name] if len({one.encoder.name for one in configs}) == 1 else ["encoders differ"]
    epochs = {one.schedule.epochs for one in configs}
    shared.append(f"{config.schedule.epochs} epochs" if len(epochs) == 1 else f"{min(epochs)} to {max(epochs)} epochs")
    seeds = {label: len(next(iter(values.values()))) for label, values in found.items()}
    fewest, most = min(seeds.values()), max(seeds.values())
    number = most if fewest == most else f"{fewest} to {most}"
    of_seeds = f"mean of {number} seeds and 95 % interval of the mean" if most > 1 else f"seed {config.seed}"
    lines = [
        f"{question}\n\nOn held-out images of {measured_on}; {', '.join(shared)}; {of_seeds}.\n",
        "| | " + " | ".join(next(iter(found.values()))) + " |",
        "|---" * (1 + len(next(iter(found.values())))) + "|",
    ]
    for label, values in found.items():
        cells = [cell(column, units[title]) for title, column in values.items()]
        name = label if fewest == most else f"{label} (seeds: {seeds[label]})"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(values: list[float | None], unit: str = "%") -> str:
    """The mean of what is a number, with its interval where several are; percent to two digits, others to four."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    digits, (mean, half) = 2 if unit == "%" else 4, estimate(numbers)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(numbers) > 1 else f"{mean:.{digits}f}"


def draw(question: str, found: dict[str, Values], units: dict[str, str], path: Path) -> None:
    """A point a variant and column, with its interval; columns of one unit over each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(units.values()))
    size = max(6.0, 1.1 * len(found) + 3), 1 + 2.6 * len(panels)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, layout="constrained", sharex=True, squeeze=False)
    for unit, axis in zip(panels, axes[:, 0], strict=True):
        columns = [column for column in units if units[column] == unit]
        for number, column in enumerate(columns):
            known = [[value for value in values[column] if value is not None] for values in found.values()]
            points = [(place, *estimate(values)) for place, values in enumerate(known) if values]
            aside = (number - (len(columns) - 1) / 2) * min(0.12, 0.8 / len(columns))
            places, means, halves = zip(*points, strict=True) if points else ((), (), ())
            halves = [0.0 if math.isnan(half) else half for half in halves]
            axis.errorbar([place + aside for place in places], means, yerr=halves, fmt="o", capsize=3, label=column)
        axis.set_ylabel(unit)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes[-1, 0].set_xticks(range(len(found)), found, rotation=20, ha="right")
    figure.suptitle(question, fontsize="medium")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
