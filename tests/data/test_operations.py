"""AutoAugment's and RandAugment's operations: torchvision's on every image, chosen as often and as strongly."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from varscale.data.operations import (
    NUMBER,
    OPERATIONS,
    Chosen,
    draw_autoaugment,
    draw_randaugment,
    magnitudes,
    operate_,
)
from varscale.data.randomness import as_uint64, stream

WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")


def pictures(size, count=12):
    """Smooth pictures, and one of noise, one of a single colour, one of two."""
    generator = torch.Generator().manual_seed(size)
    images = torch.nn.functional.interpolate(torch.rand(count, 3, 9, 9, generator=generator), size, mode="bicubic")
    images = images.clamp(0, 1).mul(200).add(20).round().to(torch.uint8)
    images[0] = torch.randint(0, 256, images[0].shape, dtype=torch.uint8, generator=generator)
    images[1], images[2], images[2, :, : size // 2] = 90, 0, 255
    return images


def torchvisions(images, chosen):
    return torch.stack(
        [
            _apply_op(image, list(OPERATIONS)[number], magnitude, InterpolationMode.NEAREST, None)
            for image, number, magnitude in zip(images, chosen.number.tolist(), chosen.magnitude.tolist(), strict=True)
        ]
    )


def keys(count, seed=3):
    return stream(as_uint64(seed), as_uint64(0), np.arange(count, dtype=np.uint64), as_uint64(1))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "Identity"])
@pytest.mark.parametrize("bins", [10, 31])
@pytest.mark.parametrize("size", [32, 33, 224])
def test_each_operation_is_torchvisions(name, bins, size):
    images = pictures(size)
    strengths = np.resize(magnitudes(bins, size)[NUMBER[name]][::-1], len(images))
    if OPERATIONS[name]:
        strengths = strengths * np.resize([1, -1], len(images))
    chosen = Chosen(np.full(len(images), NUMBER[name]), strengths)
    expected, changed = torchvisions(images, chosen), images.clone()
    operate_(changed, chosen)
    difference = (changed.int() - expected.int()).abs()
    assert not torch.equal(changed, images)
    if name in WARPS:
        assert (difference > 0).float().mean() < 2e-3
    else:
        assert difference.max() <= (1 if name in BLENDS or name == "AutoContrast" else 0)


def test_a_batch_mixes_operations_and_no_image_sees_another():
    images = pictures(40, count=60)
    random = np.random.default_rng(0)
    number = np.resize(np.arange(len(OPERATIONS)), 60)
    chosen = Chosen(number, magnitudes(31, 40)[number, random.integers(1, 31, 60)])
    together = images.clone()
    operate_(together, chosen)
    for n in range(60):
        alone = images[n : n + 1].clone()
        operate_(alone, Chosen(chosen.number[n : n + 1], chosen.magnitude[n : n + 1]))
        assert torch.equal(alone[0], together[n])
    assert torch.equal(together[number == NUMBER["Identity"]], images[number == NUMBER["Identity"]])


@pytest.mark.parametrize("size", [32, 224])
def test_magnitudes_are_torchvisions(size):
    spaces = {10: AutoAugment()._augmentation_space(10, (size, size))}
    spaces[31] = RandAugment()._augmentation_space(31, (size, size))
    for bins, space in spaces.items():
        assert set(space) | {"Identity", "Invert"} == set(OPERATIONS)
        for name, (strengths, is_signed) in space.items():
            expected = strengths.expand(bins) if strengths.ndim == 0 else strengths
            np.testing.assert_allclose(magnitudes(bins, size)[NUMBER[name]], expected, atol=1e-4, err_msg=name)
            assert OPERATIONS[name] == is_signed


@pytest.mark.parametrize("policy", [AutoAugmentPolicy.IMAGENET, AutoAugmentPolicy.CIFAR10])
def test_autoaugment_draws_its_pairs_with_their_probabilities(policy):
    count = 50_000
    table = magnitudes(10, 224)
    first, second = draw_autoaugment(keys(count), 224, policy)
    drawn = Counter(zip(first.number, np.abs(first.magnitude), second.number, np.abs(second.magnitude), strict=True))
    expected = Counter()
    for pair in AutoAugment(policy).policies:
        for took_first in (True, False):
            for took_second in (True, False):
                outcome, share = (), 1 / 25
                for took, (name, probability, step) in zip((took_first, took_second), pair, strict=True):
                    number = NUMBER[name] if took else NUMBER["Identity"]
                    outcome += (number, table[number, step or 0])
                    share *= probability if took else 1 - probability
                expected[outcome] += count * share
    expected = {outcome: number for outcome, number in expected.items() if number > 0}
    assert set(drawn) <= set(expected)
    frequent = [outcome for outcome, number in expected.items() if number >= 5]
    seen = np.array([drawn[outcome] for outcome in frequent])
    wanted = np.array([expected[outcome] for outcome in frequent])
    assert chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3
    for chosen in (first, second):
        signed = chosen.magnitude[np.isin(chosen.number, [NUMBER[name] for name in (*WARPS, *BLENDS)])]
        signed = signed[signed != 0]
        assert binomtest(int((signed < 0).sum()), len(signed)).pvalue > 1e-3


@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_randaugment_draws_every_operation_as_often(probability):
    count = 30_000
    rounds = draw_randaugment(keys(count), 224, operations=2, magnitude=9, probability=probability)
    assert len(rounds) == 2
    for chosen in rounds:
        assert chosen.number.max() < NUMBER["Invert"]
        counts = np.bincount(chosen.number, minlength=14)
        wanted = np.full(14, count * probability / 14)
        wanted[NUMBER["Identity"]] += count * (1 - probability)
        assert chisquare(counts, wanted).pvalue > 1e-3
        assert set(np.abs(chosen.magnitude[chosen.number == NUMBER["Rotate"]]).round(6)) == {9.0}
        turned = chosen.magnitude[chosen.number == NUMBER["Rotate"]]
        assert binomtest(int((turned < 0).sum()), len(turned)).pvalue > 1e-3
    joint = np.corrcoef(rounds[0].number, rounds[1].number)[0, 1]
    assert abs(joint) < 0.03
