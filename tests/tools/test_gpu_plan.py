"""The plan for a GPU machine: its runs in small, what becomes of stages that fail or hang, what is brought along."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def plan(tool):
    return tool("gpu_plan")


@pytest.fixture
def run(repository, tmp_path):
    """tools/gpu_plan.sh with everything in tmp_path; returns the completed process."""

    def start(*arguments, **environment):
        own = {"OUT": tmp_path / "out", "WORK": tmp_path / "work", "PYTHON": sys.executable} | environment
        return subprocess.run(
            [repository / "tools" / "gpu_plan.sh", *map(str, arguments)],
            env=os.environ | {name: str(value) for name, value in own.items()},
            capture_output=True,
            text=True,
            timeout=1800,
        )

    return start


def stages(ended, out, name):
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    document = json.loads((out / f"{name}.json").read_text())
    assert (document["run"], document["toy"]) == (name.removeprefix("run"), True)
    assert {stage["outcome"] for stage in document["stages"]} == {"done"}
    assert (out / f"{name}.md").read_text().strip() in ended.stdout
    return {stage["title"]: stage for stage in document["stages"]}


@pytest.mark.timeout(1800)
def test_the_first_run_in_small(run, tmp_path):
    found = stages(run("--toy", 1), tmp_path / "out", "run1")
    assert list(found) == [
        "smoke",
        "tests that need a GPU",
        "objectives",
        "normalisation",
        "augmentation",
        "loaders",
        "memory",
    ]
    assert all(stage["tables"][0] for stage in found.values())
    counts = found["tests that need a GPU"]["tables"][0][0]
    assert int(counts.get("passed", 0)) + int(counts.get("skipped", 0)) > 0
    assert found["objectives"]["tables"][0][0][""] == "varcon_loss"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_worth_the_most_in_small(run, tmp_path):
    found = stages(run("--toy", "first"), tmp_path / "out", "first")
    assert list(found) == ["smoke", "step", "profile", "tests that need a GPU"]
    assert all(stage["tables"][0] for stage in found.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_second_run_in_small(run, tmp_path):
    found = stages(run("--toy", 2), tmp_path / "out", "run2")
    assert [row["title"] for row in found["step"]["left"][0]["rows"]] == ["varscale", "supervised, cross-entropy"]
    assert [row["views"] for row in found["batch sizes"]["left"][0]["rows"]] == [8, 16]
    assert sum(found["profile"]["left"][0]["host"].values()) > 0
    assert [row["overrides"] for row in found["ZeRO stages, layout, precision"]["left"][0]["rows"]] == [
        [],
        ["deepspeed.config=zero2"],
        ["compute.channels_last=false"],
        ["compute.precision=float32"],
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_third_run_in_small(run, tmp_path):
    found = stages(run("--toy", 3), tmp_path / "out", "run3")
    assert list(found) == ["smoke", "conversion", "the time of a step", "training, 2 epochs", "evaluation"]
    assert found["training, 2 epochs"]["left"][0][-1]["step"] > 0
    measured = found["evaluation"]["left"][0]
    assert "linear_cached" in json.dumps(measured)
    assert "knn" in json.dumps(measured)


def test_the_plan_knows_all_tests_that_need_a_gpu(plan, repository):
    mark = "@pytest.mark." + "gpu"
    marked = {path for path in (repository / "tests").rglob("test_*.py") if mark in path.read_text()}
    assert {repository / name for name in plan.GPU_TESTS} == marked


def test_the_third_run_needs_no_installed_varscale(repository, tmp_path):
    code = "import runpy, sys; plan = runpy.run_path(sys.argv[1]); stages = plan['training'](plan['parse_arguments']("
    code += "['3', '--toy', '--out', 'out', '--work', 'work'])); next(stages); print(stages.send({}).title)"
    ended = subprocess.run(
        # Without the site's .pth files there are other packages, but none that is installed in place.
        [sys.executable, "-S", "-c", code, repository / "tools" / "gpu_plan.py"],
        env={"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.stdout.strip() == "conversion", ended.stderr


def test_a_stage_that_fails_and_one_that_hangs_are_told_and_the_others_go_on(plan, monkeypatch, tmp_path, capsys):
    def python(code):
        return [sys.executable, "-c", code]

    marker, child, hanging = tmp_path / "marker", tmp_path / "child.py", tmp_path / "hanging.py"
    child.write_text(f"import time\nwhile True:\n    open({str(marker)!r}, 'w').close()\n    time.sleep(0.05)\n")
    hanging.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, {str(child)!r}])\n")

    def made(options):
        first = yield plan.Stage("first", python("print('| a | b |\\n|---|---|\\n| 1 | 2 |\\n')"), 60)
        assert first["tables"] == [[{"a": "1", "b": "2"}]]
        failed = yield plan.Stage("failing", python("import sys; print('so far', file=sys.stderr); sys.exit(3)"), 60)
        assert failed["exit_code"] == 3
        yield plan.Stage("hanging", [sys.executable, str(hanging)], 3)
        yield plan.Stage(
            "last", python(f"open({str(tmp_path / 'x.json')!r}, 'w').write('[7]')"), 60, (f"{tmp_path}/x.json",)
        )

    monkeypatch.setitem(plan.RUNS, "1", made)
    assert plan.main(["1", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 1
    document = json.loads((tmp_path / "out" / "run1.json").read_text())
    assert [stage["outcome"] for stage in document["stages"]] == [
        "done",
        "FAILED with exit code 3",
        "FAILED: out of time",
        "done",
    ]
    assert document["stages"][-1]["left"] == [[7]]
    assert b"so far" in (tmp_path / "out" / "run1.log").read_bytes()
    assert "| hanging | FAILED: out of time |" in capsys.readouterr().out
    marker.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not marker.exists()  # what the stage had started has ended with it


def test_stages_get_what_is_left_of_the_runs_time(plan, monkeypatch, tmp_path, capsys):
    def made(options):
        yield plan.Stage("too long", [sys.executable, "-c", "import time; time.sleep(60)"], 100)
        left = yield plan.Stage("left out", [sys.executable, "-c", "raise SystemExit(9)"], 100)
        assert (left["exit_code"], left["left"]) == (None, [])

    monkeypatch.setitem(plan.RUNS, "1", made)
    monkeypatch.setattr(plan, "machine", dict)
    start = time.monotonic()
    command = ["1", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--seconds", "8"]
    assert plan.main(command) == 1
    assert time.monotonic() - start < 45
    document = json.loads((tmp_path / "out" / "run1.json").read_text())
    outcomes = [stage["outcome"] for stage in document["stages"]]
    assert outcomes == ["FAILED: out of time", "LEFT OUT: no time was left"]
    assert "| left out | LEFT OUT: no time was left | 0 |" in capsys.readouterr().out


def measured(row_seconds):
    return {"exit_code": 0, "left": [{"rows": [{"step_seconds": row_seconds}]}]}


@pytest.fixture(scope="module")
def real_stages(plan, digits, tmp_path_factory):
    """The stages of every run as they are on a GPU, by the run's name."""
    from varscale.data.dataset import read_dataset_info, write_dataset_info

    folder = tmp_path_factory.mktemp("plan")
    (folder / "cifar100.npz").touch()
    found = {}
    for run, stages in plan.RUNS.items():
        arguments = [run, "--out", str(folder), "--work", str(folder / run), "--cifar100", str(folder / "cifar100.npz")]
        (folder / run / "data").mkdir(parents=True)  # what the conversion would have left
        info = read_dataset_info(digits)
        write_dataset_info(folder / run / "data", replace(info, counts=info.counts | {"train": (5000,) * 10}))
        found[run], results = [], []
        for stage in plan.stages_with_results(stages(plan.parse_arguments(arguments)), results):
            found[run].append(stage)
            results.append(measured(0.2))
    return found


def test_the_limits_of_a_runs_stages_fit_into_a_call(plan, real_stages):
    assert [len(stages) for stages in real_stages.values()] == [4, 7, 6, 5]
    for run, stages in real_stages.items():
        assert sum(stage.limit for stage in stages) <= plan.RUN_LIMIT == 540, run
    assert sum(stage.limit for stage in real_stages["first"]) <= 440


def test_every_stage_is_understood_by_its_program(real_stages, tool, repository, monkeypatch, tmp_path):
    """By the program's own parser, and configurations by its own loading: a slip must not be found on the machine."""
    from varscale import evaluate, train
    from varscale.config import load_config, resolve_batch, resolve_deepspeed

    monkeypatch.syspath_prepend(repository / "tools")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    parsed = set()
    for stage in (stage for stages in real_stages.values() for stage in stages):
        program, *arguments = stage.command[1:]
        parsed.add(Path(program).stem if program != "-m" else arguments[0])
        if program == "varscale/train.py":
            options = train.parse_arguments(arguments)
            config = load_config(options.config, options.overrides)
            resolve_deepspeed(config, resolve_batch(config.batch, 1))
        elif program == "-m" and arguments[0] == "varscale.evaluate":
            evaluate.choose_evaluators(evaluate.parse(arguments[1:]).evaluators)
        elif program == "-m" and arguments[0] == "pytest":
            assert all((repository / name).is_file() for name in arguments if name.endswith(".py"))
        elif program == "tools/convert_dataset.py":
            tool("convert_dataset").parse_conversion(arguments)
        elif program == "tools/gpu_smoke.py":
            assert not arguments
        else:
            bench = tool(Path(program).stem)
            options = bench.parse_arguments(arguments)
            if hasattr(bench, "overrides_of"):
                config = load_config(options.config, bench.overrides_of(options, tmp_path))
                bench.check(config)
                assert bench.rows_of(options, config, tmp_path)
            elif hasattr(options, "overrides"):
                load_config(options.config, options.overrides)
            elif hasattr(options, "zero"):
                assert all(bench.resolve(case, zero) for case in options.case for zero in options.zero)
    assert parsed == {
        "gpu_smoke", "pytest", "bench_objectives", "bench_augmentation", "bench_loader", "bench_memory", "bench_norm",
        "bench_train", "train", "convert_dataset", "varscale.evaluate",
    }  # fmt: skip


def test_what_training_needs_is_there(plan, repository):
    ended = subprocess.run(
        [sys.executable, repository / "tools" / "gpu_smoke.py"], capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (table,) = plan.tables(ended.stdout)  # whatever packages say as they are imported
    found = {row["what"]: row["version"] for row in table}
    assert found["FFCV's compiled library"] == "decodes"
    assert found["deepspeed"].startswith("0.")
    assert list(found.values())[-1] == "imported"


def test_the_tables_of_a_text(plan):
    text = "before\n\n| a |  |\n|---|---|\n| 1 | x |\n| 2 | y |\nafter\n| no | table |\n\n| c |\n|---|\n"
    assert plan.tables(text) == [[{"a": "1", "": "x"}, {"a": "2", "": "y"}], []]
    assert plan.test_counts("..s\n==== 2 passed, 1 skipped, 9 deselected in 4.50s ====\n") == [
        [{"passed": "2", "skipped": "1", "deselected": "9"}]
    ]
    assert plan.test_counts("1 failed, 3 passed in 90.1s (0:01:30)") == [[{"failed": "1", "passed": "3"}]]
    assert plan.test_counts("nothing") == []


def test_the_epochs_that_fit(plan):
    assert plan.epochs_that_fit(minutes=10, steps_per_epoch=48, step_seconds=0.25) == int(600 * plan.SAFE_SHARE / 12)
    assert plan.epochs_that_fit(minutes=1, steps_per_epoch=1000, step_seconds=1) == 1


def test_a_part_is_received_and_run_3_wants_all_of_the_data(run, tmp_path):
    assert "which run" in run().stderr
    missing = run(3)
    assert missing.returncode == 2
    assert "run 3 needs CIFAR-100" in missing.stderr
    content = bytes(range(256)) * 8
    for number, piece in enumerate((content[:1000], content[1000:]), start=1):
        part = tmp_path / f"part{number}"
        part.mkdir()
        (part / f"cifar100.npz.0{number}").write_bytes(piece)
    (tmp_path / "part1" / "cifar100.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  cifar100.npz\n")
    assert run("receive", tmp_path / "part1").returncode == 0
    incomplete = run(3)
    assert incomplete.returncode == 2
    assert "receive every part of the bundle" in incomplete.stderr
    assert run("receive", tmp_path / "part2").returncode == 0
    run(3, PYTHON="true")  # all there: it goes on
    assert (tmp_path / "work" / "cifar100.npz").read_bytes() == content


def test_the_bundle_refuses_what_it_cannot_make(repository, tmp_path):
    def bundle(*arguments):
        command = [repository / "tools" / "gpu_bundle.sh", *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return ended.returncode, ended.stderr.strip().splitlines()[-1]

    assert bundle() == (2, "gpu_bundle: a folder for the parts is needed")
    assert bundle("--cifar100", tmp_path / "x.npz", tmp_path) == (
        2,
        f"gpu_bundle: --cifar100 {tmp_path / 'x.npz'}: no such file",
    )
    assert bundle("--lacks", "nosuch", tmp_path / "a") == (2, "gpu_bundle: --lacks nosuch: not in requirements.lock")
    (tmp_path / "part1").mkdir()
    assert "already holds parts" in bundle(tmp_path)[1]
