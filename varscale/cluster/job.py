"""What runs on the nodes of a job: `run_task` is submitted to Slurm, `run_here` to this machine.

python -m varscale.cluster.job begin         before the ranks: prints the port on which they will meet
python -m varscale.cluster.job rank LEADER   one rank of process LEADER on this machine, with torchrun's variables set
python -m varscale.cluster.job end STATUS    after the ranks: requeues Slurm's job, or says how it ended
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import submitit

from varscale import train
from varscale.cluster import slurm
from varscale.cluster.start import CANCELLED, FAILED, Decision, Start
from varscale.cluster.submission import Submission
from varscale.engine.stopping import PREEMPTED, ended_at_once
from varscale.errors import UserError

PR_SET_PDEATHSIG = 1  # of Linux' prctl
KILL_WAIT = 30  # seconds that ranks on this machine get to end after another one failed
CONTROLLER_WAIT, CONTROLLER_PAUSE = 600.0, 5.0  # seconds for Slurm's controller to come back, and between two questions


def run_task() -> None:
    """A task of Slurm's is one rank, its place among the others the one that Slurm gave it."""
    task = submitit.JobEnvironment()
    os.environ.update(
        RANK=str(task.global_rank),
        LOCAL_RANK=str(task.local_rank),
        WORLD_SIZE=str(task.num_tasks),
        LOCAL_WORLD_SIZE=str(task.num_tasks // task.num_nodes),
        MASTER_ADDR=task.hostnames[0],
    )
    with ended_at_once():
        run_rank()


def run_rank() -> None:
    """Train as one rank; ends the process with train.py's exit code, and leaves word of a failure."""
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        # submitit's handlers would requeue the job themselves. Until train.py sets its own there is nothing to save,
        # so that a signal may end the process at once.
        signal.signal(number, signal.SIG_DFL)
    start, rank = Start.from_environment(), int(os.environ["RANK"])
    arguments = ["--config", str(start.submission.runs[start.number].config), "--resume", "auto"]
    sys.argv = [train.__file__, *arguments]  # what the manifest records
    try:
        code = train.main(arguments)
    except Exception as error:
        start.write_rank_end(rank, PREEMPTED if _lost_others(error) else FAILED, traceback.format_exc())
        raise
    if code not in (0, train.PEER_FAILED):
        start.write_rank_end(rank, code)
    if code:
        sys.exit(code)


def _lost_others(error: Exception) -> bool:
    """Whether a collective broke because another rank is gone, rather than this one having failed."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def end(status: int) -> int:
    """Requeue Slurm's job if it goes on; otherwise leave word of how it ended. Returns the job's exit code."""
    start = Start.from_environment()
    decision = start.decide(status)
    _say(start, decision)
    if decision.goes_on:
        try:
            _requeue(start.job)
            return decision.code
        except UserError as error:
            decision = Decision(False, FAILED, f"cannot be requeued: {error}")
            _say(start, decision)
    start.end(decision)
    return decision.code


def _requeue(job: str) -> None:
    """Put a job of Slurm's back into the queue, unless it was cancelled or requeued already.

    Slurm's controller may be away, to be restarted for instance. Raises UserError where it is for CONTROLLER_WAIT.
    """
    deadline = time.monotonic() + CONTROLLER_WAIT
    while True:
        try:
            found = slurm.states(job).get(job)
            if found is None or found.state == "RUNNING":
                slurm.requeue(job)
            return
        except UserError as error:
            if time.monotonic() > deadline:
                raise
            print(f"job {job}: cannot be requeued yet: {error}", flush=True)
        time.sleep(CONTROLLER_PAUSE)


def run_here(folder: str) -> None:
    """The runs of a submission one after another on this machine, each started again as long as it goes on.

    USR2 preempts: the ranks save and start again. TERM ends the job after saving.
    """
    submission = Submission.load(Path(folder))
    submission.job = submitit.JobEnvironment().job_id
    _end_with(int(submission.job))
    ranks: list[subprocess.Popen] = []
    ended = False

    def pass_on(number: int, _: object) -> None:
        nonlocal ended
        ended |= number == signal.SIGTERM
        for rank in ranks:
            rank.send_signal(number)

    signal.signal(signal.SIGUSR2, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    codes = []
    for number in range(len(submission.runs)):
        start = Start(submission, number, submission.job_of(number), 0)
        while True:
            port = start.begin()
            ranks[:] = [_start_rank(start, rank, port) for rank in range(submission.world_size)]
            decision = start.decide(_wait(ranks))
            if decision.goes_on and ended:
                decision = Decision(False, decision.code, CANCELLED)
            _say(start, decision)
            if not decision.goes_on:
                break
            start = replace(start, count=start.count + 1)
        start.end(decision)
        codes.append(decision.code)
        if ended:
            break
    sys.exit(max(codes))


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the one that started it ends, even if that is killed.

    A job is known by its leading process: without it nobody sees that ranks still write, and another job may begin.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # too late
        os.kill(os.getpid(), signal.SIGKILL)


def _start_rank(start: Start, rank: int, port: int) -> subprocess.Popen:
    world_size = start.submission.world_size
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | start.to_environment() | {key: str(value) for key, value in place.items()}
    with start.submission.log(start.job, rank).open("a") as log:
        command = [sys.executable, "-u", "-m", "varscale.cluster.job", "rank", str(os.getpid())]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Wait until all have ended, as srun does: a failed one ends the others. Returns the greatest exit code."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        if deadline is None and any(rank.returncode for rank in ranks):
            deadline = time.monotonic() + KILL_WAIT
        if deadline is not None and time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    return max(128 - rank.returncode if rank.returncode < 0 else rank.returncode for rank in ranks)


def _say(start: Start, decision: Decision) -> None:
    print(f"job {start.job}, start {start.count + 1}: {decision.reason}", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["begin"]:
            print(Start.from_environment().begin())
        case ["rank", leader]:
            _end_with(int(leader))
            with ended_at_once():
                run_rank()
        case ["end", status]:
            sys.exit(end(int(status)))
        case _:
            sys.exit(__doc__)
