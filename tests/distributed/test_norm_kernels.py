"""The Triton kernels against relu(nn.BatchNorm(x) + residual) in float64: by Triton's interpreter on one and two ranks,
and compiled where there is a GPU."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

MOMENTUM = 0.1
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Case(NamedTuple):
    """The union's shape, what follows the normalisation, and how far the values are from zero."""

    shape: tuple[int, ...]
    relu: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float32
    mean: float = 0.0


CASES = {
    "vectors": Case((14, 5)),
    "images": Case((4, 70, 9, 11)),
    "relu": Case((4, 70, 9, 11), relu=True),
    "residual": Case((4, 70, 9, 11), relu=True, residual=True),
    "many_rows": Case((130, 64, 8, 8), relu=True, residual=True),
    "bfloat16": Case((4, 130, 5, 7), relu=True, residual=True, dtype=torch.bfloat16),
    "bfloat16_relu": Case((4, 130, 5, 7), relu=True, dtype=torch.bfloat16),
    "far_from_zero": Case((40, 64), dtype=torch.float32, mean=1e3),
}


def tensors(case: Case, device: str = "cpu") -> dict[str, Tensor | None]:
    """Inputs, residual and output gradient in the case's type and channels-last layout; weight and bias."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if len(case.shape) == 4 else torch.contiguous_format
    x, residual, grad = torch.randn(3, *case.shape, generator=generator)
    weight, bias = torch.randn(2, case.shape[1], generator=generator).to(device)
    maps = {"x": x + case.mean, "residual": residual if case.residual else None, "grad": grad}
    found = {
        name: None if part is None else part.to(device, case.dtype).contiguous(memory_format=layout)
        for name, part in maps.items()
    }
    return found | {"weight": weight, "bias": bias}


def by_kernels(case: Case, parts: dict[str, Tensor | None], *, over_ranks: bool = False) -> dict[str, Tensor]:
    from varscale.models.norm_kernels import fused_norm

    x, residual, weight, bias = (
        part if part is None else part.detach().clone().requires_grad_()
        for part in (parts["x"], parts["residual"], parts["weight"], parts["bias"])
    )
    running = torch.zeros_like(parts["weight"]), torch.ones_like(parts["weight"]), MOMENTUM
    output = fused_norm(
        x, weight, bias, eps=1e-5, relu=case.relu, residual=residual, running=running, over_ranks=over_ranks
    )
    output.backward(parts["grad"])
    found = {"output": output.detach(), "x_grad": x.grad, "weight_grad": weight.grad, "bias_grad": bias.grad}
    found |= {"running_mean": running[0], "running_var": running[1]}
    return found if residual is None else found | {"residual_grad": residual.grad}


def by_torch(case: Case, parts: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """In float64, from the inputs as they were rounded."""
    kind = nn.BatchNorm2d if len(case.shape) == 4 else nn.BatchNorm1d
    layer = kind(case.shape[1], eps=1e-5, momentum=MOMENTUM).to(parts["x"].device, torch.float64)
    with torch.no_grad():
        layer.weight.copy_(parts["weight"])
        layer.bias.copy_(parts["bias"])
    x, residual = (
        part if part is None else part.detach().double().requires_grad_() for part in (parts["x"], parts["residual"])
    )
    output = layer(x) if residual is None else layer(x) + residual
    output = output.relu() if case.relu else output
    output.backward(parts["grad"].double())
    found = {"output": output.detach(), "x_grad": x.grad}
    found |= {"weight_grad": layer.weight.grad, "bias_grad": layer.bias.grad}
    found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    return found if residual is None else found | {"residual_grad": residual.grad}


def work(folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {}
    for name, case in CASES.items():
        parts = tensors(case)
        uneven = [case.shape[0] // 4, case.shape[0] - case.shape[0] // 4]
        share = uneven if dist.get_world_size() == 2 else [case.shape[0]]
        own = {
            key: part if part is None or part.dim() == 1 else part.split(share)[dist.get_rank()]
            for key, part in parts.items()
        }
        found[name] = by_kernels(case, own, over_ranks=dist.get_world_size() > 1)
    case = CASES["relu"]
    parts = tensors(case)
    parts["x"][0, 0, 0, 0] = torch.nan
    found["nan"] = by_kernels(case, parts)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, run_ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("triton", reason="torch comes without Triton here")
    return run_ranks(__file__, request.param, tmp_path_factory.mktemp("kernels"))


def assert_equal(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor], passed: float = 1e-5) -> None:
    """To the rounding of the inputs' type; sums over many rows are in float32 at least. passed: what the gradient of a
    ReLU may be off by, since of many float32 values one is near enough to 0 to be rounded to its other side."""
    assert found.keys() == expected.keys()
    for key, reference in expected.items():
        rounded = case.dtype if key.endswith(("output", "x_grad", "residual_grad")) else torch.float32
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[rounded] * (20 if case.mean else 1)
        if case.relu and key.endswith("_grad"):
            tolerance = max(tolerance, passed)
        error = (found[key].double() - reference).norm() / reference.norm()
        assert error < tolerance, f"{key} is off by {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_equals_batch_norm_on_the_union(ranks: list[dict], name: str) -> None:
    case = CASES[name]
    expected = by_torch(case, tensors(case))
    first = ranks[0][name]
    union = {key: torch.cat([rank[name][key] for rank in ranks]) for key in expected if first[key].dim() > 1}
    union |= {key: sum(rank[name][key] for rank in ranks) for key in ("weight_grad", "bias_grad")}
    union |= {key: first[key] for key in ("running_mean", "running_var")}
    assert_equal(case, union, expected)
    assert all(torch.equal(rank[name]["running_var"], first["running_var"]) for rank in ranks)
    assert first["output"].dtype == first["x_grad"].dtype == case.dtype


def test_a_nan_is_not_hidden_by_the_relu(ranks: list[dict]) -> None:
    """The watch over losses that are not finite depends on it; torch's ReLU passes NaN on as well."""
    assert all(rank["nan"]["output"][:, 0].isnan().all() for rank in ranks)
    assert not any(rank["nan"]["output"][:, 1:].isnan().any() for rank in ranks)


@pytest.mark.parametrize("architecture", [80, 90])  # A100, H100
@pytest.mark.parametrize("name", ["images", "bfloat16", "bfloat16_relu"])
def test_they_can_be_compiled_for_gpus(name: str, architecture: int) -> None:
    pytest.importorskip("triton", reason="torch comes without Triton here")
    from gpu_compiler import compiling

    case = CASES[name]
    with compiling(architecture) as kernels:
        by_kernels(case, tensors(case))
    assert set(kernels) == {
        "_sum_inputs", "_combine_statistics", "_normalise", "_sum_gradients", "_combine_gradients", "_pass_back"
    }  # fmt: skip
    assert all(launch.asm["cubin"] for launches in kernels.values() for launch in launches)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_equal_batch_norm(name: str) -> None:
    case = CASES[name]._replace(shape=(256, 192, 28, 28) if len(CASES[name].shape) == 4 else (4096, 200))
    parts = tensors(case, "cuda")
    found = by_kernels(case, parts)
    assert_equal(case, found, by_torch(case, parts), passed=1e-3)
    again = by_kernels(case, parts)
    assert all(torch.equal(found[key], again[key]) for key in found), "sums are in a fixed order"


if __name__ == "__main__":
    work(Path(sys.argv[1]))
