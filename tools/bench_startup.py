#!/usr/bin/env python
"""How long a run takes from the command to the end of its first optimizer step, and what takes that time.

    python tools/bench_startup.py                              # digits-varcon on this machine's cores, 5 warm starts
    python tools/bench_startup.py --cold                       # and before them one without any cache
    python tools/bench_startup.py --against ../other-checkout  # the two taking turns

A start is a real one, `varscale/train.py` in a new process, which ends itself behind its first step. Each second is
counted once: a package's import without the imports in it that have a row of their own. CPU seconds, of all threads,
are what a busy machine changes least. "Cold" has no compiled code of numba's and no .pyc files; the operating system's
cache of files stays as it is.
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]
STARTED = "BENCH_STARTUP_BEGAN"  # in the child's environment: when it was asked for
PACKAGES = ("torch", "torch._dynamo", "torchvision", "deepspeed", "numba", "numpy", "pydantic", "accelerate", "sklearn")
STAGES = {  # module -> what is called there -> its row
    "varscale.train": {
        "load_config": "check the configuration",
        "resolve_deepspeed": "check the configuration",
        "check_training_data": "check the data",
        "check_run_directory": "check the data",
    },
    "varscale.engine.distributed": {"join": "join the process group"},
    "varscale.engine.learners": {"build_learner": "build the network"},
    "varscale.engine.opening": {"open_engine": "open DeepSpeed's engine", "open_steps": "open the loader"},
    "varscale.engine.telemetry": {"Telemetry": "open metrics and trackers"},
}


class Clock:
    """Seconds and CPU seconds by row, each counted once: for what is innermost."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.cpu_seconds: Counter[str] = Counter()
        self.rows, self.since, self.cpu_since = ["everything else"], float(os.environ[STARTED]), 0.0
        self.turn("start python")

    def turn(self, row: str) -> None:
        """Count what passed since the last turn for `row`."""
        now, cpu_now = time.time(), time.process_time()
        self.seconds[row] += now - self.since
        self.cpu_seconds[row] += cpu_now - self.cpu_since
        self.since, self.cpu_since = now, cpu_now

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        self.turn(self.rows[-1])
        self.rows.append(name)
        try:
            yield
        finally:
            self.turn(self.rows.pop())

    def timed(self, function: Callable, row: str) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            with self.row(row):
                return function(*args, **kwargs)

        return call


class Watch(importlib.abc.MetaPathFinder):
    """Counts the time of imports, and wraps the stages of a start as soon as their modules are there."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name not in PACKAGES and name not in STAGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec and spec.loader:
            execute = spec.loader.exec_module
            if name in PACKAGES:
                execute = self.clock.timed(execute, f"import {name}")

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.wrap(module)

            spec.loader.exec_module = exec_module
        return spec

    def wrap(self, module: ModuleType) -> None:
        for name, row in STAGES.get(module.__name__, {}).items():
            setattr(module, name, self.clock.timed(getattr(module, name), row))


def child(arguments: list[str]) -> None:
    """Run train.py until its first step is done, and print the table as JSON."""
    clock = Clock()
    sys.meta_path.insert(0, Watch(clock))
    with clock.row("import the rest"):
        from varscale import train
    take_step, run = train.take_step, train.run
    with_imports = clock.timed(run, "everything else")

    def first_step(*args: object) -> None:
        import torch

        with clock.row("first step"):
            take_step(*args)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        clock.turn("everything else")
        print(json.dumps([clock.seconds, clock.cpu_seconds]), flush=True)
        os._exit(0)

    train.take_step, train.run = first_step, with_imports
    train.main(arguments)


Start = tuple[dict[str, float], dict[str, float]]  # seconds and CPU seconds by row


def start(checkout: Path, recipe: str, overrides: list[str], *, cold: bool) -> Start:
    """One start of the code in `checkout`."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(checkout), STARTED: repr(time.time())}
        if cold:
            environment |= {"NUMBA_CACHE_DIR": f"{folder}/numba", "PYTHONPYCACHEPREFIX": f"{folder}/bytecode"}
        command = [sys.executable, __file__, "--child", "--config", recipe, f"output_dir={folder}/run", *overrides]
        done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def table(starts: dict[str, list[Start]]) -> str:
    """A row for each part and for all together; three columns for each kind of start."""
    columns = {}
    for title, runs in starts.items():
        seconds, cpu_seconds = zip(*runs, strict=True)
        for what, choose, found in (
            ("median", statistics.median, seconds),
            ("least", min, seconds),
            ("least CPU", min, cpu_seconds),
        ):
            names = {name for run in found for name in run}
            cells = {name: choose([run.get(name, 0.0) for run in found]) for name in names}
            columns[f"{title}, {what}"] = cells | {"all": choose([sum(run.values()) for run in found])}
    names = {name for cells in columns.values() for name in cells}
    names = sorted(names, key=lambda name: max(cells.get(name, 0.0) for cells in columns.values()))
    lines = ["| seconds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        values = (f"{cells.get(name, 0.0):.2f}" for cells in columns.values())
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits-varcon", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="also one start without caches")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, the two taking turns")
    options = parser.parse_intermixed_args()
    checkouts = {"warm": REPOSITORY} | ({"the other": options.against.resolve()} if options.against else {})
    starts: dict[str, list[Start]] = {}
    if options.cold:
        starts["cold"] = [start(REPOSITORY, options.config, options.overrides, cold=True)]
    for repeat in range(options.repeats + 1):
        for title, checkout in checkouts.items():
            found = start(checkout, options.config, options.overrides, cold=False)
            if repeat:  # the first one made the caches
                starts.setdefault(title, []).append(found)
    cores = len(os.sched_getaffinity(0))
    print(f"{options.config} {' '.join(options.overrides)}: {options.repeats} starts, {cores} cores\n")
    print(table(starts))


if __name__ == "__main__":
    main()
