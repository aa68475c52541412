"""Cluster settings: defaults from YAML, options above them, mistakes told with the nearest key."""

import pytest
import yaml

from varscale.cluster.settings import ClusterSettings, load_settings, minutes
from varscale.errors import UserError


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("10:30", 11), ("1:30:00", 90), ("2-1", 2940), ("1-2:3", 1563), ("1-0:0:5", 1441), ("0:0:59", 1)],
)
def test_times_are_read_as_slurm_reads_them(time, expected):
    assert minutes(time) == expected


def test_the_file_in_the_repository_holds_every_key_with_its_default(repository):
    path = repository / "slurm" / "cluster.yaml"
    assert load_settings(path, {}) == ClusterSettings()
    assert set(yaml.safe_load(path.read_text())) == set(ClusterSettings.model_fields)


def test_options_are_above_the_file(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("{partition: a, nodes: 2, gpus_per_node: 8}")
    settings = load_settings(path, {"nodes": "4"})
    assert (settings.partition, settings.nodes, settings.ranks, settings.world_size) == ("a", 4, 8, 32)
    assert load_settings(path, {"ranks_per_node": "2"}).world_size == 4


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("gpu_per_node: 8", {}, "unknown key 'gpu_per_node'; nearest: gpus_per_node"),
        ("nodes: 0", {}, "nodes is 0: input should be greater than 0"),
        ("", {"memory_gb": "much"}, "--memory-gb is 'much': input should be a valid number"),
        ("time: 24:00:00", {}, "time: write 86400 in quotes"),
        ("[1]", {}, "holds no mapping"),
    ],
)
def test_mistakes(tmp_path, text, options, message):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_settings(path, options)
