"""One start of a job: how its ranks ended, and whether the job goes on.

Only the run's own checkpoints say where it stands, and every start is `train.py --resume auto`. So it makes no
difference whether the job was preempted, requeued by hand, reached its time limit or lost a node: it goes on unless all
is done, a rank failed by its own fault, or `idle_requeues` starts brought no new checkpoint.
"""

import json
import os
import random
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from varscale.cluster.submission import Submission
from varscale.engine.rundir import latest_checkpoint
from varscale.engine.stopping import PREEMPTED
from varscale.files import replace_text

EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
FAILED = 1
CANCELLED = "cancelled"  # the reason of a job that its user ended


class Decision(NamedTuple):
    """Whether the job goes on; if not, its exit code; and why, for people."""

    goes_on: bool
    code: int
    reason: str


@dataclass(frozen=True)
class Start:
    """Start `count` (from 0) of `job`, for run `number` of a submission."""

    submission: Submission
    number: int
    job: str
    count: int

    @classmethod
    def from_environment(cls) -> "Start":
        """The start that this process belongs to, as the job's script or local.py exported it."""
        values = {key: os.environ[f"VARSCALE_{key}"] for key in ("SUBMISSION", "RUN", "JOB", "START")}
        submission = Submission.load(Path(values["SUBMISSION"]))
        return cls(submission, int(values["RUN"]), values["JOB"], int(values["START"]))

    def to_environment(self) -> dict[str, str]:
        values = {"SUBMISSION": self.submission.folder, "RUN": self.number, "JOB": self.job, "START": self.count}
        return {f"VARSCALE_{key}": str(value) for key, value in values.items()}

    @property
    def folder(self) -> Path:
        return self.submission.folder / f"{self.job}.{self.count}"

    def begin(self) -> int:
        """Before the ranks start, on the node of rank 0: the port on which they will meet."""
        self.folder.mkdir(exist_ok=True)
        (self.submission.folder / f"{self.job}.end.json").unlink(missing_ok=True)
        return free_port()

    def write_rank_end(self, rank: int, code: int, traceback: str = "") -> None:
        """Leave word of how a rank ended; PREEMPTED if it was told to or, with a traceback, only lost the others."""
        node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        values = {"rank": rank, "node": node, "code": code, "traceback": traceback, "time": time.time()}
        with suppress(OSError):  # what is to be told is in the rank's log, too
            replace_text(self.folder / f"rank-{rank}.json", json.dumps(values))

    def decide(self, status: int) -> Decision:
        """What follows from the greatest exit code of the ranks, 128 + N where signal N ended one, and their words."""
        ends = rank_ends(self.folder)
        if failed := next((end for end in ends if end["code"] != PREEMPTED), None):
            return Decision(False, failed["code"], f"rank {failed['rank']} on {failed['node']} failed")
        if status == 0:
            return Decision(False, 0, "done")
        if status != PREEMPTED and status <= 128 and not ends:
            return Decision(False, status, f"the ranks could not start (exit code {status})")
        if any(not end["traceback"] for end in ends):
            cause = "preempted"
        else:
            cause = "a rank was stuck" if status == PREEMPTED else "a rank was lost"
        newest, idle = self._progress()
        if idle >= self.submission.idle_requeues:
            return Decision(False, FAILED, f"{cause}; given up: {idle} requeues brought no checkpoint after {newest}")
        return Decision(True, status, f"{cause}; goes on from {newest}")

    def end(self, decision: Decision) -> None:
        """Leave word of how the job ended."""
        values = {"code": decision.code, "reason": decision.reason, "time": time.time()}
        replace_text(self.submission.folder / f"{self.job}.end.json", json.dumps(values))

    def _progress(self) -> tuple[str, int]:
        """The newest checkpoint, and how many requeues before this decision brought no newer one."""
        checkpoint = latest_checkpoint(self.submission.runs[self.number].directory)
        newest = checkpoint.name if checkpoint else "the beginning"
        path = self.submission.folder / f"{self.job}.requeues.json"
        found = [*(json.loads(path.read_text()) if path.is_file() else []), newest]
        replace_text(path, json.dumps(found))
        same = next((n for n, name in enumerate(reversed(found)) if name != newest), len(found))
        return newest, same - 1


def rank_ends(folder: Path) -> list[dict]:
    """How ranks of a start ended where all went not well, the first one first: rank, node, code, traceback, time."""
    ends = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
    return sorted(ends, key=lambda end: end["time"])


def free_port() -> int:
    """A port that nobody listens on, outside the range from which the kernel takes ports of outgoing connections.

    It is probed anew for each start: one that follows from the job's number would meet its own predecessor's remains.
    """
    first, last = map(int, EPHEMERAL_PORTS.read_text().split())
    outside = [port for port in range(10000, 65536) if not first <= port <= last]
    for port in random.sample(outside, min(len(outside), 100)):
        with suppress(OSError):
            return _bind(port)
    return _bind(0)  # some machines' range leaves no room: then any that is free


def _bind(port: int) -> int:
    """Bind a port, or with 0 any that is free, and let go of it again; returns its number, or raises OSError."""
    with socket.socket() as probe:
        probe.bind(("", port))
        return probe.getsockname()[1]
