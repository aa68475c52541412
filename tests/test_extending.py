"""Another objective and another evaluator: a file each, and nothing else but the section and the name."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest

SECTION = '''
class AlignmentConfig(ObjectiveConfig):
    """Views of one image alike."""

    needs_labels: ClassVar[bool] = False
    name: Literal["alignment"] = "alignment"
    weight: PositiveFloat = 1.0


OBJECTIVES: dict'''

LEARNER = """
    from varscale.engine.learners.base import Learner
    from varscale.models.networks import build_embedding_network


    def build(encoder, config, num_classes, total_steps):
        return AlignmentLearner(encoder, config.objective.weight)


    class AlignmentLearner(Learner):
        def __init__(self, encoder, weight):
            self.network = build_embedding_network(encoder, embedding_dim=32)
            self.weight = weight

        def loss(self, forward, batch):
            first, second = forward(*batch.views).chunk(2)
            loss = self.weight * (1 - (first * second).sum(dim=1).mean())
            return loss, {"loss": loss}
"""

EVALUATOR = """
    from varscale.config import Section
    from varscale.evaluation.context import NUMBER, Result


    class Settings(Section):
        scale: float = 1.0


    def run(context, settings):
        images = len(context.val.features)
        return Result({"scaled": settings.scale * images}, settings.model_dump(), (), {"scaled": NUMBER})
"""


@pytest.fixture
def extended(repository, tmp_path):
    """A function that runs a program of a copy of varscale that has one more of each."""
    copy = tmp_path / "copy" / "varscale"
    shutil.copytree(repository / "varscale", copy, ignore=shutil.ignore_patterns("__pycache__"))

    def add(file, line, lines):
        text = (copy / file).read_text()
        assert text.count(line) == 1
        (copy / file).write_text(text.replace(line, lines))

    add("config/objectives.py", "\nOBJECTIVES: dict", SECTION)
    (copy / "engine" / "learners" / "alignment.py").write_text(textwrap.dedent(LEARNER))
    add("evaluation/__init__.py", '    "knn",\n', '    "knn",\n    "image_count",\n')
    (copy / "evaluation" / "image_count.py").write_text(textwrap.dedent(EVALUATOR))

    def run(*command):
        whole = [sys.executable, *map(str, command)]
        return subprocess.run(whole, cwd=copy.parent, capture_output=True, text=True, timeout=300)

    return run


def test_another_objective_and_evaluator_take_a_file_each(extended, small_run, digits, tmp_path):
    train = ("varscale/train.py", "--config", "digits-simclr", *small_run, f"output_dir={tmp_path / 'run'}")
    chosen = ("objective={name: alignment, weight: 2.0}", "schedule.warmup_epochs=0", "schedule.epochs=1")

    mistaken = extended(*train, "objective={name: alignmnt}")
    assert mistaken.returncode == 2
    assert "nearest: alignment" in mistaken.stderr

    done = extended(*train, *chosen)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 5
    assert 0 < losses[-1] < losses[0] <= 4

    measured = extended(
        "-m", "varscale.evaluate", "--checkpoint", tmp_path / "run", "--data", digits, "image_count",
        "image_count.scale=2.0",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    (result,) = (tmp_path / "run" / "evaluation").glob("step-*.json")
    (of_run,) = (row for row in json.loads(result.read_text())["results"] if row["evaluator"] == "image_count")
    assert of_run["settings"] == {"scale": 2.0}
    assert of_run["metrics"] == {"scaled": 200.0}  # of 100 validation images
