"""Photometric augmentation: each operation torchvision's, the parameters too, and no dependence on the batch."""

from typing import get_args

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torchvision.transforms import ColorJitter, InterpolationMode
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2 import functional as F

from varscale.config.schema import DataConfig
from varscale.data import colour
from varscale.data.augment import POLICIES, Augmentation, random_positions
from varscale.data.operations import OPERATIONS as NAMES
from varscale.data.transfer import to_device

MEAN, STD = (0.48, 0.45, 0.4), (0.23, 0.22, 0.25)
OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.fixture
def images():
    """Noise, with black, white, grey and pure colours in a corner, where hue is ill-defined or switches sector."""
    images = torch.rand(24, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    special = torch.tensor(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]
    )
    images[:, :, 0, :9] = special.T
    return images


def spread(low, high, count=24):
    return torch.linspace(low, high, count)


def each(operation, images, *parameters):
    """An operation on images one by one, with each image's own parameters."""
    return torch.stack([operation(image, *own) for image, *own in zip(images, *parameters, strict=True)])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_blend_is_brightness_contrast_and_saturation(images, which):
    factors = spread(0, 2)
    expected = each(lambda image, factor: OPERATIONS[which](image, factor.item()), images, factors)
    colour.blend_(images, factors, torch.full((24,), which == 1), torch.full((24,), which == 2))
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_blend_mixes_operations_in_a_batch(images):
    factors, which = spread(0.2, 1.8), torch.arange(24) % 3
    expected = each(lambda image, factor, kind: OPERATIONS[kind](image, factor.item()), images, factors, which)
    colour.blend_(images, factors, which == 1, which == 2)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_shift_hue_is_torchvisions(images):
    shifts = spread(-0.5, 0.5)
    expected = each(lambda image, shift: F.adjust_hue(image, shift.item()), images, shifts)
    colour.shift_hue_(images, shifts)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_jitter_in_each_of_the_24_orders(images):
    random = np.random.default_rng(0)
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[(orders.sort(1).values == torch.arange(4)).all(1)]
    assert len(orders) == 24
    factors = torch.from_numpy(random.uniform([0.2, 0.2, 0.2, -0.2], [1.8, 1.8, 1.8, 0.2], (24, 4))).float()
    expected = images.clone()
    for n, order in enumerate(orders):
        for operation in order:
            expected[n] = OPERATIONS[operation](expected[n], factors[n, operation].item())
    colour.jitter_(images, factors, positions=orders.argsort(1))
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_grayscale_of_the_chosen(images):
    chosen = torch.arange(24) % 3 == 0
    expected = torch.where(chosen[:, None, None, None], F.rgb_to_grayscale(images, 3), images)
    colour.grayscale_(images, chosen)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)


def test_solarize_from_each_threshold(images):
    thresholds = torch.cat([spread(0, 1, 23), torch.tensor([2.0])])
    expected = each(lambda image, threshold: F.solarize(image, threshold.item()), images[:23], thresholds[:23])
    expected = torch.cat([expected, images[23:]])
    colour.solarize_(images, thresholds)
    torch.testing.assert_close(images, expected, atol=0, rtol=0)


@pytest.mark.parametrize("kernel_size", [3, 23])
def test_blur_of_the_chosen_is_torchvisions(kernel_size):
    images = torch.rand(9, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    sigma, chosen = spread(0.1, 2.0, 9), torch.arange(9) % 4 != 1
    blurred = each(lambda image, own: F.gaussian_blur(image, [kernel_size] * 2, [own.item()] * 2), images, sigma)
    expected = torch.where(chosen[:, None, None, None], blurred, images)
    untouched = images[1].clone()
    colour.blur_(images, sigma, chosen, colour.blur_bands(40, kernel_size))
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert torch.equal(images[1], untouched)


def test_blur_kernels():
    assert [colour.blur_kernel_size(size) for size in (224, 96, 65)] == [23, 9, 7]
    with pytest.raises(ValueError, match="too wide"):
        colour.blur_bands(11, 23)


def views(count, number, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, number, size, size, 3), dtype=torch.uint8, generator=generator)


def reference(augmentation, images, indices, epoch):
    """The policy by torchvision's functionals, image by image, with the parameters that the augmentation draws."""
    rows = []
    for view, policy in enumerate(augmentation.photometric):
        draws = augmentation.draw(indices, epoch, view)
        operations = augmentation.draw_operations(indices, epoch, view)
        for n in range(len(indices)):
            image = F.to_dtype(images[n, view].permute(2, 0, 1), torch.float32, scale=True)
            for operation in draws.positions[n].argsort():
                image = OPERATIONS[operation](image, draws.factors[n, operation].item())
            if draws.blur[n] and policy.blur and augmentation.image_size > 64:
                size, sigma = colour.blur_kernel_size(augmentation.image_size), draws.sigma[n].item()
                image = F.gaussian_blur(image, [size, size], [sigma, sigma])
            for chosen in operations:
                name = list(NAMES)[chosen.number[n]]
                levels = (image * 255).round().to(torch.uint8)
                levels = _apply_op(levels, name, chosen.magnitude[n].item(), InterpolationMode.NEAREST, None)
                image = F.to_dtype(levels, torch.float32, scale=True)
            if draws.grayscale[n]:
                image = F.rgb_to_grayscale(image, 3)
            if draws.solarize[n]:
                image = F.solarize(image, 0.5)
            rows.append(F.normalize(image, list(MEAN), list(STD)))
    return torch.stack(rows)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [32, 80])
@pytest.mark.parametrize("compiled", [True, False])
def test_policies_equal_torchvision_with_the_same_parameters(policy, size, compiled):
    augmentation = Augmentation(policy, 3, size, MEAN, STD, seed=11, compiled=compiled)
    images, indices = views(12, 3, size), torch.arange(100, 112)
    output = augmentation(images, indices, epoch=6)
    assert output.shape == (36, 3, size, size)
    assert output.dtype == torch.float32
    assert output.is_contiguous(memory_format=torch.channels_last)
    difference = (output - reference(augmentation, images, indices, 6)).abs()
    if augmentation.photometric[0].operations:
        # A level more or less, which the second operation may enlarge.
        assert (difference > 1e-4).float().mean() < 0.02
        assert (difference > 2.5 / 255 / min(STD)).float().mean() < 2e-3
    elif policy == "byol":
        # A value next to the threshold of solarisation may fall on its other side.
        assert (difference > 1e-4).float().mean() < 1e-4
    else:
        assert difference.max() < 1e-4


@pytest.mark.parametrize("policy", ["byol", "stacked_randaugment"])
@pytest.mark.parametrize("compiled", [True, False])
def test_half_precision_is_float32_rounded_once(policy, compiled):
    images, indices = views(5, 2, 80), torch.arange(5)
    full, half = (
        Augmentation(policy, 2, 80, MEAN, STD, seed=11, dtype=dtype, compiled=compiled)(images, indices, epoch=6)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("policy", ["simaugment", "byol", "autoaugment", "stacked_randaugment"])
@pytest.mark.parametrize("size", [32, 80, 224])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_sample_alone_equals_itself_in_a_batch_bit_for_bit(policy, size, compiled):
    augmentation = Augmentation(policy, 2, size, MEAN, STD, seed=11, compiled=compiled)
    count = 70 if size == 32 else 4
    images, indices = views(count, 2, size), torch.arange(count) * 17
    together = augmentation(images, indices, epoch=1).unflatten(0, (2, count))
    for n in range(0, count, 3):
        alone = augmentation(images[n : n + 1], indices[n : n + 1], epoch=1)
        assert torch.equal(alone, together[:, n])
    backwards = augmentation(images.flip(0), indices.flip(0), epoch=1).unflatten(0, (2, count)).flip(1)
    assert torch.equal(backwards, together)


@pytest.mark.parametrize("policy", ["byol", "stacked_randaugment"])
def test_the_augmentation_can_be_traced_and_compiled(policy):
    augmentation = Augmentation(policy, 2, 80, MEAN, STD, seed=11, compiled=False)
    images, indices = views(1, 2, 80), torch.arange(1)
    expected = [augmentation(images, indices, epoch) for epoch in range(2)]
    if policy == "byol":  # operations are chosen on the host; all else is one graph
        augmentation.compile(backend="eager", fullgraph=True)
    compiled = torch.compile(augmentation, backend="aot_eager")
    for epoch in range(2):
        torch.testing.assert_close(compiled(images, indices, epoch), expected[epoch], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiled_code_gives_the_same_views():
    augmentation = Augmentation("byol", 2, 80, MEAN, STD, seed=11, compiled=False)
    images, indices = views(3, 2, 80), torch.arange(3)
    expected = augmentation(images, indices, epoch=5)
    augmentation.compile(dynamic=False)
    compiled = augmentation(images, indices, epoch=5)
    # A value next to the threshold of solarisation may fall on its other side.
    assert ((compiled - expected).abs() > 1e-4).float().mean() < 1e-4


def test_views_epochs_and_seeds_differ():
    images = views(8, 1, 32).expand(8, 2, 32, 32, 3)
    indices = torch.arange(8)
    augmentation = Augmentation("simclr", 2, 32, MEAN, STD, seed=0)
    first = augmentation(images, indices, epoch=0)
    others = [
        first.roll(8, 0),
        augmentation(images, indices, epoch=1),
        augmentation(images, indices + 8, epoch=0),
        Augmentation("simclr", 2, 32, MEAN, STD, seed=1)(images, indices, epoch=0),
    ]
    for other in others:
        assert (first - other).abs().flatten(1).amax(1).gt(1e-3).float().mean() > 0.7
    assert torch.equal(first, augmentation(images, indices, epoch=0))


def test_further_views_follow_the_second():
    augmentation = Augmentation("byol", 4, 32, MEAN, STD, seed=0)
    assert augmentation.photometric == (POLICIES["byol"][0], *[POLICIES["byol"][1]] * 3)


def test_views_of_another_size_go_on_counting():
    first = Augmentation("byol", 2, 32, MEAN, STD, seed=0)
    further = Augmentation("byol", 3, 80, MEAN, STD, seed=0, first_view=2)
    whole = Augmentation("byol", 5, 32, MEAN, STD, seed=0)
    assert (*first.photometric, *further.photometric) == whole.photometric
    for view in range(3):
        ours, expected = further.draw(torch.arange(9), 1, view), whole.draw(torch.arange(9), 1, 2 + view)
        assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize("policy", ["simaugment", "byol", "simclr"])
@pytest.mark.parametrize("view", [0, 1])
def test_parameters_are_distributed_as_torchvisions(policy, view):
    count = 8000
    chosen = POLICIES[policy][view]
    draws = Augmentation(policy, 2, 224, MEAN, STD, seed=4).draw(torch.arange(count), 2, view)
    jitter = ColorJitter(chosen.brightness, chosen.contrast, chosen.saturation, chosen.hue)
    torch.manual_seed(0)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(2000)]
    jittered = (draws.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1)
    for i in range(4):
        ours = draws.factors[jittered, i].numpy()
        assert ks_2samp(ours, np.array([parameters[i + 1] for parameters in theirs])).pvalue > 1e-3
    orders = draws.positions[:, 0] * 64 + draws.positions[:, 1] * 16 + draws.positions[:, 2] * 4 + draws.positions[:, 3]
    values, counts = orders.unique(return_counts=True)
    assert len(values) == 24
    assert chisquare(counts).pvalue > 1e-3
    assert kstest((draws.sigma.numpy() - 0.1) / 1.9, "uniform").pvalue > 1e-3
    applied = (jittered, draws.grayscale, draws.blur, draws.solarize)
    probabilities = (chosen.jitter, chosen.grayscale, chosen.blur, chosen.solarize)
    for decision, probability in zip(applied, probabilities, strict=True):
        assert binomtest(int(decision.sum()), count, probability).pvalue > 1e-3
    decisions = torch.stack([*applied, draws.factors[:, 0] > 1, draws.sigma > 1]).float()
    correlations = (
        torch.corrcoef(decisions).fill_diagonal_(0).nan_to_num()
    )  # undefined for what always or never happens
    correlations[0, 4] = correlations[4, 0] = 0  # only jittered images have a factor
    assert correlations.abs().max() < 0.05


def test_random_positions_are_permutations_even_of_equal_numbers():
    unit = 2.0**-24
    numbers = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.75, 0.75, 0.75, 0.75], [0.75 + unit, 0.75, 0.75, 0.75 + unit]])
    assert random_positions(numbers).tolist() == [[3, 0, 2, 1], [0, 1, 2, 3], [2, 0, 1, 3]]


def test_parameters_never_change():
    # Pinned: a run that is resumed by a later version must see the same views.
    draws = Augmentation("simaugment", 2, 32, MEAN, STD, seed=0).draw(torch.tensor([0, 1, 2]), 0, 1)
    assert draws.positions.tolist() == [[3, 1, 0, 2], [0, 3, 2, 1], [2, 0, 3, 1]]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 2, 32, 32, 3), torch.float32),
        ((4, 3, 32, 32, 3), torch.uint8),
        ((4, 2, 3, 32, 32), torch.uint8),
        ((3, 2, 32, 32, 3), torch.uint8),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, dtype):
    with pytest.raises(ValueError, match="images must be"):
        Augmentation("none", 2, 32, MEAN, STD, seed=0)(torch.zeros(shape, dtype=dtype), torch.arange(4), epoch=0)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="simaugment"):
        Augmentation("simaugmnt", 2, 32, MEAN, STD, seed=0)


def test_the_configuration_names_the_same_policies():
    assert set(get_args(DataConfig.model_fields["augmentation"].annotation)) == set(POLICIES)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("compiled", "size"), [(True, 96), (True, 224), (False, 96)])
def test_the_gpu_gives_the_same(policy, compiled, size, monkeypatch):
    images, indices = views(16, 3, size)[:, :2], torch.arange(16)
    augmentation = Augmentation(policy, 2, size, MEAN, STD, seed=3, compiled=compiled)
    expected = augmentation(images, indices, epoch=2)
    if augmentation.compiled:
        monkeypatch.delattr(Augmentation, "_augment_by_torch")
    output = augmentation.cuda()(images.cuda(), indices, epoch=2)
    # A value next to a threshold, or to the next level, may fall on its other side.
    changed = 0.02 if augmentation.photometric[0].operations else 1e-4
    assert ((output.cpu() - expected).abs() > 1e-4).float().mean() < changed


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("policy", ["simaugment", "byol"])
def test_the_gpu_rounds_to_bfloat16_once(policy):
    images, indices = views(16, 2, 96).cuda(), torch.arange(16)
    exact = Augmentation(policy, 2, 96, MEAN, STD, seed=3).cuda()(images, indices, epoch=2)
    rounded = Augmentation(policy, 2, 96, MEAN, STD, seed=3, dtype=torch.bfloat16).cuda()(images, indices, epoch=2)
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_does_not_wait_for_the_gpu(policy):
    count = 4096
    augmentation = Augmentation(policy, 2, 32, MEAN, STD, seed=3).cuda()
    images, indices = views(count, 2, 32).cuda(), torch.arange(count)
    augmentation(images, indices, epoch=1)  # the first call takes memory, which the host waits for
    torch.cuda.synchronize()
    torch.cuda._sleep(125_000_000)  # cycles: 60 ms at 2 GHz, many times what the host needs
    asleep = torch.cuda.Event()
    asleep.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmentation(images, indices, epoch=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not asleep.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("policy", ["simaugment", "byol", "stacked_randaugment"])
def test_a_sample_alone_equals_itself_in_a_batch_on_the_gpu(policy):
    augmentation = Augmentation(policy, 2, 96, MEAN, STD, seed=11).cuda()
    images, indices = views(24, 2, 96).cuda(), torch.arange(24) * 17
    together = augmentation(images, indices, epoch=1).unflatten(0, (2, 24))
    for n in range(0, 24, 5):
        alone = augmentation(images[n : n + 1], indices[n : n + 1], epoch=1)
        # RandAugment works on levels, and a value between two of them may be rounded to either: a guess at what was
        # seen to differ on a GPU, where no single operation does.
        levels = 1e-2 if policy == "stacked_randaugment" else 0
        assert ((alone - together[:, n]).abs() > 1e-5).float().mean() <= levels


@pytest.mark.gpu
@on_a_gpu
def test_code_compiled_for_the_gpu_gives_the_same_views():
    augmentation = Augmentation("byol", 2, 96, MEAN, STD, seed=11, compiled=False).cuda()
    images, indices = views(8, 2, 96).cuda(), torch.arange(8)
    expected = augmentation(images, indices, epoch=5)
    augmentation.compile(dynamic=False)
    compiled = augmentation(images, indices, epoch=5)
    assert ((compiled - expected).abs() > 1e-4).float().mean() < 1e-4


@pytest.mark.gpu
@on_a_gpu
def test_what_is_sent_to_the_gpu_is_what_arrives():
    sent = [torch.randint(0, 99, (1000,)) for _ in range(50)]
    torch.cuda._sleep(200_000_000)
    arrived = [to_device(tensor.clone(), torch.device("cuda")) for tensor in sent]
    for ours, theirs in zip(arrived, sent, strict=True):
        assert torch.equal(ours.cpu(), theirs)
