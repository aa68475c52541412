"""Gradients averaged over 1, 2 and 4 real processes equal those of one process on the union of their batches."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from varscale.objectives.byol import byol_loss
from varscale.objectives.centroids import class_statistics
from varscale.objectives.mocov3 import mocov3_loss
from varscale.objectives.supcon import supcon_loss
from varscale.objectives.varcon import varcon_loss
from varscale.objectives.vssl import Gaussian, vssl_loss

RANKS, SAMPLES, WIDTH, CLASSES = 4, 48, 8, 10
MILLION = 1_000_000
UNEVEN = [torch.arange(0, 1), torch.arange(1, 30), torch.arange(30, 33), torch.arange(33, SAMPLES)]


def make_case(kind, world, num_classes=CLASSES, **options):
    """One batch for `world` ranks; rank 0 holds a single class where there are several ranks."""
    generator = torch.Generator().manual_seed(world + num_classes)
    labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    if world > 1:
        labels[: SAMPLES // world] = 7
    return {
        "kind": kind,
        "num_classes": num_classes,
        "inputs": torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64),
        "labels": labels * (num_classes // CLASSES),
        "weight": torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64),
        "shares": list(torch.arange(SAMPLES).chunk(world)),
        "detach_centroids": True,
        "micro_batches": 1,
    } | options


VARCON = {
    f"{world} ranks, {num_classes} classes, {'detached' if detach else 'differentiable'}": make_case(
        "varcon", world, num_classes, detach_centroids=detach
    )
    for world, num_classes, detach in itertools.product((1, 2, RANKS), (CLASSES, MILLION), (True, False))
} | {
    f"{world} ranks, {num_classes} classes, 3 micro-batches": make_case("varcon", world, num_classes, micro_batches=3)
    for world, num_classes in itertools.product((1, 2, RANKS), (CLASSES, MILLION))
}
STATISTICS = {
    f"uneven, {num_classes} classes": make_case("statistics", RANKS, num_classes, shares=UNEVEN)
    for num_classes in (CLASSES, MILLION)
}
VSSL = {f"vssl, {world} ranks": make_case("vssl", world) for world in (1, 2, RANKS)}

BASELINES = {
    f"{kind}, {world} ranks": make_case(kind, world) for kind in ("supcon", "mocov3", "byol") for world in (1, 2, RANKS)
} | {
    # Every sample's only positive is on another rank.
    f"simclr, {world} ranks": make_case("supcon", world, labels=torch.arange(SAMPLES // 2).repeat(2))
    for world in (1, 2, RANKS)
}
ALL = VARCON | STATISTICS | VSSL | BASELINES


@pytest.fixture(scope="module")
def found(run_ranks, tmp_path_factory):
    """What each rank found in each case: a list of dictionaries by case name. All cases share four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(ALL, folder / "cases.pt")
    ranks = run_ranks(Path(__file__).with_name("objectives_worker.py"), RANKS, folder, timeout=120)
    return {name: [rank[name] for rank in ranks if name in rank] for name in ALL}


def averaged(results, key):
    return torch.stack([result[key] for result in results]).mean(0)


@pytest.mark.parametrize("name", VARCON)
def test_varcon_equals_one_process(found, name):
    case = VARCON[name]
    assert len(found[name]) == len(case["shares"])
    weight = case["weight"].clone().requires_grad_()
    loss, terms = varcon_loss(
        F.normalize(case["inputs"] @ weight),
        case["labels"],
        case["num_classes"],
        detach_centroids=case["detach_centroids"],
    )
    loss.backward()
    torch.testing.assert_close(averaged(found[name], "loss"), loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(averaged(found[name], "gradient"), weight.grad, rtol=0, atol=1e-12)
    assert all(result["classes_present"] == terms["classes_present"] for result in found[name])


@pytest.mark.parametrize("name", VARCON)
def test_varcon_traffic(found, name):
    """One all-reduce of the statistics whatever the number of micro-batches, and one more for their gradient."""
    case = VARCON[name]
    dense = case["num_classes"] == CLASSES
    rows = CLASSES if dense else len(case["labels"].unique())
    exchanges = 0 if len(case["shares"]) == 1 else 1 if case["detach_centroids"] else 2
    agreement = 0 if dense or not exchanges else 1  # of one number, before the exchange of class ids
    for result in found[name]:
        assert result["calls"] == exchanges + agreement
        assert result["numbers"] == exchanges * rows * (WIDTH + 1) + agreement


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_uneven_batches(found, name):
    case = STATISTICS[name]
    whole = class_statistics(case["inputs"], case["labels"], case["num_classes"])
    for result in found[name]:
        assert torch.equal(result["class_ids"], whole.class_ids[whole.present])
        torch.testing.assert_close(result["totals"], whole.totals[whole.present], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", VSSL)
def test_vssl_equals_one_process(found, name):
    case = VSSL[name]
    weight = case["weight"].clone().requires_grad_()
    student, teacher = (
        [Gaussian(*half.chunk(2, 1)) for half in views.chunk(2, 1)]
        for views in (case["inputs"] @ weight, case["inputs"])
    )
    loss, _ = vssl_loss(student, teacher)
    loss.backward()
    torch.testing.assert_close(averaged(found[name], "loss"), loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(averaged(found[name], "gradient"), weight.grad, rtol=0, atol=1e-12)
    assert all(result["calls"] == 0 for result in found[name])


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_equals_one_process(found, name):
    case = BASELINES[name]
    assert len(found[name]) == len(case["shares"])
    weight = case["weight"].clone().requires_grad_()
    outputs = case["inputs"] @ weight
    if case["kind"] == "supcon":
        loss, terms = supcon_loss(F.normalize(outputs), case["labels"], temperature=0.3)
    else:
        objective = {"byol": byol_loss, "mocov3": partial(mocov3_loss, temperature=0.3)}[case["kind"]]
        loss, terms = objective(outputs.chunk(2, 1), case["inputs"].chunk(2, 1))
    loss.backward()
    assert weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(averaged(found[name], "loss"), loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(averaged(found[name], "gradient"), weight.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(averaged(found[name], "cosine"), terms["cosine"], rtol=0, atol=1e-12)
