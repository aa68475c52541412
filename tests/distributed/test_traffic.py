"""The bytes that a step hands to torch.distributed are those that the formulas predict.

The steps are taken and counted by tools/bench_scaling.py.
"""

import functools
import json

import pytest

SMALL = ["compute.precision=float32", "data.image_size=16", "encoder.stem=imagenet"]
TWO = "batch.gradient_accumulation_steps=2"
LARS = ["optimizer.name=lars", "optimizer.exclude_bias_and_norm=true"]
# What they exchange grows: with the global batch classes present, embeddings and keys; with the ranks ZeRO-1's padding,
# where the parameters are no multiple of twice the ranks.
GROWING = ("varcon, a million classes", "supcon", "simclr", "mocov3", "cross_entropy")
# name -> recipe, what differs, classes
CASES = {
    "varcon zero0": ("digits-varcon", [], 10),
    "varcon exact, zero2": ("digits-varcon", ["deepspeed.config=zero2", TWO], 10),
    "varcon, a million classes": ("digits-varcon", [TWO], 1_000_000),
    "vssl zero1": ("digits-vssl", ["deepspeed.config=zero1"], 10),
    "vssl multi-crop": ("digits-vssl", ["data.local_views=2", "data.local_size=8"], 10),
    "vssl micro-batches, zero3": ("digits-vssl", ["deepspeed.config=zero3", TWO], 10),
    "supcon zero0": ("digits-supcon", [], 10),
    "simclr micro-batches, multi-crop": ("digits-simclr", ["data.local_views=2", "data.local_size=8", TWO], 10),
    "mocov3 micro-batches, multi-crop": ("digits-mocov3", ["data.local_views=2", "data.local_size=8", TWO], 10),
    "cross_entropy zero1": ("digits-cross_entropy", ["deepspeed.config=zero1"], 10),
}
SLOW = {
    "varcon zero1": ("digits-varcon", ["deepspeed.config=zero1"], 10),
    "varcon zero2": ("digits-varcon", ["deepspeed.config=zero2"], 10),
    "varcon zero3": ("digits-varcon", ["deepspeed.config=zero3"], 10),
    "varcon micro, zero0": ("digits-varcon", ["objective.centroids=micro", TWO], 10),
    "varcon, differentiable centroids": (
        "digits-varcon",
        ["objective.centroids=micro", "objective.detach_centroids=false"],
        10,
    ),
    "vssl zero0": ("digits-vssl", [], 10),
    "vssl micro-batches, zero2": ("digits-vssl", ["deepspeed.config=zero2", TWO], 10),
    "vssl lars, zero2": ("digits-vssl", ["deepspeed.config=zero2", *LARS], 10),
    "vssl zero3": ("digits-vssl", ["deepspeed.config=zero3"], 10),
    "supcon micro-batches, zero2": ("digits-supcon", ["deepspeed.config=zero2", TWO], 10),
    "byol zero2": ("digits-byol", ["deepspeed.config=zero2", TWO], 10),
    "mocov3 zero3": ("digits-mocov3", ["deepspeed.config=zero3"], 10),
}
TIERS = [(2, CASES), (2, SLOW), (4, CASES)]
PARAMETERS = [
    pytest.param(tier, name, id=f"{TIERS[tier][0]} ranks, {name}", marks=[pytest.mark.slow] if tier else [])
    for tier in range(len(TIERS))
    for name in TIERS[tier][1]
]


@pytest.fixture(scope="module")
def bench_scaling(tool):
    return tool("bench_scaling")


@pytest.fixture(scope="module")
def traffic(bench_scaling, run_ranks, tmp_path_factory):
    """By tier, a world size and some cases: what `count_step` found on each rank, case by case."""

    @functools.cache
    def run(tier: int) -> list[dict]:
        world_size, cases = TIERS[tier]
        folder = tmp_path_factory.mktemp("traffic")
        batch = f"batch.global_batch_size={8 * world_size}"
        cases = {name: (recipe, [*SMALL, batch, *more], classes) for name, (recipe, more, classes) in cases.items()}
        (folder / "cases.json").write_text(json.dumps(cases))
        return run_ranks(bench_scaling.__file__, world_size, folder)

    return run


@pytest.mark.parametrize(("tier", "name"), PARAMETERS)
def test_every_byte_is_predicted(bench_scaling, traffic, tier, name):
    for rank in traffic(tier):
        counted, calls, predicted, _ = rank[name]
        assert counted == bench_scaling.total(predicted, "bytes")
        expected_calls = bench_scaling.total(predicted, "calls")
        if "zero3" in name:  # DeepSpeed joins gatherings of neighbouring layers
            assert calls.pop("all_gather_into_tensor") <= expected_calls.pop("all_gather_into_tensor")
        assert calls == expected_calls


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(GROWING)])
def test_messages_do_not_grow_with_the_ranks(traffic, name):
    assert traffic(0)[0][name][0] == traffic(2)[0][name][0]
