"""Clustering: how far the classes are found again without labels, and which of them lie near each other."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from varscale.config import Section
from varscale.evaluation.context import NUMBER, Context, Layer, Result
from varscale.evaluation.subsets import balanced
from varscale.objectives.centroids import local_statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMES = 200  # a dendrogram of more classes has no room for their names


class Settings(Section):
    """samples: validation images for k-means. hierarchical_samples: for Ward's method, whose memory is quadratic.
    restarts: of k-means, the best of which counts."""

    layer: Layer = "features"
    samples: PositiveInt = 10_000
    hierarchical_samples: PositiveInt = 2_000
    restarts: PositiveInt = 5


def run(context: Context, settings: Settings) -> Result:
    """Clusters of unit-norm validation features, as many as there are classes, compared with the classes: adjusted Rand
    index and normalised mutual information (scikit-learn's) and purity, the share of samples whose class is the most
    frequent of their cluster.

    `kmeans`: k-means. `ward`: Ward's hierarchical clustering, on fewer samples. `means`: each sample goes to the
    training split's class mean nearest by cosine; no clustering, but what clusters at the class means would give.
    The tree of classes (`details`) joins the means of validation features by average linkage of cosine distances;
    `cophenetic`: the correlation of the distances with those in the tree, 1 where the classes are truly nested.
    """
    val, seed = context.unit("val", settings.layer), context.images.seed
    chosen, fewer = (
        torch.from_numpy(balanced(val.labels, count, seed))
        for count in (settings.samples, settings.hierarchical_samples)
    )
    train = context.unit("train", settings.layer)
    clusters = {
        "kmeans": (chosen, kmeans(val.features[chosen], context.num_classes, settings.restarts, seed)),
        "ward": (fewer, ward(val.features[fewer], context.num_classes)),
        "means": (chosen, nearest_mean(train.features, train.labels, val.features[chosen], context.num_classes)),
    }
    metrics = {
        f"{name}_{metric}": value
        for name, (rows, found) in clusters.items()
        for metric, value in agreement(val.labels[rows].numpy(), found).items()
    }
    units = {name: NUMBER for name in metrics if not name.endswith("purity")}
    details, notes = {}, context.layer_notes(settings.layer)
    present = [c for c in range(context.num_classes) if (val.labels == c).any()]
    means = torch.stack([val.features[val.labels == c].double().mean(dim=0) for c in present]).numpy()
    if len(present) > 2 and not (means.any(axis=1).all() and np.ptp(means, axis=0).any()):
        notes += ("the means of all classes are the same, or some are zero: no tree was made",)
    elif len(present) > 2:
        metrics["cophenetic"], tree = class_tree(means)
        units["cophenetic"] = NUMBER
        details = {"linkage": tree.tolist(), "classes": [context.images.classes[c] for c in present]}
    else:
        notes += ("a tree needs at least three classes: none was made",)
    described = settings.model_dump() | {"samples_used": len(chosen), "hierarchical_samples_used": len(fewer)}
    return Result(metrics, described, notes, units, details)


def kmeans(points: Tensor, clusters: int, restarts: int, seed: int) -> np.ndarray:
    """Scikit-learn's k-means of `points: (N, D)`: the cluster of each, (N,) int."""
    from sklearn.cluster import KMeans

    clusters = min(clusters, len(points))
    return KMeans(clusters, n_init=restarts, random_state=seed % 2**32).fit_predict(points.numpy())


def ward(points: Tensor, clusters: int) -> np.ndarray:
    """Scipy's Ward clustering of `points: (N, D)`, the tree cut into `clusters`: (N,) int."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(points) < 2:
        return np.zeros(len(points), int)
    return fcluster(linkage(points.double().numpy(), "ward"), clusters, criterion="maxclust")


def nearest_mean(train: Tensor, labels: Tensor, points: Tensor, num_classes: int) -> np.ndarray:
    """The class whose mean direction over `train: (M, D)`, unit-norm, is nearest to each of `points: (N, D)`: (N,)."""
    statistics = local_statistics(train, labels, num_classes)
    similarities = (points @ statistics.centroids().to(points).T).masked_fill(~statistics.present, -torch.inf)
    return statistics.class_ids[similarities.argmax(dim=1)].numpy()


def agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """ARI, NMI (arithmetic mean of the entropies) and purity in percent of `clusters: (N,)` against `labels: (N,)`."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    return {
        "ari": float(adjusted_rand_score(labels, clusters)),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "purity": 100 * int(contingency_matrix(labels, clusters).max(axis=0).sum()) / len(labels),
    }


def class_tree(means: np.ndarray) -> tuple[float, np.ndarray]:
    """The cophenetic correlation, and scipy's linkage matrix (C - 1, 4) of `means: (C, D)`, its leaves in the order in
    which neighbours are most alike."""
    from scipy.cluster.hierarchy import cophenet, linkage
    from scipy.spatial.distance import pdist

    distances = pdist(means, "cosine").clip(min=0)
    tree = linkage(distances, "average", optimal_ordering=len(means) <= MOST_NAMES)
    return float(cophenet(tree, distances)[0]), tree


def draw(details: dict) -> "Figure | None":
    """The dendrogram of the classes."""
    from scipy.cluster.hierarchy import dendrogram

    from varscale.evaluation.drawing import BLUE, new_figure

    if not details:
        return None
    names = details["classes"]
    shown = len(names) <= MOST_NAMES
    figure, (axis,) = new_figure(width=6.5, height=min(30, 1.5 + 0.22 * len(names)) if shown else 12)
    dendrogram(
        np.array(details["linkage"]),
        orientation="right",
        labels=names if shown else None,
        no_labels=not shown,
        color_threshold=0,
        above_threshold_color=BLUE,
        leaf_font_size=9 if len(names) <= 40 else 7,
        ax=axis,
    )
    axis.set(
        title="Classes by the cosine distance of their means", xlabel="distance at which they join (average linkage)"
    )
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    return figure
