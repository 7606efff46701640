"""Every shipped recipe loads, says how to start it, and builds a model of the size that it is meant to have."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from objectives.pretraining import Pretraining
from pretrain.config import RECIPES, Config, ConfigError, find_recipe, load_config
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import Vocabulary

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
OWN_DATA = [name for name in NAMES if name != "digits"]
# Of the encoder, in millions, with a full vocabulary.
PARAMETERS = {
    "audio_text_small": 49.4,
    "clip_only_vit_b16": 281.4,
    "digits": 1.43,
    "image_text_small": 49.5,
    "trimodal_vit_b16": 281.4,
    "trimodal_vit_s16": 76.5,
}


def header(name: str) -> str:
    """The comment at the top of a recipe, without its marks."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def command(name: str) -> tuple[str, list[str]]:
    """The recipe and the overrides of the command in a recipe's header."""
    found = re.search(r"^ +accelerate launch pretrain/run\.py ((?:.*\\\n)*.*)$", header(name), re.MULTILINE)
    assert found, "the header has no command"
    recipe, *overrides = shlex.split(found[1].replace("\\\n", ""))
    return recipe, overrides


def loaded(name: str) -> Config:
    recipe, overrides = command(name)
    return load_config(find_recipe(recipe), overrides)


def test_the_recipes_are_those_that_are_listed() -> None:
    assert set(NAMES) == set(PARAMETERS)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_the_header_starts_this_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    recipe, overrides = command(name)
    assert find_recipe(recipe).resolve() == (RECIPES / f"{name}.yaml").resolve()
    config = load_config(find_recipe(recipe), overrides)
    assert all(source.shards for source in config.data.train.values())
    assert config.out.startswith("runs/")


@pytest.mark.parametrize("name", OWN_DATA)
def test_the_shards_are_for_the_user_to_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^data.train is empty: name the training shards$"):
        load_config(RECIPES / f"{name}.yaml")
    assert load_config(RECIPES / f"{name}.yaml", ["data.train=[a.tar]"]).eval.label is None


def test_no_two_recipes_share_a_folder() -> None:
    for configs in (
        [load_config(RECIPES / f"{name}.yaml", ["data.train=[a.tar]"]) for name in NAMES],
        [loaded(name) for name in OWN_DATA],
    ):
        folders = [config.out for config in configs]
        assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", OWN_DATA)
def test_the_header_says_what_was_not_measured(name: str) -> None:
    text = header(name)
    for part in ("Hardware: ", "Time: ", "Expect: "):
        assert part in text
    assert "not measured" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_the_size_that_it_is_meant_to_have(name: str) -> None:
    config = load_config(RECIPES / f"{name}.yaml", ["data.train=[a.tar]"])
    vocabulary = Vocabulary(config.tokenizer.train or 0, pad_id=1, mask_id=4, special_ids=(0, 1, 2, 3, 4))
    with torch.device("meta"):
        encoder = Encoder(config.model, config.data.views, vocabulary)
        objectives = Pretraining(encoder, config.objectives).objectives
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    assert parameters / 1e6 == pytest.approx(PARAMETERS[name], rel=0.1)
    only = {"contrastive"} if name == "clip_only_vit_b16" else {"contrastive", "masked_language", "masked_region"}
    assert set(objectives) == only


def test_the_base_model_differs_from_the_small_one_where_it_says_so() -> None:
    small, base = (
        load_config(RECIPES / f"trimodal_vit_{size}.yaml", ["data.train=[a.tar]"]) for size in ("s16", "b16")
    )
    assert (small.model.preset, base.model.preset) == ("small", "base")
    assert (base.model.width, base.model.sharing) == (768, "none")
    assert base.data.views == small.data.views
    assert base.train.steps > small.train.steps
