"""One rank of the distributed objective tests: computes every case on its share of the batch and saves what it found.

Usage: objectives_worker.py FOLDER, with FOLDER/cases.pt from test_objectives.py.
"""

import operator
import sys
from datetime import timedelta
from functools import reduce
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from varscale.objectives.byol import byol_loss
from varscale.objectives.centroids import class_statistics, local_statistics
from varscale.objectives.mocov3 import mocov3_loss
from varscale.objectives.supcon import supcon_loss
from varscale.objectives.varcon import varcon_loss, varcon_loss_from_statistics
from varscale.objectives.vssl import Gaussian, vssl_loss


def varcon_case(case, inputs, labels, group):
    """Loss and weight gradient of embeddings = normalise(inputs weight), the local mean as the engine would see it."""
    weight = case["weight"].clone().requires_grad_()

    def embed(part):
        return F.normalize(part @ weight)

    if case["micro_batches"] == 1:
        loss, terms = varcon_loss(
            embed(inputs), labels, case["num_classes"], detach_centroids=case["detach_centroids"], group=group
        )
        loss.backward()
        return {"loss": loss.detach(), "gradient": weight.grad, "classes_present": terms["classes_present"]}

    parts = list(zip(inputs.chunk(case["micro_batches"]), labels.chunk(case["micro_batches"]), strict=True))
    with torch.no_grad():
        local = reduce(operator.add, (local_statistics(embed(x), y, case["num_classes"]) for x, y in parts))
        coming = local.begin_all_reduce(group)
    embeddings = [embed(x) for x, _ in parts]
    statistics = coming()
    losses = [
        varcon_loss_from_statistics(z, y, statistics)[0] / len(parts)
        for z, (_, y) in zip(embeddings, parts, strict=True)
    ]
    sum(losses).backward()
    return {"loss": sum(losses).detach(), "gradient": weight.grad, "classes_present": statistics.present.sum()}


def statistics_case(case, inputs, labels, group):
    """The class statistics alone, of as many samples as the rank happens to have."""
    statistics = class_statistics(inputs, labels, case["num_classes"], group=group)
    present = statistics.present
    return {"class_ids": statistics.class_ids[present], "totals": statistics.totals[present]}


def vssl_case(case, inputs, labels, group):
    weight = case["weight"].clone().requires_grad_()
    student, teacher = ([Gaussian(*half.chunk(2, 1)) for half in x.chunk(2, 1)] for x in (inputs @ weight, inputs))
    loss, _ = vssl_loss(student, teacher)
    loss.backward()
    return {"loss": loss.detach(), "gradient": weight.grad}


def supcon_case(case, inputs, labels, group):
    weight = case["weight"].clone().requires_grad_()
    loss, terms = supcon_loss(F.normalize(inputs @ weight), labels, temperature=0.3, group=group)
    loss.backward()
    return {"loss": loss.detach(), "gradient": weight.grad, "cosine": terms["cosine"]}


def mocov3_case(case, inputs, labels, group):
    weight = case["weight"].clone().requires_grad_()
    loss, terms = mocov3_loss((inputs @ weight).chunk(2, 1), inputs.chunk(2, 1), temperature=0.3, group=group)
    loss.backward()
    return {"loss": loss.detach(), "gradient": weight.grad, "cosine": terms["cosine"]}


def byol_case(case, inputs, labels, group):
    weight = case["weight"].clone().requires_grad_()
    loss, terms = byol_loss((inputs @ weight).chunk(2, 1), inputs.chunk(2, 1))
    loss.backward()
    return {"loss": loss.detach(), "gradient": weight.grad, "cosine": terms["cosine"]}


KINDS = {
    "varcon": varcon_case,
    "statistics": statistics_case,
    "vssl": vssl_case,
    "supcon": supcon_case,
    "mocov3": mocov3_case,
    "byol": byol_case,
}


class Traffic:
    """Counts the calls and the numbers handed to torch.distributed.all_reduce, which it passes on."""

    def __init__(self):
        self.calls = self.numbers = 0
        self._all_reduce, dist.all_reduce = dist.all_reduce, self

    def __call__(self, tensor, *args, **kwargs):
        self.calls, self.numbers = self.calls + 1, self.numbers + tensor.numel()
        return self._all_reduce(tensor, *args, **kwargs)


def main(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    groups = {world_size: None, 2: dist.new_group([0, 1]), 1: dist.new_group([0])}
    traffic, found = Traffic(), {}
    for name, case in torch.load(folder / "cases.pt").items():
        if rank >= len(case["shares"]):
            continue
        share = case["shares"][rank]
        before = traffic.calls, traffic.numbers
        found[name] = KINDS[case["kind"]](
            case, case["inputs"][share], case["labels"][share], groups[len(case["shares"])]
        )
        found[name] |= {"calls": traffic.calls - before[0], "numbers": traffic.numbers - before[1]}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
