"""`--profile` around a loop: what is recorded, what a run that ends early or a full disk leaves."""

import gzip
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from varscale.engine.distributed import Ranks
from varscale.engine.phases import phase
from varscale.engine.profiling import ACTIVE, UNSEEN, Profile


class Words:
    """What is said, in place of the progress bar, and how often something was done beside the steps."""

    def __init__(self):
        self.said, self.warned, self.asides = [], [], 0

    def say(self, message):
        self.said.append(message)

    def warn(self, message):
        self.warned.append(message)

    @contextmanager
    def aside(self, name):
        yield
        self.asides += 1


@pytest.fixture
def loop(tmp_path):
    """A function: so many steps of a run under a Profile; returns what was said."""

    def call(steps, *, wanted=True, rank=0, run=tmp_path):
        job = SimpleNamespace(config=SimpleNamespace(output_dir=run), profile=wanted)
        words = Words()
        ranks = Ranks(rank, rank, 2, 2, torch.device("cpu"))
        with Profile(job, ranks, words, finish=lambda trace: f"made of {trace.name}") as profile:
            for _ in range(steps):
                with phase("forward"):
                    torch.ones(8, 8) @ torch.ones(8, 8)
                profile.step()
        return words

    return call


def recorded(folder: Path, rank: int = 0) -> list[str]:
    """The names of the steps in a trace."""
    with gzip.open(folder / "profile" / f"trace-rank-{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return sorted(
        e["name"] for e in events if e["name"].startswith("ProfilerStep") and e.get("cat") == "user_annotation"
    )


def test_the_third_to_the_eighth_step_are_recorded(loop, tmp_path):
    words = loop(UNSEEN + ACTIVE + 4)
    assert (words.said, words.warned, words.asides) == (["made of trace-rank-0.json.gz"], [], 1)
    assert recorded(tmp_path) == [f"ProfilerStep#{step}" for step in range(UNSEEN, UNSEEN + ACTIVE)]


def test_a_run_that_ends_early_leaves_what_there_is(loop, tmp_path):
    assert loop(UNSEEN + 1).said
    assert recorded(tmp_path)[0] == f"ProfilerStep#{UNSEEN}"


@pytest.mark.parametrize("steps", [0, 1, UNSEEN])
def test_a_run_that_ends_before_is_told_so(loop, tmp_path, steps):
    words = loop(steps)
    assert not words.said
    assert "--profile: the run ended within 2 steps" in words.warned[0]
    assert not (tmp_path / "profile").exists()


def test_every_rank_leaves_a_trace_and_the_first_speaks(loop, tmp_path):
    assert not loop(UNSEEN + ACTIVE, rank=1).said
    assert len(recorded(tmp_path, rank=1)) == ACTIVE


def test_nothing_is_done_unasked(loop, tmp_path):
    words = loop(UNSEEN + ACTIVE, wanted=False)
    assert not words.said + words.warned
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_ends_no_run(loop, tmp_path):
    (tmp_path / "file").write_text("")
    words = loop(UNSEEN + ACTIVE + 1, run=tmp_path / "file")
    assert "--profile" in words.warned[0]
    assert "training goes on" in words.warned[0]
