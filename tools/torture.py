#!/usr/bin/env python
"""Kill a run again and again, at random moments, and see that it ends with the same bits as one left alone.

    python tools/torture.py --kills 20 [--seed S] [--recipe digits-varcon] [--ranks 2] [key=value ...]

The ranks are real processes of the real program, ended by SIGKILL: all at once or one of them, while they start, in the
middle of a step, or while a checkpoint is being written, as often each; every time they are started again with --resume
auto. Exit code 0 only if parameters, optimizer, teacher, meters and every recorded metric of the end agree bit for bit.

The digits are converted where they are not. Any key of the recipe can be overridden; if none is, it takes two epochs,
with a checkpoint every three steps.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import cycle, islice
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from varscale.cluster.start import free_port
from varscale.config import load_config
from varscale.data.conversion import convert
from varscale.data.dataset import read_dataset_info
from varscale.data.sources import open_source
from varscale.engine.checkpoints import read_state
from varscale.engine.metrics import MEASURED
from varscale.engine.rundir import checkpoint_folder, latest_checkpoint, read_metrics
from varscale.errors import UserError

POLL = 0.005  # seconds
PATIENCE = 600.0  # seconds without a step
KINDS = STEPPING, STARTING, SAVING = "in a step", "while starting", "while saving"
UNEQUAL = {"time", *MEASURED}  # of metrics
SETTINGS = ("data.image_size=16", "data.workers=1", "logging.every_steps=1", "logging.trackers=[]")
# Not every step is recorded, so that checkpoints find something in the meters.
TORTURED = ("schedule.epochs=2", "schedule.warmup_epochs=1", "checkpoint.every_steps=3", "logging.every_steps=2")

# Ranks are forked from a server that has imported what takes long; each still runs the program from its beginning. CUDA
# does not survive a fork, and an import may have asked for it.
CONTEXT = multiprocessing.get_context("spawn" if Path("/dev/nvidiactl").exists() else "forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "deepspeed", "varscale.train", "varscale.engine.opening", "varscale.evaluation.online"]
)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 where the ends agree, 1 where they do not, 2 where nothing could be run."""
    options = parse_arguments(arguments)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        place = options.keep or Path(folder)
        overrides = [*TORTURED, *options.overrides]
        try:
            config = load_config(options.recipe, overrides)
            if config.data.dir == Path("data/digits") and not config.data.dir.exists():
                convert(open_source("digits"), Path(folder) / "digits")
                overrides.append(f"data.dir={folder}/digits")
            else:
                read_dataset_info(config.data.dir)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        names = ("undisturbed", "tortured")
        calm, tortured = (Run(place / name, options.recipe, overrides, options.ranks) for name in names)
        calm.start()
        calm.wait_for_end()
        steps = calm.steps()
        print(f"undisturbed: {steps} steps in {calm.seconds:.0f} s", flush=True)
        moments = sorted(rng.randrange(steps * 3 // 4) for _ in range(options.kills))  # later it might have ended
        first, *others = islice(cycle(KINDS), options.kills)  # the first shows how long a start takes
        kinds = [first, *rng.sample(others, len(others))]
        for moment, kind in tqdm(list(zip(moments, kinds, strict=True)), unit="kill", mininterval=1):
            tortured.start()
            tqdm.write(f"killed {tortured.torture(rng, kind, moment)}", file=sys.stderr)
        tortured.start()
        tortured.wait_for_end()
        return compare(calm, tortured, options.kills)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--recipe", default="digits-varcon", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave both runs in this folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as data.dir=data/digits")
    return parser.parse_intermixed_args(arguments)


class Run:
    """One run in `place`: its ranks as processes, started as often as they end."""

    def __init__(self, place: Path, recipe: str, overrides: Sequence[str], ranks: int = 1) -> None:
        self.place, self.ranks = place, ranks
        self.arguments = ["--config", recipe, *SETTINGS, *overrides, f"output_dir={place}", "--resume", "auto"]
        self.processes: list[BaseProcess] = []
        self.started_at = 0.0  # seconds since 1970
        self.shortest_start = PATIENCE  # seconds from a start to its first record, of those seen

    def start(self, target: Callable[..., None] | None = None) -> None:
        """Start all ranks, each with `rank_main` or what replaces it."""
        self.started, self.started_at = time.monotonic(), time.time()
        port = free_port()
        self.log = self.place.with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.processes = [
            CONTEXT.Process(target=target or rank_main, args=(self.arguments, rank, self.ranks, port, self.log))
            for rank in range(self.ranks)
        ]
        for process in self.processes:
            process.start()

    def wait_for_end(self, code: int = 0) -> None:
        """Wait until all ranks have ended with this exit code; raises RuntimeError with the log's end otherwise."""
        for process in self.processes:
            process.join()
        self.seconds = time.monotonic() - self.started
        codes = [process.exitcode for process in self.processes]
        if codes != [code] * self.ranks:
            raise RuntimeError(f"{self.place.name} ended with codes {codes}:\n{self.log.read_text()[-3000:]}")

    def wait_for_step(self, step: int) -> None:
        """Wait until so many steps, and one since the last start, are recorded; or the run ends."""
        self._wait_until(lambda: self.steps() > 0)
        self.shortest_start = min(self.shortest_start, time.time() - self.started_at)
        self._wait_until(lambda: self.steps() >= step)

    def torture(self, rng: random.Random, kind: str, moment: int) -> str:
        """Kill some ranks after about `moment` steps, and wait for the others' end; tells what was done."""
        victims = self.processes if rng.random() < 0.5 else [rng.choice(self.processes)]
        if kind == STARTING:
            patience = time.monotonic() + rng.uniform(0.0, self.shortest_start / 2)
            self._wait_until(lambda: time.monotonic() > patience or self.steps() > 0)
        elif kind == STEPPING:
            self.wait_for_step(moment)
            time.sleep(rng.uniform(0.0, 0.1))
        else:
            victims = sorted({self.processes[0], *victims}, key=self.processes.index)  # rank 0 is the one that writes
            self.wait_for_step(moment)
            self._wait_until(self.is_saving)
            time.sleep(rng.uniform(0.0, 0.05))
        if kind != SAVING:
            kind = STEPPING if self.steps() else STARTING
        if kind == STARTING:
            victims = self.processes  # who has not met the others yet would wait for them for minutes
        for process in victims:
            process.kill()
        for process in self.processes:
            process.join()
        if not any(process.exitcode == -signal.SIGKILL for process in victims):
            return f"nothing: it had ended ({kind} was meant)"
        ranks = ", ".join(str(self.processes.index(process)) for process in victims)
        return f"rank {ranks} of {self.ranks} {kind}, after {self.steps()} steps"

    def steps(self) -> int:
        """The last step that was recorded since the last start; 0 before there is one."""
        lines = read_metrics(self.place / "metrics.jsonl")
        return max((line["step"] for line in lines if line["time"] > self.started_at), default=0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written: what a killed run left of one is older."""
        with suppress(FileNotFoundError):
            asides = checkpoint_folder(self.place).glob(".writing-step-*")
            return any(path.stat().st_mtime > self.started_at for path in asides)
        return False

    def end(self) -> dict[str, str]:
        """What the run came to: a digest for each file of tensors, for the metrics and for where it stands."""
        checkpoint = latest_checkpoint(self.place)
        found = {path.name: digest(path.read_bytes()) for path in sorted(checkpoint.glob("*.safetensors"))}
        lines = read_metrics(self.place / "metrics.jsonl")
        metrics = [{key: value for key, value in line.items() if key not in UNEQUAL} for line in lines]
        state = read_state(checkpoint)["state"] | {"metrics_bytes": None}
        return found | {
            f"{len(lines)} metrics": digest(json.dumps(metrics, sort_keys=True).encode()),
            "state": digest(json.dumps(state).encode()),
        }

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for the condition, or for the run's end."""
        begin = time.monotonic()
        while not condition() and all(process.is_alive() for process in self.processes):
            if time.monotonic() - begin > PATIENCE:
                raise RuntimeError(f"{self.place.name} hangs:\n{self.log.read_text()[-3000:]}")
            time.sleep(POLL)


def rank_main(arguments: list[str], rank: int, ranks: int, port: int, log: Path) -> None:
    """One rank: the program as a launcher starts it, what it says in a file."""
    from varscale.train import main as train

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    sys.argv = ["train.py", *arguments]
    sys.exit(train(arguments))


def compare(calm: Run, tortured: Run, kills: int) -> int:
    ours, theirs = calm.end(), tortured.end()
    print(f"\n{'':24}{'undisturbed':20}after {kills} kills")
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name, "missing"), theirs.get(name, "missing")
        print(f"{name:24}{one[:16]:20}{other[:16]:20}{'equal' if one == other else 'DIFFERENT'}")
    return int(ours != theirs)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
