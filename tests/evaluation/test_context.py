"""Features of images as training would augment them, and counting top-1 and top-5 hits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from varscale.data.dataset import read_dataset_info
from varscale.data.geometry import CropSpec
from varscale.errors import UserError
from varscale.evaluation import alignment_uniformity
from varscale.evaluation.cache import FeatureCache
from varscale.evaluation.context import Context, Place, count_hits, percent
from varscale.evaluation.features import gather_rows
from varscale.evaluation.images import Images

ORDER = np.array([7, 3, 40, 11, 3])


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


@pytest.fixture
def make_context(digits):
    """A function: the digits under random crops and a policy, and the pixels themselves as features."""
    info = read_dataset_info(digits)

    def make(policy: str = "simclr", seed: int = 0, crop: CropSpec | None = None, cache: Path | None = None) -> Context:
        crop = crop or CropSpec(16, (0.3, 1.0))
        kept = FeatureCache(cache, rank=0, device=torch.device("cpu"), gather=gather_rows) if cache else None
        images = Images(
            digits, info, random_crop=crop, mean=info.mean, std=info.std, seed=seed, workers=1, policy=policy
        )
        return Context(pixels, images, Place(torch.device("cpu"), batch_size=2), digest="pixels", cache=kept)

    return make


def augmented(context: Context, epoch: int) -> torch.Tensor:
    parts = list(context.augmented(ORDER, epoch))
    assert torch.cat([part.indices for part in parts]).tolist() == ORDER.tolist()
    labels = context.images.loader("train", context.images.random_crop).labels
    assert torch.cat([part.labels for part in parts]).tolist() == np.asarray(labels)[ORDER].tolist()
    return torch.cat([part.features for part in parts])


def broken(images: torch.Tensor) -> torch.Tensor:
    features = images.flatten(1).clone()
    features[0, 3] = torch.nan
    return features


def test_features_that_are_not_finite_are_refused(make_context):
    context = make_context()
    context.encode = broken
    with pytest.raises(UserError, match=r"features of 50 of 100 images of val are not finite"):  # one a batch of two
        _ = context.val


def test_augmented_features_differ_by_epoch_and_seed_and_are_reproducible(make_context):
    first = augmented(make_context(), 0)
    assert torch.equal(augmented(make_context(), 0), first)
    assert torch.equal(first[1], first[4]), "the same sample in the same epoch"
    again = make_context(seed=1)
    for other in (augmented(make_context(), 1), augmented(again, 0)):
        assert not any(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))
    plain = make_context().train.features[ORDER]
    assert not any(torch.equal(mine, whole) for mine, whole in zip(first, plain, strict=True)), "cropped and flipped"
    assert torch.equal(augmented(make_context("none"), 0), first), "no colours are changed"


def test_views_differ_from_each_other_and_are_reproducible(make_context):
    first, second = (make_context().view("val", ORDER, view) for view in (0, 1))
    assert first.indices.tolist() == second.indices.tolist() == ORDER.tolist()
    assert first.labels.tolist() == make_context().val.labels[ORDER].tolist()
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(first.features, second.features, strict=True))
    assert torch.equal(make_context().view("val", ORDER, 1).features, second.features)
    assert not torch.equal(make_context(seed=1).view("val", ORDER, 1).features, second.features)


def test_views_have_the_crops_and_the_colours_of_training(make_context):
    whole = CropSpec(16, None, flip=0.0)
    plain = make_context("none", crop=whole)
    assert torch.equal(plain.view("val", ORDER, 1).features, plain.val.features[ORDER])
    colours = make_context("simclr", crop=whole).view("val", ORDER, 1).features
    assert not torch.equal(colours, plain.val.features[ORDER])
    assert not torch.equal(make_context("none").view("val", ORDER, 1).features, plain.val.features[ORDER])


def test_views_are_kept_apart_from_each_other_in_the_cache(make_context, tmp_path):
    without = [make_context().view("val", ORDER, view).features for view in (0, 1)]
    for _ in range(2):
        kept = make_context(cache=tmp_path)
        assert all(torch.equal(kept.view("val", ORDER, view).features, without[view]) for view in (0, 1))
    assert not torch.equal(make_context("none", cache=tmp_path).view("val", ORDER, 0).features, without[0])
    assert not torch.equal(make_context(seed=1, cache=tmp_path).view("val", ORDER, 0).features, without[0])


def test_two_views_of_an_image_are_not_aligned_by_being_the_same(make_context):
    settings = alignment_uniformity.Settings(samples=20)
    found = alignment_uniformity.run(make_context(), settings).metrics["alignment_features"]
    assert 0.01 < found < 4
    same = make_context("none", crop=CropSpec(16, None, flip=0.0))
    assert alignment_uniformity.run(same, settings).metrics["alignment_features"] == 0


def test_hits_are_scikit_learns_top_k_accuracy():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(200, 9)), random.integers(0, 9, 200)
    expected = [top_k_accuracy_score(labels, scores, k=k, normalize=False, labels=range(9)) for k in (1, 5)]
    assert count_hits(torch.from_numpy(scores), torch.from_numpy(labels)).tolist() == expected


def test_of_equal_scores_the_lower_class_comes_first():
    scores = torch.ones(3, 8)
    assert count_hits(scores, torch.tensor([0, 4, 5])).tolist() == [1, 2]


def test_scores_that_are_not_numbers_hit_nothing():
    scores = torch.tensor([[float("nan")] * 6, [0.0, 1.0, float("nan"), 0.0, 0.0, 0.0]])
    assert count_hits(scores, torch.tensor([0, 1])).tolist() == [0, 1]


def test_percent():
    assert percent(torch.tensor(3), 8) == 37.5


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_tasks_and_all_know_all_answers(world_size):
    tasks, parts, done = [3, 1, 4, 1, 5], {}, []

    def square(task):
        done.append(task)
        return task**2 / 7

    def answers(rank, gather):
        return Place(torch.device("cpu"), rank=rank, world_size=world_size, gather=gather).share(tasks, square)

    for rank in range(world_size):
        answers(rank, lambda row, rank=rank: parts.setdefault(rank, row).expand(world_size, -1))
    assert sorted(done) == sorted(tasks), "each is computed once"
    for rank in range(world_size):
        found = answers(rank, lambda _: torch.cat([parts[rank] for rank in range(world_size)]))
        assert found == [task**2 / 7 for task in tasks]
