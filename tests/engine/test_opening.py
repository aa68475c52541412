"""What a run is made of: garbage is collected between steps only, and what is compiled is the same network."""

import gc
import json
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch

from varscale.config import load_config, resolve_batch, resolve_deepspeed
from varscale.data.loader import ViewLoader
from varscale.engine import opening
from varscale.engine.distributed import Ranks
from varscale.engine.launch import Job, check_training_data
from varscale.engine.opening import garbage_left_alone
from varscale.errors import UserError


def test_no_garbage_is_collected_in_a_step_and_all_of_it_afterwards():
    before = gc.get_freeze_count()
    with garbage_left_alone():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > before
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.fixture
def job(digits):
    """A function: a training job on 16-pixel digits with these overrides, on one rank."""

    def describe(*overrides):
        config = load_config("digits-varcon", [f"data.dir={digits}", "data.image_size=16", *overrides])
        sizes = resolve_batch(config.batch, 1)
        return Job(config, sizes, resolve_deepspeed(config, sizes), check_training_data(config, sizes), profile=False)

    return describe


ALONE = Ranks(0, 0, 1, 1, torch.device("cpu"))


class Cycle:
    def __init__(self):
        self.itself = self


def test_garbage_that_outlived_its_steps_is_collected_between_epochs(job):
    steps = opening.open_steps(job(), ALONE)
    with garbage_left_alone():
        kept = Cycle()
        gc.collect()  # into the oldest generation
        gone = weakref.ref(kept)
        del kept
        epoch = steps(1, 0)
        next(epoch)
        assert gone() is None
        epoch.close()


@pytest.mark.parametrize(("accumulation", "ahead"), [(1, 3), (8, 8)])
def test_the_micro_batches_of_a_whole_step_are_decoded_ahead(job, monkeypatch, accumulation, ahead):
    opened = []

    class Loader(ViewLoader):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            opened.append(self)

    monkeypatch.setattr(opening, "ViewLoader", Loader)
    opening.open_steps(job(f"batch.gradient_accumulation_steps={accumulation}"), ALONE)
    assert [loader.batches_ahead for loader in opened] == [ahead]


LAYOUT = """
    import torch
    from varscale.config import load_config, resolve_batch, resolve_deepspeed
    from varscale.engine import distributed
    from varscale.engine.learners import build_learner
    from varscale.engine.opening import open_engine
    from varscale.engine.zero import optimizer_state, restore_optimizer_state

    ranks = distributed.join()
    config = load_config("digits-vssl", ["optimizer.name=adamw", "deepspeed.config=zero0", *{overrides}])
    learner = build_learner(config, 10, 1, ranks.device)
    engine = open_engine(config, resolve_deepspeed(config, resolve_batch(config.batch, 1)), learner)
    torch.stack([p.sum() for p in engine.module.parameters()]).sum().backward()
    engine.optimizer.step()
    saved = optimizer_state(engine)
    restore_optimizer_state(engine, saved)
    engine.optimizer.step()  # fused: refuses a state whose layout is not the parameter's
    name = "encoder.layer1.0.conv1.weight"
    weight, teacher = (network.get_parameter(name) for network in (engine.module, learner.teacher.network))
    tensors = weight, teacher, engine.optimizer.state[weight]["exp_avg"], saved[name]["exp_avg"]
    print(*(tensor.is_contiguous() for tensor in tensors))
    distributed.leave()
"""


@pytest.mark.parametrize(
    ("overrides", "contiguous"),
    [
        (["compute.channels_last=true"], "False False False True"),
        (["compute.channels_last=false"], "True True True True"),
    ],
)
def test_weights_and_what_belongs_to_them_lie_in_memory_as_images_do(overrides, contiguous):
    code = textwrap.dedent(LAYOUT).replace("{overrides}", repr(overrides))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == [contiguous], done.stderr


def test_zero_3_is_not_compiled():
    config = load_config("digits-varcon", ["compute.compile=true", "deepspeed.config=zero3"])
    with pytest.raises(UserError, match=r"compute\.compile is true, but ZeRO stage 3 .*zero0 to zero2"):
        resolve_deepspeed(config, resolve_batch(config.batch, 1))


@pytest.mark.slow  # minutes: C++ is compiled
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("digits-varcon", ["deepspeed.config=zero2"]),
        ("digits-vssl", ["encoder.name=vit_ti", "encoder.stem=null", "encoder.patch_size=8"]),
        ("digits-supcon", ["batch.gradient_accumulation_steps=2", "data.local_views=2", "data.local_size=8"]),
    ],
)
def test_a_compiled_run_is_the_same_but_for_rounding(launch, small_run, tmp_path, recipe, overrides):
    lines = []
    for name in ("false", "true"):
        place = [f"output_dir={tmp_path / name}", f"compute.compile={name}", "schedule.warmup_epochs=0"]
        done = launch("varscale/train.py", "--config", recipe, *small_run, *overrides, *place, timeout=590)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    plain, compiled = ([line["loss"] for line in run] for run in lines)
    assert len(plain) == 10
    assert compiled[0] == pytest.approx(
        plain[0], rel=1e-5
    )  # later steps of a batch-normalised network magnify rounding
    assert compiled[:3] == pytest.approx(plain[:3], rel=1e-2)
    assert compiled != plain, "nothing was compiled"
