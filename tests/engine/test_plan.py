"""What --dry-run prints of memory and messages follows the ZeRO stage and the number of ranks."""

import pytest

from varscale.config import load_config, resolve_batch, resolve_deepspeed
from varscale.engine.plan import describe


def table(section):
    return {line.split()[0]: line.split()[1:] for line in section.splitlines()[1:] if line}


@pytest.fixture
def plan(digits):
    def lines(zero, world_size):
        config = load_config("digits-vssl", [f"data.dir={digits}", "data.image_size=16", f"deepspeed.config={zero}"])
        sizes = resolve_batch(config.batch, world_size)
        text = describe(config, sizes, resolve_deepspeed(config, sizes))
        _, memory, messages = f"{text}\n\n== messages".split("\n\n== m", maxsplit=3)[:3]
        return table(memory), table(messages)

    return lines


def test_partitioned_memory_is_a_share(plan):
    (whole, _), (shared, _) = plan("zero0", 4), plan("zero3", 4)
    # Of the teacher also what is gathered, which stays until it follows the student.
    for name, share in (("parameters", 1 / 4), ("teacher", 1 + 1 / 4)):
        assert float(shared[name][0]) == pytest.approx(float(whole[name][0]) * share, abs=1e-3)
    for memory in (whole, shared):
        parts = [float(memory[name][0]) for name in memory if name not in ("peak", "loader")]
        assert float(memory["peak"][0]) == pytest.approx(sum(parts), abs=5e-3)


def test_the_loaders_memory_is_named(plan):
    memory, _ = plan("zero0", 1)
    # 5 micro-batches of 64 images, two views of 16 pixels each, and 2 times a worker's image; 320 samples.
    assert float(memory["loader"][0]) == pytest.approx(5 * 64 * 2 * 16 * 16 * 3 / 2**30, abs=1e-3)
    assert " ".join(memory["loader"][1:]).startswith("GiB of the host's: 5 micro-batches of views")


def test_messages_are_listed_for_several_ranks(plan):
    (_, alone), (_, stage_0), (_, stage_3) = plan("zero0", 1), plan("zero0", 4), plan("zero3", 4)
    assert not alone
    assert stage_0["gradients"][0] == "all_reduce"
    assert stage_3["gradients"][0] == "reduce_scatter_tensor"
    assert stage_3["teacher"][0] == "all_gather_into_tensor"
    # A ring all-reduce sends 2 x 3/4 of the gradients, reduce-scatter and two gatherings 3/4 each of nearly as much.
    assert float(stage_3["a"][2]) == pytest.approx(1.5 * float(stage_0["a"][2]), rel=0.02)


def test_a_json_of_ones_own_may_leave_the_threshold_to_deepspeed(plan, tmp_path):
    (tmp_path / "own.json").write_text('{"train_batch_size": "auto", "zero_optimization": {"stage": 3}}')
    _, messages = plan(tmp_path / "own.json", 4)
    _, ours = plan("zero3", 4)
    assert messages == ours
