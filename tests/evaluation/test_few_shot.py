"""Few-shot: draws and the classifier against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from varscale.evaluation.features import Features
from varscale.evaluation.few_shot import Settings, draw, logistic_accuracy, run
from varscale.evaluation.subsets import per_class
from varscale.intervals import estimate


@pytest.fixture
def context(on_features, make_clouds):
    return on_features(make_clouds(400, 5, 1, spread=2.0), make_clouds(200, 5, 2, spread=2.0), 5)


def test_accuracies_are_scikit_learns_on_the_labelled_images_alone(context):
    result = run(context, Settings(percent=(5,), shots=(2,), seeds=3, c=4.0))
    for name, quota in (("top1_5pct", 4), ("top1_2shot", 2)):
        expected = []
        for number in range(3):
            rows = torch.from_numpy(per_class(context.train.labels, np.full(5, quota), 0, number))
            labelled = context.train.features[rows].numpy()
            mean = labelled.mean(axis=0)
            scale = math.sqrt(((labelled - mean) ** 2).sum(axis=1).mean())
            model = LogisticRegression(C=4.0, max_iter=1000).fit((labelled - mean) / scale, context.train.labels[rows])
            expected.append(100 * model.score((context.val.features.numpy() - mean) / scale, context.val.labels))
        assert result.details[name] == {"images": 5 * quota, "top1": pytest.approx(expected, abs=0.51)}
        assert result.metrics[name] == pytest.approx(np.mean(expected), abs=0.51)
        assert result.metrics[f"{name}_ci95"] == estimate(result.details[name]["top1"]).half_width


def test_more_labels_help(context):
    metrics = run(context, Settings(percent=(), shots=(1, 40), seeds=3)).metrics
    assert metrics["top1_40shot"] > metrics["top1_1shot"] + 5
    assert 20 < metrics["top1_1shot"] < 90


def test_neither_scale_nor_offset_of_the_features_matters(context):
    rows = torch.arange(50)
    labels, val = context.train.labels[rows], context.val
    plain = logistic_accuracy(context.train.features[rows], labels, val, 10.0)
    moved = val._replace(features=val.features * 100 + 7)
    assert logistic_accuracy(context.train.features[rows] * 100 + 7, labels, moved, 10.0) == pytest.approx(plain, abs=1)


def test_every_class_gives_at_least_one_image(context):
    assert run(context, Settings(percent=(0.1,), shots=(), seeds=1)).details["top1_0.1pct"]["images"] == 5


def test_too_many_shots_and_single_draws_are_said(context):
    notes = run(context, Settings(percent=(), shots=(100,), seeds=1)).notes
    assert "100 shots" in notes[0]
    assert "no interval" in notes[1]


def test_one_class_alone_is_no_error():
    data = Features(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    val = data._replace(labels=torch.tensor([0, 1, 0, 1]))
    assert logistic_accuracy(data.features, data.labels, val, 1.0) == 50


def test_the_picture_shows_shares_and_shots(context):
    figure = draw(run(context, Settings(percent=(5, 10), shots=(1,), seeds=2)).details)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["a share of each class", "so many of each class"]
