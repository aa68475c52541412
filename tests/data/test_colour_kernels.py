"""The Triton kernels of augmentation give what torch's operations do: by Triton's interpreter, and where there is a GPU
(tests/data/test_augment.py) compiled. Here they are compiled, too, and not run."""

import os
import subprocess
import sys

import pytest
import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

from varscale.data.augment import Augmentation

MEAN, STD = (0.48, 0.45, 0.4), (0.23, 0.22, 0.25)
COUNT, SIZE = 6, 68  # five blocks of pixels, the last one not full; above the size up to which nothing is blurred
POLICIES = ("simaugment", "byol", "simclr", "crop_flip")


def augmentation(policy: str, dtype: torch.dtype, *, compiled: bool) -> Augmentation:
    return Augmentation(policy, 2, SIZE, MEAN, STD, seed=5, dtype=dtype, compiled=compiled)


def augmented(policy: str, dtype: torch.dtype, *, by_kernels: bool) -> torch.Tensor:
    """Views of images between which lie others, as in a batch of several sizes of views."""
    generator = torch.Generator().manual_seed(1)
    wider = torch.randint(0, 256, (COUNT, 3, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    images, indices = wider[:, :2], torch.arange(COUNT) * 13
    module = augmentation(policy, dtype, compiled=by_kernels)
    output = torch.empty((2 * COUNT, 3, SIZE, SIZE), dtype=dtype).contiguous(memory_format=torch.channels_last)
    way = module._augment_by_kernels if by_kernels else module._augment_by_torch
    way(images, indices, 3, output)
    return output


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    pytest.importorskip("triton", reason="torch comes without Triton here")
    file = tmp_path_factory.mktemp("kernels") / "views.pt"
    subprocess.run([sys.executable, __file__, str(file)], check=True, timeout=300)
    return torch.load(file)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_kernels_give_the_same(interpreted: dict[str, torch.Tensor], policy: str) -> None:
    found, expected = interpreted[policy], augmented(policy, torch.float32, by_kernels=False)
    # A value next to solarisation's threshold may fall on its other side.
    assert ((found - expected).abs() > 1e-4).float().mean() < 1e-4
    if policy != "crop_flip":
        plain = augmented("crop_flip", torch.float32, by_kernels=False)
        assert ((plain - expected).abs() > 1e-2).float().mean() > 0.5


def test_bfloat16_is_rounded(interpreted: dict[str, torch.Tensor]) -> None:
    found, expected = interpreted["bfloat16"], augmented("simaugment", torch.float32, by_kernels=False)
    assert found.dtype == torch.bfloat16
    # A GPU rounds to the nearest, the interpreter to 0.
    assert ((found.float() - expected).abs() <= 2**-7 * expected.abs() + 1e-4).all()


@pytest.mark.parametrize("architecture", [80, 90])  # A100, H100
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_can_be_compiled_for_gpus(architecture: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="torch comes without Triton here")
    from gpu_compiler import compiling

    with compiling(architecture) as kernels:
        augmented("simaugment", dtype, by_kernels=True)
        augmented("byol", dtype, by_kernels=True)
    assert {name: len(launches) for name, launches in kernels.items()} == {"_augment_images": 2, "_finish_planes": 1}
    assert all(launch.asm["cubin"] for launches in kernels.values() for launch in launches)


if __name__ == "__main__":
    found = {policy: augmented(policy, torch.float32, by_kernels=True) for policy in POLICIES}
    torch.save(found | {"bfloat16": augmented("simaugment", torch.bfloat16, by_kernels=True)}, sys.argv[1])
