"""Asking Slurm: what a partition holds, how a job stands. Nothing here needs accounting (sacct) to be configured."""

import difflib
import re
import shutil
import subprocess
from dataclasses import dataclass

from varscale.cluster.settings import ClusterSettings, minutes
from varscale.errors import UserError

FORGOTTEN = "Invalid job id"  # what Slurm says of a job that ended a while ago
OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "UNKNOWN"}


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job: its state and, where there is one, the reason; the nodes it is on."""

    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in OVER


def check_fits(settings: ClusterSettings) -> None:
    """Raise UserError where no job of this shape could ever start: Slurm itself would keep it waiting for ever."""
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch on this machine: run this on a cluster's login node, or use --cluster local")
    partitions = {}
    for line in _ask("sinfo", "-h", "-o", "%P|%D|%l").splitlines():
        name, nodes, limit = line.split("|")
        partitions[name.rstrip("*")] = (int(nodes), limit)
        if name.endswith("*"):
            partitions.setdefault("", partitions[name.rstrip("*")])
    wanted = settings.partition or ""
    if wanted not in partitions:
        names = sorted(filter(None, partitions))
        if not wanted:
            raise UserError(f"--partition is needed: this cluster has no default; choose from {', '.join(names)}")
        nearest = difflib.get_close_matches(wanted, names, 1, 0)
        raise UserError(f"--partition {wanted!r}: choose from {', '.join(names)}; nearest: {nearest[0]}")
    nodes, limit = partitions[wanted]
    place = f"partition {wanted}" if wanted else "the default partition"
    if settings.nodes > nodes:
        raise UserError(f"--nodes is {settings.nodes}, but {place} has {nodes}")
    if limit != "infinite" and minutes(settings.time) > minutes(limit):
        raise UserError(f"--time is {settings.time}, but {place} allows {limit}")


def states(job: str) -> dict[str, JobState]:
    """The states of a job or, of an array, of each task by its name (12_0); empty where Slurm has forgotten it."""
    found: dict[str, JobState] = {}
    if shutil.which("scontrol") is None:  # another machine's job, its directory copied here
        return found
    for line in _ask("scontrol", "-o", "show", "job", job, unless=FORGOTTEN).splitlines():
        values = dict(re.findall(r"(?:^|\s)(JobId|ArrayTaskId|JobState|Reason|NodeList)=(\S*)", line))
        reason, nodes = (values.get(key, "").replace("(null)", "") for key in ("Reason", "NodeList"))
        state = JobState(values["JobState"], "" if reason == "None" else reason, nodes)
        if "ArrayTaskId" in values:
            array = job.partition("_")[0]
            found |= {f"{array}_{task}": state for task in _expand(values["ArrayTaskId"])}
        else:
            found[values["JobId"]] = state
    if not found and shutil.which("sacct"):
        lines = _ask("sacct", "-n", "-X", "-P", "-o", "JobID,State,NodeList", "-j", job, unless="disabled").splitlines()
        found = {name: JobState(state.split()[0], "", nodes) for name, state, nodes in (x.split("|") for x in lines)}
    return found


def log_of(job: str) -> str | None:
    """The file a job writes to; None where Slurm does not know the job."""
    found = re.search(r"\sStdOut=(\S+)", _ask("scontrol", "-o", "show", "job", job, unless=FORGOTTEN))
    return found and found[1]


def requeue(job: str) -> None:
    """Put a running job back into the queue, which ends it here."""
    _ask("scontrol", "requeue", job)


def cancel(job: str) -> None:
    """End a job, or all of an array; it saves a checkpoint if there is time."""
    _ask("scancel", job)


def _ask(*command: str, unless: str | None = None) -> str:
    """What a command of Slurm prints; where it fails, UserError with its own words, or "" if they hold `unless`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]}: {error}") from None
    if done.returncode == 0:
        return done.stdout
    if unless and unless in done.stderr:
        return ""
    raise UserError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")


def _expand(tasks: str) -> list[int]:
    """The numbers in Slurm's way of naming tasks that still wait, such as 1,3-5%2."""
    ranges = [part.split("-") for part in tasks.partition("%")[0].split(",")]
    return [number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)]
