from __future__ import annotations

from dataclasses import fields

import pytest

import dynaconv as dc
from dynaconv.train import Recipe, list_recipes, load_recipe, recipe_parser, recipe_to_yaml
from dynaconv.train.recipe import MaskingSection

BASE = {"model": {"name": "resnet8_scenes"}, "data": {"name": "scenes"}}
DYNAMIC = {**BASE, "masking": {"preset": "paper"}, "budget": {"target": 0.5}}


def test_overrides_come_as_words_and_as_dicts():
    words = load_recipe(
        DYNAMIC, ["--budget.target", "0.3", "--optim.weight_decay=1e-4", "--model.options.width", "16"]
    )
    nested = load_recipe(
        DYNAMIC, {"budget": {"target": 0.3}, "optim.weight_decay": 1e-4, "model.options.width": 16}
    )
    assert words == nested
    assert (words.budget.target, words.optim.weight_decay, words.model.options) == (0.3, 1e-4, {"width": 16})
    assert DYNAMIC["budget"] == {"target": 0.5}


def test_none_takes_a_section_out():
    assert not load_recipe(DYNAMIC, ["--masking", "none", "--budget", "null"]).dynamic


def test_yaml_round_trip(tmp_path):
    recipe = load_recipe(
        DYNAMIC, ["--budget.temperature", "[[0, 5], [0.3, 2.5]]", "--optim.milestones", "[3]"]
    )
    (tmp_path / "config.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path / "config.yaml") == load_recipe(tmp_path) == load_recipe(recipe) == recipe
    assert recipe.budget.schedule().temperature_at(0.5) == 2.5


def test_masking_section_has_the_fields_of_spatial_masking():
    own = [f.name for f in fields(MaskingSection)]
    assert own == [*(f.name for f in fields(dc.SpatialMasking)), "method", "options"]
    assert MaskingSection("paper", norm=True).config() == dc.SpatialMasking("paper", norm=True)


def test_masking_section_takes_other_gates():
    made = MaskingSection(method="halting", preset="paper", options={"level": "image"}).config()
    assert made == dc.Halting(level="image", preset="paper")
    assert MaskingSection(method="random_masking", granularity=[2, 1, 1]).config().granularity == (2, 1, 1)
    assert MaskingSection(method="channel_gate", options={"groups": 4}).config() == dc.ChannelGate(groups=4)
    with pytest.raises(
        ValueError, match=r"masking\.unit is no option of layer_gate; it has hidden, preset, temperature"
    ):
        MaskingSection(method="layer_gate", unit="conv1x1")
    with pytest.raises(ValueError, match="unknown option of narrow 'budgt'; did you mean 'budget'"):
        MaskingSection(method="narrow", options={"budgt": 0.5})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget.targt", "0.3"], "'budget.targt'; did you mean 'budget.target'"),
        (["--optm.lr", "0.3"], "section 'optm'; did you mean 'optim'"),
        (["--optim.lr", "fast"], "'optim.lr' expects float, got 'fast'"),
        (["--trainer.epochs", "1.5"], "'trainer.epochs' expects int, got 1.5"),
        (["--trainer.epochs", "0"], "must be at least 1, got 0"),
        (["--calibrate", "half"], "'calibrate' expects a list of numbers"),
        (["--calibrate", "[2]"], r"must lie in \(0, 1\], got 2"),
        (["--budget.target", "0"], r"budget.target must lie in \(0, 1\]"),
        (["--budget.ramp", "1"], r"budget.ramp must lie in \[0, 1\)"),
        (["--masking.preset", "papr"], "did you mean 'paper'"),
        (["--masking.method", "layergate"], "did you mean 'layer_gate'"),
        (["--budget.dial", "[0.8, 0.2]"], "dial must be two budgets"),
        (["--optim.schedule", "multistep"], "needs optim.milestones"),
        (["--budget", "none"], "masking needs budget"),
        (["--optim", "3"], "expects a section with keys, got 3"),
        (["--optim.lr"], "has no value"),
        (["0.3"], "expected an override"),
        (["--trainer.label_smoothing", "1"], "label_smoothing"),
    ],
)
def test_bad_input_is_one_sentence(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(DYNAMIC, words)
    assert "\n" not in str(caught.value)


def test_a_recipe_names_model_and_data():
    with pytest.raises(ValueError, match=r"lacks data\.name"):
        load_recipe({"model": {"name": "resnet8_scenes"}})


@pytest.mark.parametrize("text", ["model: [", "- 1", "", "model: {name: \udcff}"])
def test_unreadable_files(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="is not a readable recipe") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_shipped_recipes_load_by_name():
    assert {"scenes_dense", "scenes_dynconv", "cifar10_resnet32_paper"} <= set(list_recipes())
    for name in list_recipes():
        assert isinstance(load_recipe(name), Recipe)
    dense, dynamic = load_recipe("cifar10_resnet8_dense"), load_recipe("cifar10_resnet8_dynconv")
    assert dense.trainer.epochs == dynamic.trainer.epochs
    with pytest.raises(FileNotFoundError, match="did you mean 'scenes_dynconv'"):
        load_recipe("scenes_dyncov")
    with pytest.raises(FileNotFoundError, match="shipped recipes"):
        load_recipe("nowhere/r.yaml")


def test_the_paper_recipe_is_the_published_one():
    recipe = load_recipe("cifar10_resnet32_paper")
    masks = recipe.masking.config()
    assert (masks.preset, masks.unit, masks.temperature) == ("paper", "squeeze", 1.0)
    assert (recipe.budget.alpha, recipe.budget.anneal, recipe.budget.noise_until) == (10.0, 0.33, 0.8)
    optim = recipe.optim
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.nesterov) == (
        "sgd",
        0.1,
        0.9,
        5e-4,
        False,
    )
    assert (optim.milestones, optim.gamma, optim.warmup_epochs) == ([150, 250], 0.1, 0)
    assert (optim.gate_lr_multiplier, optim.gate_weight_decay) == (1.0, None)
    assert (recipe.data.batch_size, recipe.trainer.epochs, recipe.trainer.best) == (256, 350, "accuracy")


def test_help_explains_every_key():
    text = recipe_parser(prog="dynaconv train").format_help()
    assert "--budget.target" in text
    assert "share of the conditional MACs" in text
