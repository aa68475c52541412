#!/usr/bin/env python
"""Time and memory of VarCon's forward and backward pass, beside other ways to write it and a pairwise loss.

    python tools/bench_objectives.py                  # on the CPU, and on the GPU with --device cuda
    python tools/bench_objectives.py --threads 1 --repeats 9

The contenders take turns, so that a busy machine slows all of them; times are medians. The pairwise loss is
pytorch-metric-learning's SupConLoss (pip install pytorch-metric-learning); without that package its rows say so.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from measuring import resident_growth
from torch import Tensor

from varscale.objectives.varcon import varcon_loss

SHAPES = ((512, 100, 128), (2048, 100, 128), (8192, 1000, 128), (8192, 1000, 256))  # embeddings N, classes C, width D
TEMPERATURE, EPSILON = 0.1, 0.02


def make_batch(samples: int, classes: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Unit-norm embeddings (N, D) that need a gradient, and labels (N,); the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(samples, width, generator=generator)).to(device).requires_grad_()
    return embeddings, torch.randint(classes, (samples,), generator=generator).to(device)


def ours(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    return varcon_loss(embeddings, labels, classes, temperature=TEMPERATURE, epsilon=EPSILON)[0]


def transcription(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Equations 7 to 13 of the paper as they stand there: dense one-hot labels, both distributions by softmax."""
    one_hot = F.one_hot(labels, classes).float()
    centroids = F.normalize((one_hot.T @ embeddings.detach()) / one_hot.sum(0).clamp(min=1).unsqueeze(1))
    logits = (embeddings @ centroids.T / TEMPERATURE).masked_fill(one_hot.sum(0) == 0, -torch.inf)
    log_p = logits.log_softmax(1)
    p_own = (log_p.masked_fill(one_hot == 0, 0).sum(1)).exp()
    tau2 = (TEMPERATURE - EPSILON) + 2 * EPSILON * p_own
    q = (one_hot / tau2.unsqueeze(1)).masked_fill(one_hot.sum(0) == 0, -torch.inf).softmax(1)
    kl = torch.where(q > 0, q * (q.log() - log_p), 0.0).sum(1)
    return (kl - p_own.log()).mean()


def pairwise(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(TEMPERATURE)(embeddings, labels)


def floor(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """No loss, but what none with these logits can do without: two matrix products and two passes over the logits."""
    with torch.no_grad():
        centroids = embeddings[:classes]
        logits = embeddings @ centroids.T
        gradient = logits.exp_().mul_(0.5) @ centroids
    return (embeddings * gradient).sum()


CONTENDERS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "varcon_loss": ours,
    "transcription": transcription,
    "SupConLoss": pairwise,
    "two products, two passes": floor,
}


def step(name: str, embeddings: Tensor, labels: Tensor, classes: int) -> float:
    """Seconds of one forward and backward pass."""
    embeddings.grad = None
    start = time.perf_counter()
    CONTENDERS[name](embeddings, labels, classes).backward()
    if embeddings.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(name: str, shape: tuple[int, int, int], device: str, threads: int) -> int | None:
    """Bytes that one step needs on top of its inputs: of the allocator on a GPU, of the whole process on a CPU."""
    if device == "cuda":
        return _peak_memory(name, shape, device, threads)
    context = multiprocessing.get_context("spawn")  # a fresh process, whose memory no contender has grown yet
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (name, shape, device, threads))


def _peak_memory(name: str, shape: tuple[int, int, int], device: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    step(name, *make_batch(64, 8, shape[2], device), 8)  # loads libraries
    embeddings, labels = make_batch(*shape, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, embeddings, labels, shape[1])
        return torch.cuda.max_memory_allocated() - before
    return resident_growth(lambda: step(name, embeddings, labels, shape[1]))


def measure(shape: tuple[int, int, int], device: str, repeats: int, threads: int) -> list[str]:
    """Rows of the table: contender, milliseconds, ratio, memory in units of the logits."""
    embeddings, labels = make_batch(*shape, device)
    names = [name for name in CONTENDERS if name != "SupConLoss" or have_metric_learning()]
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):  # the first round warms up
        for name in names:
            seconds = step(name, embeddings, labels, shape[1])
            if repeat:
                times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    logits = 4 * shape[0] * shape[1]
    rows = []
    for name in CONTENDERS:
        if name not in medians:
            rows.append(f"| {shape} | {name} | pytorch-metric-learning is not installed | | |")
            continue
        memory = peak_memory(name, shape, device, threads) / logits
        ratio = medians[name] / medians["varcon_loss"]
        rows.append(f"| {shape} | {name} | {1e3 * medians[name]:.2f} | {ratio:.2f} | {memory:.2f} |")
    return rows


def have_metric_learning() -> bool:
    try:
        import pytorch_metric_learning  # noqa: F401
    except ImportError:
        return False
    return True


def shape(text: str) -> tuple[int, int, int]:
    """Embeddings, classes and width from the command line."""
    samples, classes, width = map(int, text.split(","))
    return samples, classes, width


def check_agreement(device: str) -> None:
    """The transcription must be the same function, or its time would mean nothing."""
    results = []
    for name in ("varcon_loss", "transcription"):
        embeddings, labels = make_batch(256, 20, 32, device)
        loss = CONTENDERS[name](embeddings, labels, 20)
        loss.backward()
        results.append((loss.detach(), embeddings.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="N,C,D", help="of the batches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    check_agreement(options.device)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, medians of {options.repeats}\n")
    print("| (N, C, D) | | ms, forward + backward | times varcon_loss | peak extra memory / logits |")
    print("|---|---|---|---|---|")
    for sizes in options.shapes:
        for row in measure(sizes, options.device, options.repeats, options.threads):
            print(row, flush=True)


if __name__ == "__main__":
    main()
