"""A contender of bench_train.py in a process of its own: the program that runs there, and its row in the table here."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from train_contenders import CONTENDERS, ENVIRONMENT, Job, Steps


@dataclass
class Row:
    """A contender in the table: views of its step, and its rounds, as `measure` gives them, or why there are none."""

    name: str
    title: str
    form: str
    precision: str = ""
    overrides: list[str] = field(default_factory=list)
    views: int = 0
    rounds: list[dict[str, float]] = field(default_factory=list)
    absent: str = ""


class Process:
    """The process of one row."""

    def __init__(self, row: Row, job: Job, folder: Path) -> None:
        self.row, self.log, self.process = row, None, None
        if CONTENDERS[row.name].wants_cuda and not has_cuda():
            row.absent = "needs a GPU"
            return
        self.log = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by end
        command = [sys.executable, __file__, json.dumps({"name": row.name, "job": job._asdict()})]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, env=ENVIRONMENT, text=True, bufsize=1, **pipes)

    def begin(self) -> None:
        """Wait until it is set up, and have it take its first step, in which much is set up as well."""
        if missing := self._answer().get("missing"):
            self.row.absent = f"{missing} is not installed: {CONTENDERS[self.row.name].install}"
        self._ask("1 0")
        self._answer()

    def run(self, untimed: int, timed: int) -> None:
        """A round."""
        self._ask(f"{untimed} {timed}")
        if answer := self._answer():
            self.row.rounds.append(answer)

    def dismiss(self) -> None:
        """Tell it to end."""
        if self.process:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def end(self) -> None:
        """Wait until it has ended, or kill it."""
        if self.process:
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
            self.log.close()

    def _ask(self, line: str) -> None:
        if not self.row.absent:
            with contextlib.suppress(BrokenPipeError):  # its answer, or the lack of one, tells
                print(line, file=self.process.stdin, flush=True)

    def _answer(self) -> dict:
        """What it says next; nothing where it has failed, which is noted in its row."""
        if self.row.absent:
            return {}
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip()
        print(f"{self.row.title} failed:\n{said[-5000:]}", file=sys.stderr)
        self.row.absent = f"failed: {said.splitlines()[-1][:200] if said else 'it said nothing'}"
        return {}


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def serve(name: str, job: Job) -> None:
    """Sets a contender up and answers on stdout, in lines of JSON, what stdin asks: a number of untimed and of timed
    steps, a round.

    It says first that it is ready, or what is not installed; on a GPU it then keeps no memory between its turns.
    """
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def answer(**values: object) -> None:
        print(json.dumps(values), file=report, flush=True)

    with contextlib.ExitStack() as stack:
        try:
            steps_of = stack.enter_context(CONTENDERS[name].open(job))
        except ModuleNotFoundError as error:
            answer(missing=error.name)
            return
        import torch  # not before the contender has

        answer(missing=None)
        for line in sys.stdin:
            found = measure(steps_of, *map(int, line.split()))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            answer(**found)


def measure(steps_of: Steps, untimed: int, timed: int) -> dict[str, float]:
    """Seconds of `timed` steps and of waiting for data in them, once `untimed` steps have filled the pipeline; on a GPU
    also the largest memory taken, bytes."""
    import torch

    on_gpu = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    with contextlib.closing(steps_of(untimed + timed)) as steps:
        for _ in range(untimed):
            next(steps)
        synchronize()
        start = time.perf_counter()
        waited = sum(next(steps) for _ in range(timed))
        synchronize()
        seconds = time.perf_counter() - start
    found = {"seconds": seconds, "waited": waited}
    if on_gpu:
        found["memory"] = torch.cuda.max_memory_allocated()
    return found


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    serve(arguments["name"], Job(**arguments["job"]))
