"""Watching a submission: the table of its runs, what rank 0 prints, and which rank failed where."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from varscale.cluster import slurm
from varscale.cluster.slurm import JobState
from varscale.cluster.start import CANCELLED, FAILED, rank_ends
from varscale.cluster.submission import Submission
from varscale.engine.rundir import read_metrics
from varscale.engine.stopping import PREEMPTED
from varscale.errors import UserError

LOOK, ASK = 0.5, 5.0  # seconds between two looks at files, and between two questions to Slurm, which dislikes them
HEADINGS = ("run", "job", "state", "nodes", "step", "restarts", "images/s")


def states(submission: Submission) -> list[JobState]:
    """How the job of each run stands: by its own last word, or else by Slurm's, or by its process on this machine."""
    ends = [submission.end(job) for job in submission.jobs]
    asked: dict[str, JobState] = {}
    if None in ends:
        if submission.cluster == "slurm":
            asked = slurm.states(submission.job) if submission.job else {}
        elif _leader_lives(submission):
            asked = dict.fromkeys(submission.jobs, JobState("RUNNING", nodes="this machine"))
    said = [end and JobState(_state(end), end["reason"]) for end in ends]
    return [own or asked.get(job, JobState("UNKNOWN")) for own, job in zip(said, submission.jobs, strict=True)]


def _state(end: dict) -> str:
    if end["reason"] == CANCELLED:
        return CANCELLED.upper()
    return "FAILED" if end["code"] else "COMPLETED"


def is_alive(submission: Submission, number: int) -> bool:
    """Whether a run's job still runs or waits."""
    return not states(submission)[number].is_over


def print_status(submission: Submission) -> int:
    """Print a table with a line for each run, and below it the first failure of each."""
    rows, failures = [HEADINGS], []
    for run, job, state in zip(submission.runs, submission.jobs, states(submission), strict=True):
        lines = [line for line in read_metrics(run.directory / "metrics.jsonl") if line["kind"] == "train"]
        step = f"{lines[-1]['step'] if lines else 0} of {run.total_steps}"
        rates = [line["images_per_second"] for line in lines[-2:] if "images_per_second" in line]
        rate = f"{rates[-1]:.0f}" if rates else "-"
        starts = submission.starts(job)
        restarts = int(starts[-1].suffix[1:]) if starts else 0
        shown = f"{state.state} ({state.reason})" if state.reason else state.state
        rows.append((run.name, job, shown, state.nodes or "-", step, str(restarts), rate))
        failures += [_headline(submission, job, end) for start in starts[-1:] for end in _failures(start)[:1]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("", f"logs: {submission.folder}", *failures, sep="\n")
    return 0


def follow(submission: Submission) -> int:
    """Print what rank 0 of each run prints, and each failure of a rank, until all jobs ended; returns the exit code."""
    prefixes = [f"[{run.name}] " if len(submission.runs) > 1 else "" for run in submission.runs]
    news = [_news(submission, job, prefix) for job, prefix in zip(submission.jobs, prefixes, strict=True)]
    try:
        for _ in _until_over(submission):
            for printer in news:
                next(printer)
    except KeyboardInterrupt:
        run = submission.folder.parents[1]
        print(f"\njob {submission.job} goes on; python slurm/submit.py status|follow|cancel {run}")
        return 130
    for job, state in zip(submission.jobs, states(submission), strict=True):
        print(f"job {job}: {state.state.lower()}" + (f" ({state.reason})" if state.reason else ""))
    return max((submission.end(job) or {"code": FAILED})["code"] for job in submission.jobs)


def _until_over(submission: Submission) -> Iterator[None]:
    """Yield every now and then until all jobs have ended, and once more after that.

    Slurm is asked for jobs that end without a word. It is believed the second time: one that it is about to requeue may
    look as if it had ended.
    """
    over, asked = 0, -ASK
    while over < 2:
        yield
        time.sleep(LOOK)
        if all(submission.end(job) for job in submission.jobs):
            over = 2
        elif time.monotonic() > asked + ASK:
            asked = time.monotonic()
            with suppress(UserError):  # Slurm's controller may be away for a while
                over = over + 1 if all(state.is_over for state in states(submission)) else 0
    time.sleep(LOOK)  # a last word may still be on its way to the log
    yield


def end_local(submission: Submission) -> None:
    """Tell a job on this machine to save and end."""
    if _leader_lives(submission):
        os.kill(int(submission.job), signal.SIGTERM)


def _news(submission: Submission, job: str, prefix: str) -> Iterator[None]:
    """Print, at each `next`, what is new of a job: lines of rank 0's log, and failures of ranks."""
    log, place, unfinished = submission.log(job), 0, ""
    told: set[Path] = set()
    while True:
        if log.is_file():
            with log.open(errors="replace", newline="") as file:
                file.seek(place)
                *lines, unfinished = re.split(r"[\r\n]+", unfinished + file.read())  # a progress bar's end in \r
                place = file.tell()
            for line in filter(None, lines):
                print(prefix + line, flush=True)
        for start in submission.starts(job):
            for end in _failures(start):
                path = start / f"rank-{end['rank']}.json"
                if path not in told:
                    print(prefix + _headline(submission, job, end), flush=True)
                    if end["rank"] > 0 and end["code"] != PREEMPTED:  # rank 0's is in the log above
                        print(end["traceback"], end="", flush=True)
                told.add(path)
        yield


def _failures(start: Path) -> list[dict]:
    """How ranks ended that were not told to."""
    return [end for end in rank_ends(start) if end["code"] != PREEMPTED or end["traceback"]]


def _headline(submission: Submission, job: str, end: dict) -> str:
    """One line on how a rank ended, with its last words."""
    words = ""
    with suppress(OSError, IndexError):
        words = (end["traceback"] or submission.log(job, end["rank"]).read_text(errors="replace")).splitlines()[-1]
    what = "lost the others" if end["code"] == PREEMPTED else f"failed with exit code {end['code']}"
    return f"rank {end['rank']} on {end['node']} {what}: {words}"


def _leader_lives(submission: Submission) -> bool:
    """Whether the process that leads a job on this machine is still there, and is that process."""
    with suppress(OSError, TypeError):
        command = Path(f"/proc/{submission.job}/cmdline").read_bytes().decode()
        return str(submission.folder) in command
    return False
