"""Recipes load; every kind of mistake in a recipe or an override is one line that names the key and the nearest one."""

import subprocess
import sys
from importlib import resources

import pytest
import yaml

from varscale.config import OBJECTIVES, VarConConfig, load_config, parse_config, recipe_names, to_yaml
from varscale.errors import UserError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_survives_a_round_trip(name):
    config = load_config(name)
    assert config.name == name
    assert parse_config(yaml.safe_load(to_yaml(config)), "again") == config


def test_the_recipes_that_the_documentation_names_exist():
    data = ("digits", "cifar10", "cifar100", "imagenet100", "imagenet1k")
    assert {f"{d}-{o}" for d in data for o in OBJECTIVES} - {"imagenet1k-vssl"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_names_its_command_and_what_it_trains(name):
    path = resources.files("varscale.recipes").joinpath(f"{name}.yaml")
    assert f"varscale/train.py --config {name}\n" in path.read_text()
    data, _, objective = name.partition("-")
    assert load_config(name).objective.name == objective
    assert str(load_config(name).data.dir) == f"data/{data}"


def test_overrides_reach_their_key_and_leave_the_rest():
    config = load_config("digits-varcon", ["objective.epsilon=0.05", "optimizer.lr=1e-2", "output_dir=runs/x"])
    assert isinstance(config.objective, VarConConfig)
    assert (config.objective.epsilon, config.optimizer.lr, str(config.output_dir)) == (0.05, 0.01, "runs/x")
    assert config.encoder == load_config("digits-varcon").encoder


def test_a_path_works_as_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(load_config("digits-vssl")))
    assert load_config(str(path)) == load_config("digits-vssl")


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config("digits-varcon").seed = 3


VIT = ["encoder.name=vit_s", "encoder.stem=null", "encoder.patch_size=4"]
MISTAKES = [
    ("digits-varcom", [], "nearest: digits-varcon"),
    ("missing.yaml", [], "No such file"),
    ("digits-varcon", ["optimizer.lrr=1"], "unknown key 'optimizer.lrr'; nearest: optimizer.lr"),
    ("digits-varcon", ["lr=1"], "unknown key 'lr'; nearest: optimizer.lr"),
    ("digits-varcon", ["objective.predictor=true"], "the objective varcon has no key 'predictor', but vssl has"),
    ("digits-varcon", ["objective.name=vssl"], "the objective vssl has no key 'temperature', but varcon, supcon, "),
    ("digits-varcon", ["objective.epsilon=0.1"], "objective.epsilon is 0.1"),
    ("digits-varcon", ["objective.kl_weight=0", "objective.nll_weight=0"], "nothing would be learned"),
    ("digits-varcon", ["objective.name=varco"], "nearest: varcon"),
    ("digits-varcon", ["objective.name=moco"], f"choose from {', '.join(OBJECTIVES)}; nearest: mocov3"),
    ("digits-mocov3", ["objective.temp=1"], "the objective mocov3 has no key 'temp'; nearest: temperature"),
    ("digits-varcon", ["name=2024-13-45"], "the value is not valid YAML"),
    ("digits-cross_entropy", ["objective.label_smoothing=1"], "objective.label_smoothing is 1"),
    ("digits-simclr", ["data.views=1"], "data.views is 1, but simclr needs at least 2"),
    ("digits-varcon", ["encoder.name=resnet51"], "nearest: resnet50"),
    ("digits-varcon", ["encoder.name=vit_s"], "encoder.stem: vit_s has none"),
    ("digits-varcon", ["encoder.name=vit_s", "encoder.stem=null"], "encoder.patch_size: vit_s needs one"),
    ("digits-varcon", ["encoder.name=vit_s", "encoder.stem=null", "encoder.patch_size=5"], "nearest: 4"),
    ("digits-varcon", ["encoder.patch_size=4"], "encoder.patch_size: resnet18 has no patches"),
    (
        "digits-varcon",
        ["encoder.activation_checkpointing=true"],
        "encoder.activation_checkpointing: resnet18 has no transformer blocks; leave it false or take a ViT",
    ),
    ("digits-varcon", ["encoder.stem=null"], "encoder.stem: resnet18 needs one"),
    ("digits-varcon", ["objective.detach_centroids=false"], "choose objective.centroids=micro"),
    ("digits-varcon", ["schedule.epochs=8", "schedule.warmup_epochs=8"], "smaller than schedule.epochs"),
    ("digits-varcon", ["schedule.milestones=[3]"], "belongs to schedule.kind=steps"),
    ("digits-varcon", ["schedule.kind=steps"], "schedule.milestones: schedule.kind=steps needs"),
    ("digits-varcon", ["schedule.epochs=many"], "schedule.epochs is 'many'"),
    ("digits-varcon", ["data.crop_scale=[0.9, 0.5]"], "data.crop_scale is [0.9, 0.5]"),
    ("digits-varcon", ["data.local_views=6", "data.local_size=32"], "data.local_size is data.image_size (32)"),
    ("digits-varcon", ["data.local_views=6", *VIT], "data.local_views: vit_s takes views of one size only"),
    ("digits-varcon", ["data.crop_scale=[0.5]"], "data.crop_scale needs 2 values, found 1"),
    ("digits-varcon", ["data.views=1"], "data.views is 1"),
    ("digits-varcon", ["optimizer.lr=.nan"], "optimizer.lr is nan"),
    ("digits-varcon", ["deepspeed=zero2"], "deepspeed is a section, not a value; set one of deepspeed.config"),
    ("digits-varcon", ["seed"], "not of the form key.sub=value"),
    ("digits-varcon", ["encoder.name.x=1"], "name is a value, not a section"),
    ("digits-varcon", ["seed=[1"], "not valid YAML"),
    ("digits-vssl", ["objective.logvar_bounds=[2, -6]"], "objective.logvar_bounds"),
    ("digits-vssl", ["objective.kl_weight=0", "objective.likelihood_weight=0"], "nothing would be learned"),
]


@pytest.mark.parametrize(("recipe", "overrides", "message"), MISTAKES)
def test_mistakes_are_one_line_naming_the_key(recipe, overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_a_mapping_or_not_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in (("- 1\n", "no mapping"), ("a: [", "not valid YAML")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(str(path))


def test_checking_a_configuration_imports_nothing_heavy():
    code = (
        "import sys; from varscale.config import load_config, resolve_batch, resolve_deepspeed;"
        "c = load_config('digits-varcon'); resolve_deepspeed(c, resolve_batch(c.batch, 1));"
        "print({'torch', 'numpy', 'deepspeed', 'ffcv', 'numba'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_an_objectives_name_is_its_key_in_the_table():
    for name, section in OBJECTIVES.items():
        assert section().name == name
