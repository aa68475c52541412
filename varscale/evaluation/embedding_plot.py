"""Pictures of the embeddings in the plane, by t-SNE, PCA and, where it is installed and asked for, UMAP."""

import importlib.util
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat

from varscale.config import Section
from varscale.errors import UserError
from varscale.evaluation.context import NUMBER, Context, Layer, Result
from varscale.evaluation.subsets import balanced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEIGHBOURS = 5
FEWEST = 2 * NEIGHBOURS + 2  # points, for scikit-learn's trustworthiness
TITLES = {"tsne": "t-SNE", "pca": "PCA", "umap": "UMAP"}


class Settings(Section):
    """methods: of tsne, pca and umap. samples: validation images, balanced over classes. perplexity: of t-SNE."""

    layer: Layer = "embeddings"
    methods: Annotated[tuple[Literal["tsne", "pca", "umap"], ...], Field(min_length=1)] = ("tsne", "pca")
    samples: Annotated[int, Field(ge=FEWEST)] = 2_000
    perplexity: PositiveFloat = 30.0


def check(settings: Settings) -> None:
    """Raises UserError where UMAP is asked for and not installed."""
    if "umap" in settings.methods and importlib.util.find_spec("umap") is None:
        raise UserError("embedding_plot.methods: umap is not installed; install it with: pip install umap-learn")


def run(context: Context, settings: Settings) -> Result:
    """Two coordinates of each unit-norm validation embedding, and their trustworthiness: how far neighbours in the
    plane are neighbours among the embeddings, 1 where all are (scikit-learn's, 5 neighbours)."""
    from sklearn.manifold import trustworthiness

    val, seed = context.unit("val", settings.layer), context.images.seed
    order = balanced(val.labels, settings.samples, seed)
    points = val.features[torch.from_numpy(order)].numpy()
    if len(points) < FEWEST:
        raise UserError(
            f"embedding_plot: {len(points)} validation images are too few for a picture, which takes {FEWEST}"
        )
    metrics, coordinates = {}, {}
    is_one_point = not np.ptp(points, axis=0).any()
    for method in dict.fromkeys(settings.methods):
        # Scikit-learn's t-SNE ends the whole process with a segmentation fault where no two points differ.
        plane = np.zeros((len(points), 2)) if is_one_point else PLANES[method](points, settings, seed % 2**32)
        metrics[f"trustworthiness_{method}"] = float(trustworthiness(points, plane, n_neighbors=NEIGHBOURS))
        # Four digits of the picture's extent: more than a pixel needs.
        extent = float(np.abs(plane).max()) or 1.0
        coordinates[method] = np.round(plane / extent, 4).tolist()
    details = {
        "coordinates": coordinates,
        "labels": val.labels[torch.from_numpy(order)].tolist(),
        "indices": order.tolist(),
        "classes": list(context.images.classes),
    }
    described = settings.model_dump() | {"samples_used": len(points)}
    notes = context.layer_notes(settings.layer)
    if is_one_point:
        notes += ("all embeddings are the same: there is nothing to draw",)
    return Result(metrics, described, notes, dict.fromkeys(metrics, NUMBER), details)


def tsne(points: np.ndarray, settings: Settings, seed: int) -> np.ndarray:
    """Scikit-learn's t-SNE from PCA, (N, D) -> (N, 2); the perplexity at most a third of the neighbours there are."""
    from sklearn.manifold import TSNE

    perplexity = min(settings.perplexity, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)


def pca(points: np.ndarray, settings: Settings, seed: int) -> np.ndarray:
    """The two principal components, (N, D) -> (N, 2)."""
    from sklearn.decomposition import PCA

    return PCA(2, svd_solver="full").fit_transform(points)


def umap(points: np.ndarray, settings: Settings, seed: int) -> np.ndarray:
    """umap-learn's embedding with its own defaults, (N, D) -> (N, 2)."""
    from umap import UMAP

    return UMAP(random_state=seed, n_jobs=1).fit_transform(points)


PLANES = {"tsne": tsne, "pca": pca, "umap": umap}


def draw(details: dict) -> "Figure":
    """A scatter plot for each method, a colour for each class."""
    from varscale.evaluation.drawing import MOST_LEGEND_ENTRIES, class_colours, new_figure

    labels, classes = np.array(details["labels"]), details["classes"]
    colours = class_colours(len(classes))
    figure, axes = new_figure(len(details["coordinates"]))
    size = max(2, min(14, 9000 / len(labels)))
    for axis, (method, plane) in zip(axes, details["coordinates"].items(), strict=True):
        axis.scatter(*np.array(plane).T, c=colours[labels], s=size, linewidths=0)
        axis.set(title=TITLES[method], xticks=[], yticks=[])
        axis.set_aspect("equal", adjustable="datalim")
    if len(classes) <= MOST_LEGEND_ENTRIES:
        for name, colour in zip(classes, colours, strict=True):
            axes[-1].plot([], [], "o", color=colour, label=name)
        figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle("Validation embeddings, a colour for each class")
    return figure
