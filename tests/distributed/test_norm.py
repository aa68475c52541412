"""Batch normalisation over 2 and 4 real processes against `nn.BatchNorm` on the union of their batches."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from varscale.models.norm import SyncBatchNorm, convert_batch_norm, frozen_running_statistics

CHANNELS = 3


class Case(NamedTuple):
    """Local batch sizes by rank (the first world_size of them), the shape behind (N, C), and how the values look."""

    sizes: tuple[int, ...]
    trailing: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    mean: float = 0.0
    std: float = 1.0
    channels_last: bool = False
    affine: bool = True
    momentum: float | None = 0.1


CASES = {
    "vectors": Case((4, 4, 4, 4)),
    "uneven": Case((5, 1, 3, 7)),
    "one_sample_each": Case((1, 1, 1, 1)),
    "empty_rank": Case((4, 0, 2, 0)),
    "images": Case((3, 1, 2, 2), (4, 5)),
    "channels_last": Case((3, 1, 2, 2), (4, 5), channels_last=True),
    "no_affine": Case((2, 3, 2, 3), affine=False),
    "cumulative": Case((2, 3, 2, 3), momentum=None),
    "far_from_zero": Case((33, 1, 20, 10), (4, 4), dtype=torch.float32, mean=1e3, std=1e-1),
    "bfloat16": Case((6, 3, 1, 6), (4, 4), dtype=torch.bfloat16, channels_last=True),
}
STEPS = 2
COMPILED = ("uneven", "channels_last", "no_affine", "far_from_zero", "bfloat16")


def make_layer(case: Case) -> nn.Module:
    kind = nn.BatchNorm2d if case.trailing else nn.BatchNorm1d
    layer = kind(CHANNELS, affine=case.affine, momentum=case.momentum)
    if case.affine:
        generator = torch.Generator().manual_seed(1)
        nn.init.normal_(layer.weight, generator=generator)
        nn.init.normal_(layer.bias, generator=generator)
    return layer.double() if case.dtype == torch.float64 else layer


def make_batch(case: Case, world_size: int, step: int) -> tuple[Tensor, Tensor]:
    """The union's inputs and output gradients."""
    generator = torch.Generator().manual_seed(step)
    shape = (sum(case.sizes[:world_size]), CHANNELS, *case.trailing)
    inputs, gradient = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return (
        (inputs * case.std + case.mean).to(case.dtype).contiguous(memory_format=layout),
        gradient.to(case.dtype).contiguous(memory_format=layout),
    )


def run(layer: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Outputs and input gradients of each batch, summed parameter gradients and the state left behind."""
    found = {}
    for step, (inputs, gradient) in enumerate(batches):
        inputs = inputs.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        outputs = layer(inputs)
        outputs.backward(gradient)
        found |= {f"output{step}": outputs.detach(), f"input_grad{step}": inputs.grad}
    found |= {f"{name}_grad": parameter.grad for name, parameter in layer.named_parameters()}
    return found | deepcopy(dict(layer.state_dict()))


def work(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, case in CASES.items():
        layer = convert_batch_norm(make_layer(case))
        batches = [make_batch(case, world_size, step) for step in range(STEPS)]
        sizes = case.sizes[:world_size]
        found[name] = run(layer, [(x.split(sizes)[rank], g.split(sizes)[rank]) for x, g in batches])
        if name in COMPILED:  # as one graph, without generating code for it, which would take minutes
            compiled = convert_batch_norm(make_layer(case))
            compiled.compile(backend="aot_eager", fullgraph=True, dynamic=False)
            found[f"{name}, compiled"] = run(
                compiled, [(x.split(sizes)[rank], g.split(sizes)[rank]) for x, g in batches]
            )
        if name == "uneven":
            with frozen_running_statistics(layer), torch.no_grad():
                found["frozen"] = {"output0": layer(batches[0][0].split(sizes)[rank])} | layer.state_dict()
            found["evaluation"] = {"output0": layer.eval()(batches[0][0].split(sizes)[rank]).detach()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, run_ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of 2 or 4 processes found, case by case."""
    return run_ranks(__file__, request.param, tmp_path_factory.mktemp("norm"))


def union(case: Case, world_size: int) -> dict[str, Tensor]:
    """The reference, in float64 from the inputs as they were rounded."""
    batches = [make_batch(case, world_size, step) for step in range(STEPS)]
    return run(make_layer(case).double(), [(x.double(), g.double()) for x, g in batches])


@pytest.mark.parametrize("name", [*CASES, *(f"{name}, compiled" for name in COMPILED)])
def test_equals_batch_norm_on_the_union(ranks: list[dict], name: str) -> None:
    case = CASES[name.removesuffix(", compiled")]
    expected = union(case, len(ranks))
    # Tolerances: of results in the inputs' precision, and of statistics and parameter gradients (float32 at least).
    # Inputs at 1e3 with standard deviation 0.1 are themselves rounded to 3e-4 of it. Normalising two samples gives +1
    # and -1 whatever they are, so that their gradient is the difference of nearly equal numbers.
    results, statistics = {
        "one_sample_each": (1e-9, 1e-9),
        "far_from_zero": (2e-3, 2e-3),
        "bfloat16": (4e-2, 1e-5),
    }.get(name.removesuffix(", compiled"), (1e-12, 1e-12))
    for key, reference in expected.items():
        local = [rank[name][key] for rank in ranks]
        if key.startswith(("output", "input_grad")):
            torch.testing.assert_close(torch.cat(local).double(), reference, rtol=results, atol=results)
            assert all(part.dtype == case.dtype for part in local)
        elif key.endswith("_grad"):
            torch.testing.assert_close(sum(local).double(), reference, rtol=statistics, atol=10 * statistics)
        else:
            for part in local:
                torch.testing.assert_close(part.double(), reference.double(), rtol=min(statistics, 1e-5), atol=1e-7)


def test_statistics_are_the_same_bits_on_every_rank(ranks: list[dict]) -> None:
    for name in CASES:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            assert all(torch.equal(rank[name][key], ranks[0][name][key]) for rank in ranks)


def test_variance_far_from_zero_is_exact_to_float32(ranks: list[dict]) -> None:
    case = CASES["far_from_zero"]
    inputs, _ = make_batch(case, len(ranks), 0)
    variance = 0.9 + 0.1 * inputs.double().var(dim=(0, 2, 3))
    inputs, _ = make_batch(case, len(ranks), 1)
    variance = 0.9 * variance + 0.1 * inputs.double().var(dim=(0, 2, 3))
    torch.testing.assert_close(ranks[0]["far_from_zero"]["running_var"].double(), variance, rtol=2e-7, atol=0)


def test_parameter_gradients_are_local_contributions(ranks: list[dict]) -> None:
    for rank, found in enumerate(ranks):
        sizes = CASES["uneven"].sizes[: len(ranks)]
        bias = sum(make_batch(CASES["uneven"], len(ranks), step)[1].split(sizes)[rank].sum(0) for step in range(STEPS))
        torch.testing.assert_close(found["uneven"]["bias_grad"], bias)


def test_frozen_statistics_normalise_alike_and_stay(ranks: list[dict]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["frozen"]["output0"], rank["uneven"]["output0"], rtol=0, atol=0)
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(rank["frozen"][key], rank["uneven"][key])


def test_evaluation_uses_running_statistics(ranks: list[dict]) -> None:
    inputs, _ = make_batch(CASES["uneven"], len(ranks), 0)
    layer = make_layer(CASES["uneven"])
    layer.load_state_dict({key: ranks[0]["uneven"][key] for key in layer.state_dict()})
    outputs = torch.cat([rank["evaluation"]["output0"] for rank in ranks])
    torch.testing.assert_close(outputs, layer.eval()(inputs).detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_batch_norm(tmp_path: Path, dtype: torch.dtype, channels_last: bool, monkeypatch) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = Case((8,), (4, 5), dtype=dtype, channels_last=channels_last)
        batches = [tuple(tensor.cuda() for tensor in make_batch(case, 1, step)) for step in range(STEPS)]
        layer = make_layer(case).cuda()
        expected = run(deepcopy(layer), batches)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)  # or it would leave a single rank to torch
        found = run(convert_batch_norm(layer), batches)
        tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-4
        for key, reference in expected.items():
            torch.testing.assert_close(found[key], reference, rtol=tolerance, atol=tolerance)
    finally:
        dist.destroy_process_group()


def test_without_a_process_group_it_is_torch_batch_norm() -> None:
    for case in (CASES["vectors"], CASES["images"]):
        batches = [make_batch(case, 2, step) for step in range(STEPS)]
        expected = run(make_layer(case), batches)
        found = run(convert_batch_norm(make_layer(case)), batches)
        for key, reference in expected.items():
            assert torch.equal(found[key], reference)


def test_wrong_channels_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 3, \.\.\.\), got shape \(2, 4\)"):
        SyncBatchNorm(3)(torch.zeros(2, 4))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
