"""The third program: one page about some runs, to look at and to hand on.

    python -m varscale.report runs/cifar10-varcon runs/cifar10-supcon --out report

writes report/index.html, which needs nothing but itself, and report/report.md with its pictures in report/figures/.
Several runs are compared. What a run lacks, the report says.
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: its folder, first on sys.path, would hide other packages behind ours
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from varscale.engine.launch import report_user_error
from varscale.errors import UserError
from varscale.reporting.html import to_html
from varscale.reporting.markdown import FIGURES, to_markdown
from varscale.reporting.runs import read_runs
from varscale.reporting.sections import build_report
from varscale.reporting.subjects import subjects
from varscale.reporting.tables import headlines

PAGE, TEXT = "index.html", "report.md"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m varscale.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the directories of runs")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder, or that of an older report"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.runs, options.out))
    except UserError as error:
        return report_user_error(error)
    return 0


def write_report(paths: Sequence[Path], out: Path) -> str:
    """Write the report of some runs to `out`, in place of an older one; returns what a terminal shows of it.

    Raises UserError for a path that is no run, and where `out` is something else than a report or cannot be written.
    """
    check_out(out)
    folder = out.resolve()  # "." has no name
    runs = read_runs(paths)
    command = shlex.join(["python", "-m", "varscale.report", *map(str, paths), "--out", str(out)])
    report = build_report(runs, command)
    page, text = to_html(report), to_markdown(report)
    new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))
    try:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        (new / FIGURES).mkdir(parents=True)
        (new / PAGE).write_text(page, encoding="utf-8")
        (new / TEXT).write_text(text, encoding="utf-8")
        for picture in report.pictures():
            (new / FIGURES / f"{picture.name}.png").write_bytes(picture.png)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    missing = [f"{run.name}: {what}" for run in runs for what in run.missing]
    places = f"page {out / PAGE}, Markdown {out / TEXT}"
    return "\n".join([headlines(subjects(runs)), "", *missing, places])


def check_out(out: Path) -> None:
    """Raises UserError unless `out` may be replaced: it is not there, or empty, or holds a report and nothing else."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out}: exists and is no folder; name a new one")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    figures = out / FIGURES
    foreign = names - {PAGE, TEXT, FIGURES}
    if figures.is_dir():
        foreign |= {f"{FIGURES}/{path.name}" for path in figures.iterdir() if path.suffix != ".png"}
    if foreign:
        raise UserError(f"--out {out}: is not the folder of a report (it holds {sorted(foreign)[0]}); name a new one")


if __name__ == "__main__":
    sys.exit(main())
