"""What a model card tells of a run."""

import json

import pytest
import yaml
from small_runs import VIT, make_run

from varscale.config import parse_config
from varscale.data.dataset import read_dataset_info
from varscale.encoder.card import model_card
from varscale.encoder.description import Description
from varscale.engine.rundir import find_checkpoint
from varscale.errors import UserError


def card_of(run, data, config, file="e.safetensors"):
    info = read_dataset_info(data[0])
    run, checkpoint = find_checkpoint(run)
    description = Description.of_run(config, info, 512, 7)
    return model_card(run, checkpoint, description, info, file=file, code="import theirs")


def section(card, name):
    return card.split(f"\n## {name}\n\n")[1].split("\n\n## ")[0]


def write_results(run):
    record = {
        "model": "trained",
        "evaluator": "knn",
        "metrics": {"top1_k20": 61.234, "confusion": [[1, 2]]},
        "settings": {"k": [20], "temperature": 0.07},
        "details": {},
        "data": {"dir": "data/a", "digest": "abcdef" * 10, "val": 1234},
    }
    other = record | {"evaluator": "transfer", "metrics": {"linear_top1": 7.5}, "settings": {}}
    other |= {"data": {"dir": "data/flowers", "digest": "012345" * 10, "val": 99}}
    corrupted = other | {"evaluator": "corruption", "variant": "CIFAR-10-C", "data": record["data"]}
    (run / "evaluation").mkdir()
    (run / "evaluation" / "step-00000007.json").write_text(json.dumps({"results": [record, other, corrupted]}))
    lines = [{"kind": "train", "step": 1, "loss": 3.0}]
    lines += [{"kind": "knn", "step": step, "time": 1.0, "top1_k20": 50.0 + step} for step in (3, 6, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_it_tells_data_training_preprocessing_and_licence(tmp_path, data):
    config, _ = make_run(tmp_path / "run", data)
    info, batch = read_dataset_info(data[0]), config.batch.global_batch_size
    card = card_of(tmp_path / "run", data, config)
    assert card.startswith(f"# {config.name}\n")
    use = section(card, "Use")
    assert 'varscale.load_encoder("e.safetensors")\nfeatures = encoder(encoder.preprocess(images))' in use
    assert "import theirs" in use
    described = section(card, "Data")
    assert info.digest in described
    assert "12 for training, 4 held out" in described
    assert info.source in described
    training = section(card, "Training")
    assert f"{7 * batch:,} ({batch:,} a step), {7 * batch / 12:.1f} times" in training
    assert "1 x cpu" in training
    steps = section(card, "Preprocessing")
    assert "Resize the shorter side to 18 pixels, or to 16" in steps
    assert ", ".join(f"{value:.4f}" for value in info.mean) in steps
    assert "Apache-2.0" in section(card, "Licence")
    assert "**to be filled in**" in section(card, "Licence")


def test_the_recipe_is_the_runs_configuration(tmp_path, data):
    config, _ = make_run(tmp_path / "run", data, *VIT)
    recipe = section(card_of(tmp_path / "run", data, config), "Recipe").removeprefix("```yaml\n").removesuffix("```")
    assert parse_config(yaml.safe_load(recipe), "card") == config


def test_metrics_come_with_their_settings_and_data(tmp_path, data):
    config, _ = make_run(tmp_path / "run", data)
    assert "None yet; `python -m varscale.evaluate" in section(card_of(tmp_path / "run", data, config), "Metrics")
    write_results(tmp_path / "run")
    metrics = section(card_of(tmp_path / "run", data, config), "Metrics")
    row = "| trained | knn | top1_k20 | 61.23 | a `abcdefabcdef`, 1,234 images | k [20], temperature 0.07 |"
    assert row in metrics
    assert "| trained | transfer | linear_top1 | 7.5 | flowers `012345012345`, 99 images |" in metrics
    assert "| trained | corruption (CIFAR-10-C) | linear_top1 | 7.5 | a `abcdefabcdef`, 1,234 images |" in metrics
    assert "confusion" not in metrics
    assert "after step 6: kNN top1_k20 56.00 percent" in metrics  # not after step 9, which this checkpoint has not seen


def test_an_onnx_file_is_not_said_to_be_loaded_by_varscale(tmp_path, data):
    config, _ = make_run(tmp_path / "run", data)
    assert "load_encoder" not in card_of(tmp_path / "run", data, config, "e.onnx")


def test_damaged_results_are_named(tmp_path, data):
    config, _ = make_run(tmp_path / "run", data)
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "step-00000007.json").write_text("{")
    with pytest.raises(UserError, match=r"step-00000007\.json: not a file of results"):
        card_of(tmp_path / "run", data, config)
