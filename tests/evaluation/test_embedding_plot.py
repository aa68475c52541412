"""Coordinates in the plane: scikit-learn's, reproducible, and what cannot be drawn."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from torch.nn import functional as F

from varscale.errors import UserError
from varscale.evaluation.embedding_plot import Settings, check, draw, run


def test_pca_is_scikit_learns_up_to_scale(on_features, make_clouds):
    data = make_clouds(60, 3, 1)
    result = run(on_features(data, data, 3), Settings(methods=("pca",)))
    plane = np.array(result.details["coordinates"]["pca"])
    expected = PCA(2).fit_transform(F.normalize(data.features).numpy())
    expected /= np.abs(expected).max()
    for column in (0, 1):
        assert abs(np.corrcoef(plane[:, column], expected[:, column])[0, 1]) == pytest.approx(1, abs=1e-4)
    assert np.abs(plane).max() == pytest.approx(1)


@pytest.mark.parametrize("method", ["tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_a_method_is_reproducible_and_keeps_neighbours(on_features, make_clouds, method):
    data = make_clouds(90, 3, 2, spread=0.3)
    settings = Settings(methods=(method,), samples=45)
    first, second = (run(on_features(data, data, 3), settings) for _ in range(2))
    assert first.details == second.details
    assert np.bincount(first.details["labels"]).tolist() == [15, 15, 15]
    assert data.labels[first.details["indices"]].tolist() == first.details["labels"]
    assert 0.8 < first.metrics[f"trustworthiness_{method}"] <= 1


def test_the_picture_names_the_classes(on_features, make_clouds):
    data = make_clouds(60, 3, 3)
    figure = draw(run(on_features(data, data, 3), Settings(methods=("pca", "tsne"))).details)
    assert [axis.get_title() for axis in figure.axes] == ["PCA", "t-SNE"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["class 0", "class 1", "class 2"]


def test_too_few_images_are_refused(on_features, make_clouds):
    data = make_clouds(8, 2, 4)
    with pytest.raises(UserError, match="8 validation images are too few"):
        run(on_features(data, data, 2), Settings())


def test_umap_is_asked_for_only_where_it_is_installed(monkeypatch):
    check(Settings(methods=("umap",)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        check(Settings(methods=("umap",)))
    check(Settings())


def test_a_collapsed_encoder_is_drawn_as_one_point(on_features, make_clouds):
    """Scikit-learn's t-SNE ends the process with a segmentation fault there."""
    data = make_clouds(60, 3, 1)
    data = data._replace(features=data.features * 0)
    result = run(on_features(data, data, 3), Settings())
    assert not np.array(result.details["coordinates"]["tsne"]).any()
    assert result.notes[-1] == "all embeddings are the same: there is nothing to draw"
    draw(result.details)
