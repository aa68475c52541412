"""Features kept on the disk: what is found again, what is refused, and that a full or foreign file is no end."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from varscale.evaluation.cache import FeatureCache, tensors_digest
from varscale.evaluation.features import Features

ORIGIN = {"model": "a", "split": "val", "mean": [0.1, 0.2]}


def features(value: float = 1.0) -> Features:
    return Features(torch.full((4, 3), value), torch.arange(4), torch.arange(4))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path, said) -> FeatureCache:
    return FeatureCache(tmp_path / "features", say=said.append)


def fail() -> Features:
    raise AssertionError("the features were there")


def test_what_was_made_once_is_read_again(cache, said):
    made = cache.get(ORIGIN, features)
    found = cache.get(dict(reversed(ORIGIN.items())), fail)
    assert all(torch.equal(a, b) for a, b in zip(found, made, strict=True))
    assert found.labels.dtype == torch.int64
    assert said == []


@pytest.mark.parametrize("change", [{"model": "b"}, {"split": "train"}, {"mean": [0.1, 0.3]}, {"seed": 0}])
def test_another_origin_is_another_file(cache, change):
    cache.get(ORIGIN, features)
    other = cache.get(ORIGIN | change, lambda: features(2.0))
    assert other.features[0, 0] == 2
    assert cache.get(ORIGIN, fail).features[0, 0] == 1


def only_file(cache):
    (path,) = cache.folder.iterdir()
    return path


def test_a_truncated_file_is_made_anew_and_said(cache, said):
    cache.get(ORIGIN, features)
    path = only_file(cache)
    path.write_bytes(path.read_bytes()[:-7])
    assert cache.get(ORIGIN, lambda: features(3.0)).features[0, 0] == 3
    assert "is damaged" in said[0]
    assert str(path) in said[0]
    assert cache.get(ORIGIN, fail).features[0, 0] == 3


def test_a_flipped_bit_is_noticed(cache, said):
    cache.get(ORIGIN, features)
    path = only_file(cache)
    contents = bytearray(path.read_bytes())
    contents[-5] ^= 1
    path.write_bytes(contents)
    assert cache.get(ORIGIN, lambda: features(4.0)).features[0, 0] == 4
    assert "SHA-256" in said[0]


def test_a_foreign_file_under_the_name_is_replaced(cache, said):
    cache.get(ORIGIN, features)
    path = only_file(cache)
    save_file(load_file(path), path, {"digest": "another"})
    assert cache.get(ORIGIN, lambda: features(5.0)).features[0, 0] == 5
    assert "was made by something else" in said[0]


def test_where_nothing_can_be_written_the_features_are_given_all_the_same(cache, said):
    cache.folder.write_text("a file where the folder should be")
    assert cache.get(ORIGIN, features).features[0, 0] == 1
    assert "cannot be written" in said[0]


def test_a_file_that_another_rank_does_not_see_is_not_taken(cache):
    cache.get(ORIGIN, features)
    cache.gather = lambda flag: torch.cat([flag, torch.zeros_like(flag)])
    assert cache.get(ORIGIN, lambda: features(6.0)).features[0, 0] == 6


def test_others_may_read_what_the_umask_lets_them(cache):
    cache.get(ORIGIN, features)
    (file,) = cache.folder.glob("*.safetensors")
    (beside := cache.folder / "beside").touch()
    assert file.stat().st_mode == beside.stat().st_mode


def test_rank_1_writes_nothing(tmp_path):
    FeatureCache(tmp_path / "features", rank=1).get(ORIGIN, features)
    assert not (tmp_path / "features").exists()


def test_the_digest_covers_names_shapes_types_and_contents():
    tensors = {"a": torch.arange(4.0), "b": torch.tensor(3)}
    changed = [
        {"a": torch.arange(4.0), "c": torch.tensor(3)},
        {"a": torch.arange(4.0)[None], "b": torch.tensor(3)},
        {"a": torch.arange(4.0), "b": torch.tensor(3, dtype=torch.int32)},
        {"a": torch.arange(1.0, 5.0), "b": torch.tensor(3)},
    ]
    assert len({tensors_digest(one) for one in [tensors, *changed]}) == 5
    assert tensors_digest(dict(reversed(tensors.items()))) == tensors_digest(tensors)
    assert tensors_digest({"half": torch.ones(3, dtype=torch.bfloat16)})
