#!/usr/bin/env python
"""The stages of benchmarks/gpu.md, one run after another; tools/gpu_plan.sh starts it where everything is installed.

    python tools/gpu_plan.py 2 --out results --work work            # needs a GPU
    python tools/gpu_plan.py 2 --out results --work work --toy      # the same stages in small, on a CPU

Each stage is a command with a time limit of its own; one that fails or hangs is reported, and the next one begins. A
run has a limit as well: stages get what is left of it, and those for which nothing is left are left out. What they
print goes to stdout and, as a whole, to OUT/runN.md; their tables, and the JSON that they write, to OUT/runN.json,
which is written again after every stage; what they say on stderr to OUT/runN.log. Ends with 1 where one is not done.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # varscale is imported from here, whether it is installed or not
TOY_PATIENCE = 10  # times the limits of the real run
RUN_LIMIT = 540  # seconds; no run's stages may have more together
LEAST = 5  # seconds; with less a stage cannot even begin
GPU_TESTS = [  # those of parts take seconds, those of whole runs half a minute each
    "tests/test_triton_launch.py",
    "tests/distributed/test_norm.py",
    "tests/distributed/test_norm_kernels.py",
    "tests/engine/test_throughput.py",
    "tests/data/test_augment.py",
    "tests/test_waiting.py",
    "tests/test_profile_runs.py",
    "tests/test_survival.py",
]
TOY_TESTS = ["tests/data/test_augment.py"]
SAFE_SHARE = 0.85  # of the time for training that epochs may take by the step's time: the rest is checkpoints and kNN


class Stage(NamedTuple):
    """A command with its time limit in seconds, and the JSON or JSON lines that it leaves behind, as glob patterns."""

    title: str
    command: list[str]
    limit: int
    leaves: tuple[str, ...] = ()


Stages = Generator[Stage, dict, None]  # each stage's result comes back from its `yield`


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    place = options.out / (f"run{options.run}" if options.run.isdigit() else options.run)
    found_machine = machine()
    results: list[dict] = []
    stages = RUNS[options.run](options)
    with open(place.with_suffix(".md"), "w") as text, open(place.with_suffix(".log"), "wb") as log:

        def show(words: str) -> None:
            for file in (sys.stdout, text):
                print(f"\n{words}", file=file, flush=True)

        for stage in stages_with_results(stages, results):
            if options.toy:  # which may be run where others work, too
                stage = stage._replace(limit=TOY_PATIENCE * stage.limit)
            left = int(options.ends - time.monotonic())
            stage = stage._replace(limit=min(stage.limit, left))
            result = perform(stage, log) if left >= LEAST else left_out(stage)
            results.append(result)
            show(f"## {stage.title}: {result['outcome']}, {result['seconds']:.0f} s of {stage.limit}\n")
            show(f"    {result['command']}\n\n{result.pop('printed').strip()}")
            document = {"run": options.run, "toy": options.toy, "machine": found_machine, "stages": results}
            place.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        overview = [f"| {result['title']} | {result['outcome']} | {result['seconds']:.0f} |" for result in results]
        show("\n".join(["| stage | outcome | seconds |", "|---|---|---|", *overview]))
    return 1 if any(result["outcome"] != "done" for result in results) else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--out", type=Path, required=True, help="for the results, three files a run")
    parser.add_argument("--work", type=Path, required=True, help="for data and checkpoints")
    parser.add_argument("--toy", action="store_true", help="in small, on any machine")
    parser.add_argument("--seconds", type=float, default=RUN_LIMIT, help="that the run may take (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=5, help="that run 3 trains (default: 5)")
    parser.add_argument("--cifar100", type=Path, metavar="NPZ", help="for run 3: x_train, y_train, x_test, y_test")
    options = parser.parse_args(arguments)
    options.out, options.work = options.out.resolve(), options.work.resolve()  # stages run in another folder
    options.ends = time.monotonic() + options.seconds * (TOY_PATIENCE if options.toy else 1)
    if options.run == "3" and not options.toy and (options.cifar100 is None or not options.cifar100.is_file()):
        parser.error("run 3 needs --cifar100 FILE.npz (tools/gpu_bundle.sh --cifar100 brings it along)")
    return options


def first(options: argparse.Namespace) -> Stages:
    """What is worth the most where there is one call: our step beside two others, its profile, then the GPU tests."""
    yield SMOKE
    yield step_beside(options, ["ours", "usual-amp", "supervised"], 180)
    yield profile(options, 50)
    yield gpu_tests(TOY_TESTS if options.toy else GPU_TESTS, 170)


def kernels(options: argparse.Namespace) -> Stages:
    """Run 1: the tests that need a GPU, kernels, loaders, memory."""
    yield SMOKE
    yield gpu_tests(TOY_TESTS if options.toy else GPU_TESTS, 185)
    small = ["--shapes", "64,10,16", "--repeats", "1"] if options.toy else ["--device", "cuda"]
    yield Stage("objectives", tool("bench_objectives", *small), 45)
    small = ["--encoder", "resnet18", "--image-size", "32", "--batch", "4", "--rounds", "1"]
    yield Stage("normalisation", tool("bench_norm", *(small if options.toy else [])), 40)
    settings = ["--config", "imagenet100-varcon", "batch.global_batch_size=64", "--sizes", "32", "224"]
    settings += ["--classes", "100", "--policies", "simaugment", "byol"]
    small = ["--policies", "crop_flip", "--sizes", "16", "--repeats", "1", "batch.global_batch_size=4"]
    yield Stage("augmentation", tool("bench_augmentation", *(small if options.toy else settings)), 90)
    path = options.work / "loaders.json"
    settings = ["--count", "256", "--rounds", "2", "--cores", str(len(os.sched_getaffinity(0)))]
    settings += ["--only", "ours", "torchvision", "ours-colour", "pil-colour", "decoding"]
    small = ["--images", "cifar", "--count", "8", "--batch-size", "4", "--rounds", "1", "--cores", "1"]
    small += ["--only", "ours"]
    command = tool("bench_loader", *(small if options.toy else settings), "--json", str(path))
    yield Stage("loaders", command, 90, (str(path),))
    path = options.work / "memory.json"
    cases = ["imagenet100-varcon batch.global_batch_size=64", "cifar100-varcon batch.global_batch_size=512"]
    cases = ["digits-varcon batch.global_batch_size=8"] if options.toy else [*cases, "cifar100-vssl"]
    chosen = [word for case in cases for word in ("--case", case)]
    command = tool("bench_memory", *chosen, "--zero", "zero0", "--json", str(path))
    yield Stage("memory", command, 50, (str(path),))


def steps(options: argparse.Namespace) -> Stages:
    """Run 2: the training step beside others, its profile, then ours at several settings."""
    yield SMOKE
    yield step_beside(options, ["ours", "usual-amp", "lightly", "supervised"], 170)
    yield profile(options, 40)
    batches, zeros, compiled = "64,128,512", "zero1,zero2,zero3", "true"
    if options.toy:
        batches, zeros, compiled = "8", "zero2", "false"  # a CPU would compile for minutes
    varied = ["--vary", f"batch.global_batch_size={batches}"]
    yield bench(options, "batch sizes", 60, "batch", "--only", "ours", *varied)
    varied = [f"deepspeed.config={zeros}", "compute.channels_last=false", "compute.precision=float32"]
    varied = [word for setting in varied for word in ("--vary", setting)]
    yield bench(options, "ZeRO stages, layout, precision", 70, "zero", "--only", "ours", *varied)
    # Last, for it may take all the time that is left: compilation alone took more than 80 seconds on an H100's machine.
    yield bench(options, "compiled", 160, "compiled", "--only", "ours", "--vary", f"compute.compile={compiled}")


def step_beside(options: argparse.Namespace, names: list[str], limit: int) -> Stage:
    """Ours beside others, on images that are kept for `profile`."""
    names = ["ours", "supervised"] if options.toy else names
    options.images = fresh(options.work / "images")
    # Two bursts of as many batches as the others have worker processes on 16 cores.
    return bench(options, "step", limit, "step", "--only", *names, "--folder", str(options.images), steps=32)


def bench(options: argparse.Namespace, title: str, limit: int, name: str, *arguments: str, steps: int = 10) -> Stage:
    path = options.work / f"{name}.json"
    scale = ["--encoder", "resnet50", "--image-size", "224", "--batch", "256", "--rounds", "3", "--steps", str(steps)]
    scale += ["--warm-up", "12"]
    if options.toy:
        scale = ["--batch", "4", "--image-size", "16", "--stem", "imagenet", "--rounds", "1", "--steps", "1"]
        scale += ["--warm-up", "1", "--data", "synthetic"]
    arguments = (*scale, "--seconds", str(limit // 3), *arguments, "--json", str(path))  # a round more must fit
    return Stage(title, tool("bench_train", *arguments), limit, (str(path),))


def profile(options: argparse.Namespace, limit: int) -> Stage:
    """Where the time of the step goes that `step_beside` has measured."""
    run = fresh(options.work / "profile")
    command = python("varscale/train.py", "--config", "cifar10-varcon", "--profile")
    small = ["data.image_size=16", "encoder={name: resnet18, stem: imagenet}", "batch={global_batch_size: 4}"]
    large = ["data.image_size=224", "encoder={name: resnet50, stem: imagenet}", "batch={global_batch_size: 256}"]
    command += [*(small if options.toy else large), f"data.dir={options.images / 'converted'}", "schedule.epochs=1"]
    command += ["schedule.warmup_epochs=0", "online_knn.every_epochs=0", f"output_dir={run}", "logging.trackers=[]"]
    return Stage("profile", command, limit, (f"{run}/profile/profile.json",))


def training(options: argparse.Namespace) -> Stages:
    """Run 3: VarCon with ResNet-50 on CIFAR-100, as many of the recipe's epochs as fit, then what it has learned."""
    yield SMOKE
    from varscale.config import load_config
    from varscale.data.dataset import read_dataset_info

    recipe, batch = ("digits-varcon", 64) if options.toy else ("cifar100-varcon", 1024)
    source = "digits" if options.toy else f"npz:{options.cifar100}"
    data, run, measured = options.work / "data", fresh(options.work / "run"), options.work / "measured.json"
    small = ["data.image_size=16", "data.crop_scale=[0.5,1.0]", "data.flip=0.0"] if options.toy else []
    yield Stage("conversion", tool("convert_dataset", source, str(data), "--overwrite"), 30)
    encoder = ["--encoder", "resnet18", "--stem", "imagenet"] if options.toy else ["--encoder", "resnet50"]
    rounds = ["--rounds", "1", "--steps", "1", "--warm-up", "1"] if options.toy else ["--rounds", "2", "--steps", "5"]
    bench = ["--config", recipe, *encoder, "--batch", str(batch), "--data", str(data), "--only", "ours", *rounds]
    limit = f"batch.max_micro_batch_size={load_config(recipe).batch.max_micro_batch_size or 'null'}"
    found = yield Stage(
        "the time of a step", tool("bench_train", *bench, limit, *small, "--json", str(measured)), 70, (str(measured),)
    )
    step = next((row["step_seconds"] for left in found["left"] for row in left["rows"] if "step_seconds" in row), None)
    if step is None or not (data / "dataset.json").is_file():
        return  # reported as failed; without it the epochs that fit are not known
    images = read_dataset_info(data).num_samples("train")
    schedule = load_config(recipe).schedule
    epochs = 2 if options.toy else epochs_that_fit(options.minutes, images // batch, step)
    warm_up = schedule.warmup_epochs * epochs / schedule.epochs
    settings = [f"schedule.epochs={epochs}", f"schedule.warmup_epochs={warm_up:g}", "logging.trackers=[]"]
    settings += [f"online_knn.every_epochs={math.ceil(epochs / 4)}", "checkpoint.every_steps=1000000"]
    settings += [f"safety.time_limit_minutes={options.minutes:g}", f"data.dir={data}", f"output_dir={run}", *small]
    command = python("varscale/train.py", "--config", recipe, *settings)
    yield Stage(f"training, {epochs} epochs", command, round(60 * options.minutes) + 30, (f"{run}/metrics.jsonl",))
    evaluators = python("-m", "varscale.evaluate", "--checkpoint", str(run), "knn", "linear_cached")
    yield Stage("evaluation", evaluators, 70, (f"{run}/evaluation/*.json",))


def gpu_tests(files: list[str], limit: int) -> Stage:
    """Each test and its time are told as it ends, for what happens where the stage does not come to its own end."""
    arguments = ["-v", "--durations=0", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
    arguments.append("--continue-on-collection-errors")
    return Stage("tests that need a GPU", python("-m", "pytest", *arguments, *files), limit)


def epochs_that_fit(minutes: float, steps_per_epoch: int, step_seconds: float) -> int:
    """How many whole epochs fit into `SAFE_SHARE` of the time; at least one."""
    return max(1, int(60 * minutes * SAFE_SHARE / (steps_per_epoch * step_seconds)))


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def tool(name: str, *arguments: str) -> list[str]:
    return python(f"tools/{name}.py", *arguments)


SMOKE = Stage("smoke", tool("gpu_smoke"), 40)
# By name: generators of their stages.
RUNS = {"first": first, "1": kernels, "2": steps, "3": training}


def fresh(folder: Path) -> Path:
    """A name under which there is nothing yet: this folder's, with a number."""
    return next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}{n}")).exists())


def stages_with_results(stages: Stages, results: list[dict]) -> Iterator[Stage]:
    """The stages; each is sent the last result, which the caller appends before it asks for the next."""
    with contextlib.suppress(StopIteration):
        yield next(stages)
        while True:
            yield stages.send(results[-1])


def perform(stage: Stage, log) -> dict:
    """Run a stage, with all the processes that it starts, for its time limit at most."""
    log.write(f"\n== {stage.title}: {shlex.join(stage.command)}\n".encode())
    log.flush()
    for path in (path for pattern in stage.leaves for path in Path(pattern).parent.glob(Path(pattern).name)):
        path.unlink()  # of an earlier run
    start, outcome = time.monotonic(), "done"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=stage.limit)
    except subprocess.TimeoutExpired:
        outcome = "FAILED: out of time"
        os.killpg(process.pid, signal.SIGKILL)
        try:
            printed, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired as error:
            printed, outcome = error.stdout or b"", f"{outcome}; a process that it started is still running"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode and outcome == "done":
        outcome = f"FAILED with exit code {process.returncode}"
    printed = printed.decode(errors="replace")
    return left_out(stage) | {
        "outcome": outcome,
        "exit_code": process.returncode,
        "seconds": time.monotonic() - start,
        "tables": tables(printed) or test_counts(printed),
        "left": [content for pattern in stage.leaves for content in left_behind(Path(pattern))],
        "printed": printed,
    }


def left_out(stage: Stage) -> dict:
    """The result of a stage for which no time was left."""
    command = shlex.join(["python", *stage.command[1:]])
    nothing = {"exit_code": None, "seconds": 0, "tables": [], "left": [], "printed": ""}
    return {"title": stage.title, "command": command, "outcome": "LEFT OUT: no time was left", **nothing}


def left_behind(pattern: Path) -> Iterator[object]:
    """The contents of the JSON files that match; of JSON lines a list."""
    for path in sorted(pattern.parent.glob(pattern.name)):
        text = path.read_text()
        yield [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables in a text: rows by the names of their columns."""
    found, lines = [], text.splitlines()
    for number, line in enumerate(lines):
        if number and re.fullmatch(r"\|[-|: ]*---[-|: ]*", line.strip()):
            heads, rows = _cells(lines[number - 1]), []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(dict(zip(heads, _cells(row), strict=False)))
            found.append(rows)
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_counts(text: str) -> list[list[dict[str, str]]]:
    """One row of pytest's last line: how many passed, failed, were skipped."""
    ends = re.findall(r"^=*\s*((?:\d+ [a-z]+,? ?)+)(?:in [\d.]+s.*)$", text, flags=re.MULTILINE)
    return [[{what: number for number, what in re.findall(r"(\d+) ([a-z]+)", ends[-1])}]] if ends else []


def machine() -> dict[str, str]:
    """The device and the version of torch; asked in a process of its own, which leaves the device alone afterwards."""
    code = "import torch as t; print(t.__version__, t.cuda.get_device_name() if t.cuda.is_available() else 'CPU')"
    version, device = subprocess.check_output(python("-c", code), text=True).strip().split(" ", 1)
    return {"device": device, "cores": str(len(os.sched_getaffinity(0))), "torch": version}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stage is ended, too
    sys.exit(main())
