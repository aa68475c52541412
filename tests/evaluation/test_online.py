"""The online kNN: when it is due, and that it is the number evaluate.py would give, leaving the network in training."""

import torch
from torch import nn

from varscale.config import load_config
from varscale.data.dataset import read_dataset_info
from varscale.evaluation.context import Place
from varscale.evaluation.online import OnlineKNN
from varscale.models.encoders import build_encoder
from varscale.models.networks import build_embedding_network


def online(digits, *overrides, labelled=True):
    torch.manual_seed(0)
    config = load_config("digits-varcon", [f"data.dir={digits}", "data.image_size=16", "schedule.epochs=8", *overrides])
    network = build_embedding_network(build_encoder("resnet18", image_size=16))
    place = Place(torch.device("cpu"))
    return OnlineKNN(config, read_dataset_info(digits), network, place, workers=1, labelled=labelled)


def due(knn):
    return [epoch for epoch in range(8) if knn.is_due(epoch)]


def test_it_is_due_every_few_epochs_and_at_the_end(digits):
    assert due(online(digits, "online_knn.every_epochs=3")) == [2, 5, 7]
    assert due(online(digits, "online_knn.every_epochs=0")) == []
    assert due(online(digits, "online_knn.every_epochs=3", labelled=False)) == []


def test_it_measures_the_encoder_and_leaves_the_network_in_training(digits):
    knn = online(digits, "online_knn.k=5", "compute.precision=float32")
    statistics = knn.network.encoder.bn1.running_mean.clone()
    found = knn.measure()
    assert found.keys() == {"top1_k5", "top5_k5"}
    assert 50 < found["top1_k5"] <= found["top5_k5"] <= 100
    assert knn.network.training
    assert torch.equal(knn.network.encoder.bn1.running_mean, statistics)
    knn.network.encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    assert knn.measure()["top1_k5"] < found["top1_k5"], "the encoder as it stands now must be measured"
