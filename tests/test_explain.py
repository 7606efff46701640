import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from pretrain.config import RECIPES, Config, ConfigError, load_config, to_yaml
from pretrain.explain import commented_yaml, differences, explain, field_docs

DIGITS = RECIPES / "digits.yaml"
SOURCES = [
    "data.train={web: {shards: ['s3://b/{0..9}.tar', '#1'], weight: 3}, 'a: b': {shards: [b.tar], weight: 1}}",
    "data.train.train.weight=2",
]


def nested(cls: Any) -> Iterator[Any]:
    """A dataclass and all dataclasses that its fields hold."""
    yield cls
    for hint in get_type_hints(cls).values():
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from nested(part)


def refused(key: str) -> str:
    with pytest.raises(ConfigError) as error:
        explain(key)
    return str(error.value)


@pytest.mark.parametrize("cls", dict.fromkeys(nested(Config)), ids=lambda cls: str(cls.__name__))
def test_every_setting_has_a_docstring(cls: Any) -> None:
    assert set(field_docs(cls)) == {field.name for field in dataclasses.fields(cls)}
    assert all(field_docs(cls).values())


def test_the_walk_over_settings_finds_them_all() -> None:
    names = {cls.__name__ for cls in nested(Config)}
    assert {"Config", "TrainConfig", "Views", "ImageView", "AudioView", "MaskedRegionConfig", "EvalConfig"} <= names
    assert "SourceConfig" in names


@dataclasses.dataclass
class Example:
    """Not of a field."""

    one: int = 1
    """About one,
    on two lines."""
    bare: int = 2
    last: int = 3
    """About the last."""

    def method(self) -> None:
        """Nor this."""


def test_a_docstring_belongs_to_the_field_above_it() -> None:
    assert field_docs(Example) == {"one": "About one, on two lines.", "last": "About the last."}


# --- commented_yaml


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        SOURCES,
        ["data.views.audio=null", "eval.label=null", "eval.classes=[]", "init_from.image=some/model"],
        ["out='a  # b'", "data.root=''", "eval.classes=['#x', 'a: b', '- c', 'null', \"{'d'}\"]"],
        ["out='" + "long words " * 20 + "'", "data.root='a\nb\n\n c'", "data.cache='a\x85b\u2028c'"],
    ],
)
def test_comments_change_nothing(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(DIGITS, overrides)
    text = commented_yaml(config)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert yaml.safe_load(text) == yaml.safe_load(to_yaml(config))
    assert load_config(recipe) == config


def test_each_setting_stands_with_its_docstring() -> None:
    lines = commented_yaml(load_config(DIGITS, SOURCES)).splitlines()
    assert "  steps: 480  # Optimiser steps in all." in lines
    assert "train:  # The loop." in lines
    assert "    size: 32" not in lines  # deeper, and below its comment
    at = lines.index("      size: 32")
    assert lines[at - 2 : at] == [
        "      # Height and width in pixels, after resizing without regard to the aspect ratio, as",
        "      # ViTImageProcessor does.",
    ]
    at = lines.index("  val:")
    assert lines[at - 1] == "  # Shards on which probes choose their hyper-parameters."
    assert lines[at + 1] == "  - val-*.tar"
    assert "    web:" in lines  # a name of the user's choice has none
    assert sum(line.startswith("      # Passes over this source") for line in lines) == 3


def test_no_setting_is_left_without_a_comment() -> None:
    text = " ".join(commented_yaml(load_config(DIGITS)).replace("#", " ").split())
    missing = [
        f"{cls.__name__}.{name}" for cls in nested(Config) for name, doc in field_docs(cls).items() if doc not in text
    ]
    assert missing == []


def test_comments_are_no_wider_than_a_screen() -> None:
    assert max(map(len, commented_yaml(load_config(DIGITS)).splitlines())) <= 100


# --- explain


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("train.steps", "train.steps: int, default 10000"),
        ("train.threads", "train.threads: int or null, default null"),
        ("train.precision", "train.precision: str, default auto"),
        ("train.compile", "train.compile: bool, default false"),
        ("objectives.keep.image", "objectives.keep.image: float, default 0.5"),  # not its class's, which is 1
        ("objectives.joint_keep.image", "objectives.joint_keep.image: float, default 0.25"),
        ("eval.templates", "eval.templates: list of str, default [a photo of a {}.]"),
        ("data.val", "data.val: list of str, default []"),
        ("data.train.NAME.weight", "data.train.NAME.weight: float or null, default null"),
        ("data.train.web.weight", "data.train.web.weight: float or null, default null"),
        ("data.train", "data.train: section for each name of your choice"),
        ("data.views.audio", "data.views.audio: section or null"),
        ("init_from", "init_from: str for each name of your choice, default {}"),
        ("init_from.image", "init_from.image: str"),
        ("model", "model: section"),
        ("", "settings: section"),
    ],
)
def test_type_and_default(key: str, first: str) -> None:
    lines = explain(key).splitlines()
    assert lines[0].replace("'", "") == first
    assert lines[1].startswith("    ")


def test_a_leaf_has_its_whole_docstring() -> None:
    assert explain("objectives.contrastive.cached") == (
        "objectives.contrastive.cached: bool, default true\n"
        "    With train.accumulate above 1, contrast all micro-batches of a step as one batch, at the price\n"
        "    of a second forward pass (GradCache); false: each with itself.\n"
    )


def test_a_section_lists_its_keys_with_a_sentence() -> None:
    text = explain("objectives.masked_region")
    assert "objectives.masked_region.decoder_depth  Number of the decoder's Transformer blocks. Default: 1\n" in text
    assert "objectives.masked_region.teacher        Of the targets latent and kl.\n" in text  # a section: no default
    assert "latent: a teacher's state" not in text  # that is the second sentence
    assert "data.train.NAME.require     Modalities" in explain("data.train")
    assert "data.train.web.require     Modalities" in explain("data.train.web")
    assert [line.split()[0] for line in explain("").splitlines()[3:] if not line.startswith(" ")] == [
        field.name for field in dataclasses.fields(Config)
    ]


@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("train.stpes", "train.steps"),
        ("steps", "train.steps"),
        ("data.train.web.wieght", "data.train.NAME.weight"),
        ("train.steps.x", "train.steps"),
        ("modle", "model"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(key: str, suggested: str) -> None:
    message = refused(key)
    assert message.startswith(f"unknown key {key!r}; did you mean ")
    assert f"{suggested!r}" in message


@pytest.mark.parametrize("key", [".", "train.", "data.train.", "zzz", "init_from.image.x"])
def test_no_key_is_refused_too(key: str) -> None:
    assert refused(key).startswith(f"unknown key {key!r}")


# --- differences


def test_what_changed_is_named_with_both_values() -> None:
    before = load_config(DIGITS, ["train.steps=100"])
    now = load_config(DIGITS, ["train.steps=200", "data.val=[a.tar, 'b: c']", "train.learning_rate=1e-5", "seed=3"])
    expected = [
        "seed: 0 then, 3 now",
        "data.val: [val-*.tar] then, [a.tar, 'b: c'] now",
        "train.steps: 100 then, 200 now",
        "train.learning_rate: 0.002 then, 1.0e-05 now",
    ]
    assert differences(before, now) == expected
    assert differences(to_yaml(before), now) == expected
    assert differences(commented_yaml(before), now) == expected


@pytest.mark.parametrize("overrides", [[], SOURCES, ["data.views.audio=null", "out='1e3'", "train.weight_decay=1"]])
def test_the_same_differs_in_nothing(overrides: list[str]) -> None:
    config = load_config(DIGITS, overrides)
    assert differences(config, config) == []
    assert differences(to_yaml(config), config) == []


def test_a_section_or_source_that_came_or_went_is_one_line() -> None:
    one = load_config(DIGITS)
    other = load_config(DIGITS, ["data.train.web={shards: [w.tar], max_epochs: 2}", "data.views.text=null"])
    source = "{shards: [w.tar], weight: null, max_epochs: 2, require: []}"
    assert differences(one, other) == [
        f"data.train.web: not there then, {source} now",
        "data.views.text: {max_tokens: 32} then, null now",
    ]
    assert differences(other, one) == [
        f"data.train.web: {source} then, not there now",
        "data.views.text: null then, {max_tokens: 32} now",
    ]


def test_settings_of_another_version_count_as_their_defaults() -> None:
    saved = yaml.safe_load(to_yaml(load_config(DIGITS)))
    saved["train"]["retired"] = 3
    saved["gone"] = {"a": 1}
    del saved["train"]["clip_norm"]  # the recipe leaves it at its default
    del saved["train"]["steps"]
    del saved["data"]["train"]["train"]["require"]
    del saved["objectives"]["keep"]
    assert differences(yaml.safe_dump(saved), load_config(DIGITS)) == [
        "objectives.keep.image: not there then, 0.75 now",
        "objectives.keep.audio: not there then, 0.5 now",
        "train.steps: not there then, 480 now",
        "train.retired: 3 then, not there now",
        "gone: {a: 1} then, not there now",
    ]


@pytest.mark.parametrize("text", ["- a", "5", "a: b: c"])
def test_a_saved_configuration_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the earlier configuration: "):
        differences(text, load_config(DIGITS))
