"""The bytes that a step hands to torch.distributed are those that the formulas predict."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

SIZE, CLASSES = 16, 10
STEPS = 3  # the last one is counted: in the second ZeRO-3 compares, once, the order of its parameters over ranks
SMALL = ["compute.precision=float32", f"data.image_size={SIZE}"]
CASES = {
    f"{recipe} {zero}": (recipe, [f"deepspeed.config={zero}"], CLASSES)
    for recipe in ("digits-varcon", "digits-vssl")
    for zero in ("zero0", "zero1", "zero2", "zero3")
}
ON_FOUR_RANKS = ("digits-varcon zero0", "digits-vssl zero3")
TWO = "batch.gradient_accumulation_steps=2"
MORE = {
    "vssl micro-batches, zero2": ("digits-vssl", ["deepspeed.config=zero2", TWO], CLASSES),
    "vssl micro-batches, zero3": ("digits-vssl", ["deepspeed.config=zero3", TWO], CLASSES),
    "varcon exact, zero2": ("digits-varcon", ["deepspeed.config=zero2", TWO], CLASSES),
    "vssl lars, zero2": (
        "digits-vssl",
        ["deepspeed.config=zero2", "optimizer.name=lars", "optimizer.exclude_bias_and_norm=true"],
        CLASSES,
    ),
    "varcon micro, zero0": ("digits-varcon", ["objective.centroids=micro", TWO], CLASSES),
}


def work(folder: Path) -> None:
    from varscale.config import load_config, resolve_batch, resolve_deepspeed
    from varscale.engine import distributed
    from varscale.engine.learners import MicroBatch, build_learner
    from varscale.engine.traffic import counted_traffic, step_traffic
    from varscale.train import open_engine, take_step

    found = {}
    with counted_traffic() as counted:
        ranks = distributed.join()
        for name, (recipe, overrides, classes) in json.loads((folder / "cases.json").read_text()).items():
            config = load_config(recipe, [*SMALL, f"batch.global_batch_size={8 * ranks.world_size}", *overrides])
            sizes = resolve_batch(config.batch, ranks.world_size)
            settings = resolve_deepspeed(config, sizes)
            learner = build_learner(config, classes, STEPS, ranks.device)
            predicted = step_traffic(config, sizes, settings, learner, classes)
            engine, _ = open_engine(config, settings, learner, None)
            views = torch.randn(2 * sizes.micro_batch_size, 3, SIZE, SIZE)
            labels = torch.arange(sizes.micro_batch_size) % classes
            for step in range(1, STEPS + 1):
                counted.clear()
                take_step(engine, learner, [MicroBatch(views, labels, labels)] * sizes.gradient_accumulation_steps)
                learner.after_step(step)
            found[name] = dict(counted), [message._asdict() for message in predicted]
    torch.save(found, folder / f"{ranks.rank}.pt")
    distributed.leave()


@pytest.fixture(scope="module")
def traffic(run_ranks, tmp_path_factory):
    """By world size: what each rank counted, and the messages predicted, case by case."""

    def run(world_size: int, cases: dict) -> list[dict]:
        folder = tmp_path_factory.mktemp("traffic")
        (folder / "cases.json").write_text(json.dumps(cases))
        return run_ranks(__file__, world_size, folder)

    return {2: run(2, CASES | MORE), 4: run(4, {name: CASES[name] for name in ON_FOUR_RANKS})}


def by_collective(messages: list[dict]) -> Counter:
    total = Counter()
    for message in messages:
        total[message["collective"]] += message["bytes"]
    return total


@pytest.mark.parametrize(
    ("world_size", "name"), [*((2, name) for name in CASES | MORE), *((4, name) for name in ON_FOUR_RANKS)]
)
def test_every_byte_is_predicted(traffic, world_size, name):
    for rank in traffic[world_size]:
        counted, predicted = rank[name]
        assert {key: value for key, value in counted.items() if value} == by_collective(predicted)


@pytest.mark.parametrize("name", ON_FOUR_RANKS)
def test_messages_do_not_grow_with_the_ranks(traffic, name):
    assert traffic[2][0][name][0] == traffic[4][0][name][0]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
