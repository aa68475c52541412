"""A run may be continued with another machine's layout, but not with another experiment's settings."""

import json

import pytest

from varscale.config import load_config
from varscale.engine.manifest import refuse_another_run, write_manifest
from varscale.errors import UserError


@pytest.fixture
def manifest(tmp_path):
    config = load_config("digits-varcon", [f"output_dir={tmp_path}/run"])
    write_manifest(config, {"zero_optimization": {"stage": 2}}, "digest", world_size=2, device="cpu")
    write_manifest(config, {"zero_optimization": {"stage": 0}}, "digest", world_size=1, device="cpu")
    return json.loads((tmp_path / "run" / "manifest.json").read_text())


def test_every_start_is_listed(manifest):
    assert [start["world_size"] for start in manifest["starts"]] == [2, 1]
    assert manifest["starts"][0]["versions"]["ffcv"] == "1.0.2"


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=elsewhere",
        "deepspeed.config=zero3",
        "data.workers=7",
        "batch.micro_batch_size=16",
        "checkpoint.keep=5",
    ],
)
def test_what_may_change(manifest, override):
    refuse_another_run(manifest, load_config("digits-varcon", [override]), "digest", "run")


def test_whether_activations_are_kept_may_change(tmp_path):
    vit = ["encoder={name: vit_s, patch_size: 4}"]
    write_manifest(
        load_config("digits-varcon", [*vit, f"output_dir={tmp_path}/run"]), {}, "digest", world_size=1, device="cpu"
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    now = load_config("digits-varcon", [*vit, "encoder.activation_checkpointing=true"])
    refuse_another_run(manifest, now, "digest", "run")
    del manifest["config"]["encoder"]["activation_checkpointing"]  # of a run that is older than this key
    refuse_another_run(manifest, now, "digest", "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoder.name=resnet34", "encoder.name is 'resnet18' there, 'resnet34' now"),
        ("optimizer.lr=1", "optimizer.lr is 0.05 there, 1.0 now"),
        ("schedule.epochs=99", "schedule.epochs"),
        ("batch.global_batch_size=32", "batch.global_batch_size"),
        ("data.flip=0.5", "data.flip"),
    ],
)
def test_what_may_not(manifest, override, message):
    with pytest.raises(UserError, match=message):
        refuse_another_run(manifest, load_config("digits-varcon", [override]), "digest", "run")


def test_centroids_of_micro_batches_want_the_same_micro_batches(tmp_path):
    micro = ["objective.centroids=micro", f"output_dir={tmp_path}/run"]
    write_manifest(load_config("digits-varcon", micro), {}, "digest", world_size=1, device="cpu")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    refuse_another_run(manifest, load_config("digits-varcon", micro), "digest", "run")
    with pytest.raises(UserError, match=r"batch\.max_micro_batch_size is None there, 8 now"):
        refuse_another_run(
            manifest, load_config("digits-varcon", [*micro, "batch.max_micro_batch_size=8"]), "digest", "run"
        )


def test_other_data_is_refused(manifest):
    with pytest.raises(UserError, match="other data"):
        refuse_another_run(manifest, load_config("digits-varcon"), "another digest", "run")
