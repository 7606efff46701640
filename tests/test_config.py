import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.digits import CLASS_NAMES, TEMPLATES
from data.stream import SourceConfig
from data.transforms import AudioView
from pretrain.config import RECIPES, Config, ConfigError, TrainConfig, find_recipe, given_yaml, load_config, to_yaml
from pretrain.explain import Setting

DIGITS = RECIPES / "digits.yaml"


def refusal(*overrides: str, recipe: Path = DIGITS) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as error:
        load_config(recipe, overrides)
    return str(error.value)


def written(tmp_path: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_all_unknown_keys_are_listed_with_the_nearest_valid_one(tmp_path: Path) -> None:
    recipe = written(tmp_path, "data: {trian: [a.tar]}\ntrain: {lerning_rate: 1.0, steps: 3}\nmodle: {width: 8}\n")
    lines = refusal("objectives.keep.imgae=0.5", "zzz=1", recipe=recipe).splitlines()
    assert lines == [
        f"{recipe}: unknown key 'data.trian'; did you mean 'data.train'?",
        f"{recipe}: unknown key 'train.lerning_rate'; did you mean 'train.learning_rate'?",
        f"{recipe}: unknown key 'modle'; did you mean 'model'?",
        "command line: unknown key 'objectives.keep.imgae'; did you mean 'objectives.keep.image'?",
        "command line: unknown key 'zzz'",
    ]


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("steps=10", ["train.steps"]),
        ("model.learning_rate=1", ["train.learning_rate"]),
        ("leraning_rate=1", ["train.learning_rate"]),
        ("data.views.video.frames=8", ["data.views.image"]),
        ("batch_size=8", ["train.batch_size", "eval.batch_size"]),
    ],
)
def test_a_misplaced_key_is_sent_to_its_place(override: str, suggested: list[str]) -> None:
    message = refusal(override)
    assert "unknown key" in message
    assert message.endswith(f"; did you mean {' or '.join(repr(key) for key in suggested)}?")


@pytest.mark.parametrize(
    ("override", "named"),
    [("lr=1", "'lr'"), ("1=2", "'1'"), ("=5", "''"), ("train.=5", "'train.'"), ("train.steps.x=5", "train.steps:")],
)
def test_a_key_that_nothing_resembles_is_an_error_too(override: str, named: str) -> None:
    assert named in refusal(override)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=abc", "train.steps", "abc"),
        ("train.steps=1.5", "train.steps", "1.5"),
        ("train.steps=true", "train.steps", "True"),
        ("train.learning_rate=fast", "train.learning_rate", "fast"),
        ("data.views.image.flip=perhaps", "data.views.image.flip", "perhaps"),
        ("data.train=5", "data.train", "5"),
        ("data.train=null", "data.train", ""),
        ("data.train=[[a.tar]]", "data.train.train.shards", "['a.tar']"),
        ("data.train=[{shards: [a.tar]}]", "data.train.train.shards", "{'shards': ['a.tar']}"),
        ("data.train=[null]", "data.train.train.shards[0]", "None"),
        ("data.train=[a.tar, '${gone}']", "data.train.train.shards[1]", "gone"),
        ("data.train=${data.gone}", "data.train", "data.gone"),
        ("data.train.train=5", "data.train.train", "5"),
        ("data.train.train=[a.tar]", "data.train.train", "['a.tar']"),
        ("data.train.train=null", "data.train.train", ""),
        ("data.train.weight=2", "data.train.weight", "2"),
        ("data.train.train.shards=a.tar", "data.train.train.shards", "a.tar"),
        ("data.train.train.shards.x=1", "data.train.train.shards", "{'x': 1}"),
        ("data.train.train.weight=heavy", "data.train.train.weight", "heavy"),
        ("data.train.train.weight=true", "data.train.train.weight", "True"),
        ("data.train.train.max_epochs=1.5", "data.train.train.max_epochs", "1.5"),
        ("data.train.train.require=image", "data.train.train.require", "image"),
        ("data.train={1: {shards: [a.tar]}}", "data.train.1", "int"),
        ("data.lanes=1.5", "data.lanes", "1.5"),
        ("data.allow_changed=perhaps", "data.allow_changed", "perhaps"),
        ("data.root=null", "data.root", "None"),
        ("data.val.x=1", "data.val", "{'x': 1}"),
        ("data.val=[[a.tar]]", "data.val", "['a.tar']"),
        ("data=null", "data", ""),
        ("data=[a.tar]", "data", "['a.tar']"),
        ("eval.classes=5", "eval.classes", "5"),
        ("out=null", "out", "None"),
        ("model=null", "model", ""),
        ("train=5", "train", "5"),
        ("data.views.image=5", "data.views.image", "5"),
        ("train.steps=${train.stepz}", "train.steps", "stepz"),
    ],
)
def test_a_wrong_type_names_its_key(override: str, key: str, value: str) -> None:
    message = refusal(override)
    assert message.startswith(f"{key}:")
    assert value in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("seed=-1", "0 to 2**32 - 1"),
        ("seed=4294967296", "0 to 2**32 - 1"),
        ("data.embedded=mnist", "digits, null"),
        ("data.batching=both", "mixed, homogeneous"),
        ("data.lanes=0", "1 or more"),
        ("data.window=0", "1 or more"),
        ("data.workers=-1", "0 or more"),
        ("data.max_bad_fraction=-0.1", "0 to 1"),
        ("data.max_bad_fraction=1.1", "0 to 1"),
        ("data.max_bad_fraction=nan", "0 to 1"),
        ("data.cache_gb=0.0", "above 0"),
        ("data.cache_gb=-1.0", "above 0"),
        ("data.cache_gb=nan", "above 0"),
        ("data.cache_gb=inf", "above 0"),
        ("data.views.image.size=0", "1 or more"),
        ("data.views.image.crop_scale=0.0", "above 0 and at most 1"),
        ("data.views.image.crop_scale=1.1", "above 0 and at most 1"),
        ("data.views.text.max_tokens=2", "3 or more"),
        ("data.views.audio.frames=0", "1 or more"),
        ("data.views.audio.mels=0", "1 or more"),
        ("data.views.audio.std=0.0", "above 0"),
        ("data.views.audio.speed=1.0", "from 0 to "),
        ("data.views.audio.speed=-0.1", "from 0 to "),
        ("data.views.audio.shift=-1.0", "0 or more"),
        ("data.views.audio.noise=-1.0", "0 or more"),
        ("data.views.audio.gain=-1.0", "0 or more"),
        *((f"model.{name}=0", "") for name in ("width", "depth", "heads", "embed_dim", "image_patch", "audio_patch")),
        ("model.mlp_ratio=0.0", "or more"),
        ("model.mlp_ratio=-1.0", "or more"),
        ("model.heads=3", "must divide model.width=128"),
        ("model.sharing=some", "all, ffn, none"),
        ("model.preset=huge", "micro, tiny, small, base, large"),
        *(
            (f"objectives.{name}={value}", "above 0 and at most 1")
            for name in ("keep.image", "keep.audio", "joint_keep.image", "joint_keep.audio", "joint_share")
            for value in ("0.0", "1.5")
        ),
        ("objectives.final_whole=-0.1", "0 to 1"),
        ("objectives.final_whole=1.1", "0 to 1"),
        ("objectives.contrastive.weight=-1.0", "0 or more"),
        ("objectives.contrastive.temperature=0.001", "0.01 or more"),
        ("objectives.masked_language.weight=-1.0", "0 or more"),
        ("objectives.masked_language.rate=0.0", "above 0 and at most 1"),
        ("objectives.masked_language.rate_paired=1.5", "above 0 and at most 1"),
        ("objectives.masked_region.weight=-1.0", "0 or more"),
        ("objectives.masked_region.decoder_width=0", "1 or more"),
        ("objectives.masked_region.decoder_depth=0", "1 or more"),
        ("objectives.masked_region.decoder_heads=0", "1 or more"),
        ("objectives.masked_region.decoder_heads=3", "must divide decoder_width=64"),
        *((f"train.{name}=0", "1 or more") for name in ("steps", "log_every", "save_every", "keep", "threads")),
        ("train.batch_size=1", "2 or more"),
        ("train.learning_rate=0.0", "above 0"),
        ("train.learning_rate=nan", "above 0"),
        ("train.clip_norm=0.0", "above 0"),
        ("train.weight_decay=-0.1", "0 or more"),
        ("train.weight_decay=nan", "0 or more"),
        ("train.beta2=1.0", "0 to below 1"),
        ("train.beta2=-0.1", "0 to below 1"),
        ("train.warmup=1.1", "0 to 1"),
        ("train.warmup=-0.1", "0 to 1"),
        ("train.precision=fp8", "auto, fp32, bf16, fp16"),
        ("eval.batch_size=0", "1 or more"),
    ],
)
def test_a_bound_is_an_error_with_key_value_and_what_is_allowed(override: str, allowed: str) -> None:
    # YAML spells these numbers with a dot.
    message = refusal(override.replace("=nan", "=.nan").replace("=inf", "=.inf"))
    assert message.startswith(override)
    assert allowed in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        *(([f"data.train={none}"], "data.train is empty") for none in ("[]", "''")),
        (["data.train=[a.tar]", "data.train.web={shards: [b.tar], weight: 1}"], "give all sources a weight, or none"),
        (["data.train.train.weight=1", "data.train.web.shards=[b.tar]"], "give all sources a weight, or none"),
        (["data.val=[]"], "eval.label=label needs data.val and data.test"),
        (["data.test=[]"], "eval.label=label needs data.val and data.test"),
        (["tokenizer.train=null"], "tokenizer: give name"),
        (["tokenizer.name=roberta-base"], "tokenizer.name=roberta-base and tokenizer.train=1000: give one"),
        (["eval.templates=[a digit]"], "eval.templates: 'a digit' must hold {} once"),
        (["eval.templates=['{} {}']"], "eval.templates: '{} {}' must hold {} once"),
        (["eval.templates=[]"], "eval.templates: must hold at least one template"),
        ([f"objectives.{name}.weight=0" for name in ("contrastive", "masked_language", "masked_region")], "weight 0"),
        ([f"data.views.{name}=null" for name in ("image", "text", "audio")], "data.views has no modality"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], words: str) -> None:
    assert words in refusal(*overrides)


def test_a_view_may_be_null() -> None:
    config = load_config(DIGITS, ["data.views.audio=null"])
    assert list(config.data.views.used) == ["image", "text"]
    assert load_config(DIGITS, ["data.views.image=null", "data.views.text=null"]).data.views.image is None


def test_overrides_win_over_the_recipe_and_the_recipe_over_the_defaults() -> None:
    config = load_config(DIGITS, ["train.steps=7", "data.train=[a.tar, b.tar]", "train.steps=8"])
    assert config.train.steps == 8
    assert config.data.train == {"train": SourceConfig(["a.tar", "b.tar"])}
    assert config.model.width == 128
    assert config.train.clip_norm == TrainConfig().clip_norm


# --- Sources


@pytest.mark.parametrize("weight", ["0", "0.0", "-1.0", ".inf", "-.inf", ".nan"])
def test_a_weight_is_above_0_and_finite(weight: str) -> None:
    got = float(weight.replace(".inf", "inf").replace(".nan", "nan"))
    for name in ("train", "web"):
        message = refusal(f"data.train.{name}={{shards: [w.tar], weight: {weight}}}")
        assert message == f"data.train.{name}.weight={got}: allowed is above 0, or null"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("shards=[]", "shards is empty: a source has no shards"),
        ("max_epochs=0", "max_epochs=0: allowed is 1 or more, or null"),
        ("max_epochs=-1", "max_epochs=-1: allowed is 1 or more, or null"),
        ("require=[smell]", "require=['smell']: allowed are image, text, audio"),
        ("require=[image, jpg]", "require=['image', 'jpg']: allowed are image, text, audio"),
    ],
)
def test_a_bound_of_a_source_names_it(override: str, words: str) -> None:
    for name in ("train", "web"):
        overrides = [f"data.train.{name}.shards=[w.tar]", f"data.train.{name}.{override}"]
        assert refusal(*overrides) == f"data.train.{name}.{words}"
    assert refusal("data.train.web.weight=2") == "data.train.web.shards is empty: a source has no shards"


def test_a_mapping_to_values_takes_any_key() -> None:
    assert load_config(DIGITS, ["init_from.image=some/model"]).init_from == {"image": "some/model"}
    assert "init_from: " in refusal("init_from=[a]")
    assert "init_from.image" in refusal("init_from={image: {a: b}}")
    assert "did you mean 'init_from'" in refusal("init_form.image=a")


def test_a_preset_sets_what_is_not_given(tmp_path: Path) -> None:
    recipe = written(
        tmp_path,
        "data: {train: [a.tar]}\ntokenizer: {train: 300}\nmodel: {preset: base, depth: 3}\neval: {label: null}\n",
    )
    model = load_config(recipe).model
    assert (model.width, model.depth, model.heads, model.image_patch) == (768, 3, 12, 16)
    model = load_config(recipe, ["model.preset=micro", "model.heads=2"]).model
    assert (model.width, model.depth, model.heads, model.image_patch) == (128, 3, 2, 8)
    again = load_config(written(tmp_path, to_yaml(load_config(recipe))))
    assert again == load_config(written(tmp_path, to_yaml(again)))


def test_bounds_themselves_are_allowed() -> None:
    source = load_config(DIGITS, ["data.train.train={weight: 1e-9, max_epochs: 1, require: [image, text, audio]}"])
    assert source.data.train["train"] == SourceConfig(["train-*.tar"], 1e-9, 1, ["image", "text", "audio"])
    tight = ["batching=homogeneous", "lanes=1", "window=1", "workers=0", "max_bad_fraction=0", "cache_gb=0.001"]
    data = load_config(DIGITS, [f"data.{setting}" for setting in tight]).data
    assert (data.batching, data.lanes, data.window, data.workers) == ("homogeneous", 1, 1, 0)
    assert (data.max_bad_fraction, data.cache_gb) == (0, 0.001)
    assert load_config(DIGITS, ["data.max_bad_fraction=1", "data.lanes=null"]).data.lanes is None


MIXTURE = "{web: {shards: [w.tar], weight: 3, max_epochs: 2}, books: {shards: [b.tar], weight: 1, require: [text]}}"


def recipe_of(tmp_path: Path, train: str) -> Path:
    """A recipe that has sources and little else."""
    return written(tmp_path, f"data: {{train: {train}}}\neval: {{label: null}}\ntokenizer: {{train: 300}}\n")


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        ("[a.tar]", {"train": ["a.tar"]}),
        ("[a.tar, 's3://b/{0..9}.tar']", {"train": ["a.tar", "s3://b/{0..9}.tar"]}),
        ("a.tar", {"train": ["a.tar"]}),
        ("'train-{00..09}.tar'", {"train": ["train-{00..09}.tar"]}),
        ("{web: {shards: [a.tar]}}", {"web": ["a.tar"]}),
        ("{web: {shards: [a.tar]}, books: {shards: [b.tar, c.tar]}}", {"web": ["a.tar"], "books": ["b.tar", "c.tar"]}),
    ],
)
def test_sources_in_every_form(tmp_path: Path, given: str, sources: dict[str, list[str]]) -> None:
    expected = {name: SourceConfig(shards) for name, shards in sources.items()}
    config = load_config(recipe_of(tmp_path, given))
    assert config.data.train == expected
    assert list(config.data.train) == list(sources)
    if not given.startswith("{"):  # a mapping adds to the recipe's
        assert load_config(recipe_of(tmp_path, MIXTURE), [f"data.train={given}"]).data.train == expected


def test_one_field_of_one_source_is_changed(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, MIXTURE)
    sources = load_config(recipe, ["data.train.web.weight=2", "data.train.books.max_epochs=5"]).data.train
    assert sources == {
        "web": SourceConfig(["w.tar"], 2.0, 2),
        "books": SourceConfig(["b.tar"], 1.0, 5, ["text"]),
    }
    sources = load_config(recipe, ["data.train.more={shards: [m.tar], weight: 1}"]).data.train
    assert list(sources) == ["web", "books", "more"]
    assert load_config(DIGITS, ["data.train.train.max_epochs=2"]).data.train["train"].max_epochs == 2


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        (["data.train=[a.tar]"], SourceConfig(["a.tar"])),
        (["data.train=a.tar"], SourceConfig(["a.tar"])),
        (["data.train=[a.tar]", "data.train=[c.tar]"], SourceConfig(["c.tar"])),
        (["data.train=[a.tar]", "data.train.train.weight=2"], SourceConfig(["a.tar"], 2.0)),
        (["data.train=a.tar", "data.train.train.weight=2"], SourceConfig(["a.tar"], 2.0)),
        (["data.train.web.weight=2", "data.train=[a.tar]"], SourceConfig(["a.tar"])),
    ],
)
def test_a_list_takes_the_place_of_all_sources_before_it(
    tmp_path: Path, overrides: list[str], source: SourceConfig
) -> None:
    assert load_config(recipe_of(tmp_path, MIXTURE), overrides).data.train == {"train": source}


@pytest.mark.parametrize("data", ["null", "5", "[1]", "${model}"])
def test_a_list_on_the_command_line_does_not_hide_that_the_recipe_is_wrong(tmp_path: Path, data: str) -> None:
    message = refusal("data.train=[a.tar]", recipe=written(tmp_path, f"data: {data}\n"))
    assert message.startswith("data")


def test_typos_within_a_source_are_named(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "{web: {shards: [a.tar], wieght: 2}, b: {shrads: [b.tar]}}")
    lines = refusal("data.train.web.max_epoch=2", "data.train.web.requires=[text]", recipe=recipe).splitlines()
    assert lines == [
        f"{recipe}: unknown key 'data.train.web.wieght'; did you mean 'data.train.NAME.weight'?",
        f"{recipe}: unknown key 'data.train.b.shrads'; did you mean 'data.train.NAME.shards'?",
        "command line: unknown key 'data.train.web.max_epoch'; did you mean 'data.train.NAME.max_epochs'?",
        "command line: unknown key 'data.train.web.requires'; did you mean 'data.train.NAME.require'?",
    ]


def test_a_weight_for_some_sources_only_is_refused(tmp_path: Path) -> None:
    some = recipe_of(tmp_path, "{a: {shards: [a.tar], weight: 2}, b: {shards: [b.tar]}, c: {shards: [c.tar]}}")
    assert refusal(recipe=some) == "data.train: give all sources a weight, or none"
    assert refusal("data.train.b.weight=1", recipe=some) == "data.train: give all sources a weight, or none"
    weights = load_config(some, ["data.train.b.weight=1", "data.train.c.weight=1"]).data.train
    assert [source.weight for source in weights.values()] == [2, 1, 1]
    none = load_config(some, ["data.train.a.weight=null"]).data.train
    assert [source.weight for source in none.values()] == [None] * 3


# --- Recipes


def test_a_missing_recipe_names_its_path(tmp_path: Path) -> None:
    assert str(tmp_path / "no.yaml") in refusal(recipe=tmp_path / "no.yaml")
    assert str(tmp_path) in refusal(recipe=tmp_path)


@pytest.mark.parametrize(
    "text", ["- a\n", "5\n", "a: b: c\n", "train: {steps: 3\n", "train:\n  steps: 1\n  steps: 2\n", "null: 1\n"]
)
def test_what_is_no_mapping_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    recipe = written(tmp_path, text)
    assert refusal(recipe=recipe).startswith(f"{recipe}: ")


def test_an_empty_recipe_still_needs_shards(tmp_path: Path) -> None:
    assert "data.train is empty" in refusal(recipe=written(tmp_path, ""))


def test_an_override_without_a_value_is_refused_as_one() -> None:
    assert "'train.steps' is no key=value" in refusal("train.steps")


def test_an_override_that_is_no_yaml_is_not_blamed_on_the_recipe() -> None:
    message = refusal("train.steps=[1")
    assert "train.steps=[1" in message
    assert str(DIGITS) not in message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.views.audio=null", "eval.label=null", "train.threads=3", "tokenizer.train=null", "tokenizer.name=a/b"],
        ["out='1e3'", "eval.classes=['yes', 'null', '1', 'a: b', '007', '#x', 'ä']", "train.learning_rate=1e-5"],
        [
            "data.train={web: {shards: ['s3://b/{0..9}.tar', 'a b.tar'], weight: 3, require: [text, image]}}",
            "data.train.train={weight: 0.1, max_epochs: 2}",
            "data.batching=homogeneous",
            "data.lanes=4",
            "data.cache=kept/here",
        ],
        ["data.train={'null': {shards: ['1']}, 'a.b': {shards: ['null']}, '1': {shards: ['$HOME', '~']}}"],
        ["eval.templates=['{}', '\"{}\"', '{}: a']", "train.weight_decay=1e-12", "seed=4294967295"],
    ],
)
def test_to_yaml_is_a_recipe_of_the_same_run(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(DIGITS, overrides)
    again = load_config(written(tmp_path, to_yaml(config)))
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_the_digits_recipe_asks_for_what_the_digits_are() -> None:
    config = load_config(DIGITS)
    assert config.data.embedded == "digits"
    assert tuple(config.eval.classes) == CLASS_NAMES
    assert tuple(config.eval.templates) == TEMPLATES


@pytest.mark.parametrize(
    ("absent", "off", "left"),
    [
        (("image", "audio"), "masked_language", "text"),
        (("image", "text"), "masked_region", "audio"),
        (("text", "audio"), "masked_region", "image"),
    ],
)
def test_modalities_that_no_objective_learns_from_are_refused(absent: tuple[str, ...], off: str, left: str) -> None:
    views = [f"data.views.{name}=null" for name in absent]
    with pytest.raises(ConfigError, match=rf"only {left}, from which none of the objectives"):
        load_config(DIGITS, [*views, f"objectives.{off}.weight=0"])
    assert list(load_config(DIGITS, views).data.views.used) == [left]


# --- A recipe over another


BASE = """
data: {train: [a.tar], views: {audio: null}}
tokenizer: {train: 300}
model: {preset: small, depth: 3}
eval: {label: null}
train: {steps: 5, batch_size: 8}
"""


def test_a_recipe_lies_over_those_that_it_extends_and_overrides_over_all(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    written(tmp_path, BASE, "shared/base.yaml")
    written(tmp_path, "extends: base.yaml\ntrain: {steps: 6, learning_rate: 0.1, warmup: 0.2}\n", "shared/middle.yaml")
    recipe = written(tmp_path, "extends: shared/middle.yaml\nmodel: {preset: tiny}\ntrain: {learning_rate: 0.3}\n")
    config = load_config(recipe, ["train.warmup=0.4"])
    train = config.train
    assert (train.batch_size, train.steps, train.learning_rate, train.warmup) == (8, 6, 0.3, 0.4)
    assert (config.model.width, config.model.depth) == (192, 3)
    assert config.data.train == {"train": SourceConfig(["a.tar"])}
    assert config.data.views.audio is None


def test_a_section_that_the_extended_recipe_sets_to_null_comes_back_with_its_defaults(tmp_path: Path) -> None:
    written(tmp_path, BASE, "base.yaml")
    config = load_config(written(tmp_path, "extends: base.yaml\ndata: {views: {audio: {mels: 64}}}\n"))
    assert config.data.views.audio == AudioView(mels=64)


@pytest.mark.parametrize(
    ("train", "sources"),
    [
        ("[b.tar]", {"train": ["b.tar"]}),
        ("b.tar", {"train": ["b.tar"]}),
        ("{more: {shards: [b.tar]}}", {"web": ["w.tar"], "more": ["b.tar"]}),
        ("{web: {shards: [b.tar]}}", {"web": ["b.tar"]}),
    ],
)
def test_sources_over_sources(tmp_path: Path, train: str, sources: dict[str, list[str]]) -> None:
    written(tmp_path, "data: {train: {web: {shards: [w.tar]}}}\ntokenizer: {train: 300}\n", "base.yaml")
    recipe = written(tmp_path, f"extends: base.yaml\ndata: {{train: {train}}}\n")
    expected = {name: SourceConfig(shards) for name, shards in sources.items()}
    assert load_config(recipe).data.train == expected


def test_a_bare_name_is_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(written(tmp_path, "extends: digits\ntrain: {steps: 7}\n"))
    assert config.train.steps == 7
    assert config == load_config(DIGITS, ["train.steps=7"])
    monkeypatch.chdir(tmp_path)
    assert find_recipe("digits") == DIGITS
    assert load_config(Path("digits")) == load_config(DIGITS)
    assert find_recipe("recipe.yaml") == Path("recipe.yaml")
    (tmp_path / "digits").mkdir()  # such as the folder of a run
    assert find_recipe("digits") == DIGITS


@pytest.mark.parametrize("name", ["no.yaml", "digit", "digits.yaml", "", "."])
def test_no_such_recipe_lists_the_shipped_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        find_recipe(name, tmp_path)
    assert str(error.value).startswith(f"no recipe at {tmp_path / name}; ")
    assert str(error.value).endswith(", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml"))))


def test_a_missing_recipe_names_those_that_led_to_it(tmp_path: Path) -> None:
    middle = written(tmp_path, "extends: gone.yaml\n", "middle.yaml")
    recipe = written(tmp_path, "extends: middle.yaml\n")
    message = refusal(recipe=recipe)
    assert message.startswith(f"{recipe} extends {middle} extends gone.yaml: no recipe at {tmp_path / 'gone.yaml'}; ")


@pytest.mark.parametrize("name", ["recipe.yaml", "other.yaml", "../{}/recipe.yaml"])
def test_a_circle_is_refused(tmp_path: Path, name: str) -> None:
    other = written(tmp_path, "extends: recipe.yaml\n", "other.yaml")
    recipe = written(tmp_path, f"extends: {name.format(tmp_path.name)}\n")
    message = refusal(recipe=recipe)
    assert message.startswith(f"{recipe} extends {tmp_path}")
    assert message.endswith(": a recipe can't extend itself")
    assert (str(other) in message) == (name == "other.yaml")


@pytest.mark.parametrize("value", ["", "null", "[a.yaml]", "{a: b}", "5", "${gone}", "???"])
def test_what_extends_must_be_one_name(tmp_path: Path, value: str) -> None:
    recipe = written(tmp_path, f"extends: {value}\n")
    message = refusal(recipe=recipe)
    assert message.startswith(f"{recipe}: extends: ")
    assert "unknown" not in message


def test_unknown_keys_of_all_files_are_listed_together(tmp_path: Path) -> None:
    base = written(tmp_path, f"{BASE}modle: {{width: 8}}\n", "base.yaml")
    recipe = written(tmp_path, "extends: base.yaml\ntrain: {stpes: 3, extends: base.yaml}\n")
    assert refusal("data.wrokers=1", "extends=digits", recipe=recipe).splitlines() == [
        f"{base}: unknown key 'modle'; did you mean 'model'?",
        f"{recipe}: unknown key 'train.stpes'; did you mean 'train.steps'?",
        f"{recipe}: unknown key 'train.extends'; did you mean 'extends'?",
        "command line: unknown key 'data.wrokers'; did you mean 'data.workers'?",
        "command line: extends stands in recipes only: name the other recipe in the place of this one",
    ]
    misspelt = written(tmp_path, "extend: base.yaml\n")
    assert refusal(recipe=misspelt) == f"{misspelt}: unknown key 'extend'; did you mean 'extends'?"


def test_a_broken_recipe_below_is_named(tmp_path: Path) -> None:
    base = written(tmp_path, "a: b: c\n", "base.yaml")
    assert refusal(recipe=written(tmp_path, "extends: base.yaml\n")).startswith(f"{base}: ")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.steps=9", "data.views.audio=null", "data.train=[b.tar]"],
        [
            "data.train.web={shards: [w.tar], weight: 1}",
            "data.train.train.weight=0.5",
            "out='1e3'",
            "model.preset=micro",
        ],
        ["data.views.audio.mels=64", "train.steps=${train.batch_size}", "out='#a: b\n\x85 ä'"],
        ["data.views.text=null", "data.views.text.max_tokens=8", "data.views.text=null"],
    ],
)
def test_what_was_given_is_a_recipe_of_the_same_run(tmp_path: Path, overrides: list[str]) -> None:
    base = written(tmp_path, BASE, "base.yaml")
    recipe = written(tmp_path, "extends: base.yaml\ntrain: {warmup: 0.2}\n")
    text = given_yaml(recipe, overrides)
    given = written(tmp_path, text, "given.yaml")
    assert load_config(given) == load_config(recipe, overrides)
    assert text.splitlines()[1:3] == [f"# {base}", f"# {recipe}"]
    shown = [override for override in overrides if override.isprintable()]
    assert all(f"# {override}\n" in text for override in shown)
    assert "learning_rate" not in text  # a default, which nobody gave


def test_an_empty_place_to_resume_from_is_refused() -> None:
    assert refusal("resume=''").startswith("resume=: allowed are auto, none, or the path of a checkpoint or run")


def test_every_setting_is_read_somewhere() -> None:
    root = Path(__file__).parents[1]
    files = (path for folder in ("pretrain", "objectives", "data", "eval") for path in (root / folder).rglob("*.py"))
    code = "\n".join(path.read_text() for path in files)

    def keys(section: Setting) -> Iterator[str]:
        for setting in section.children():
            if setting.section is None:
                yield setting.key
            else:
                yield from keys(setting.children()[0] if setting.named else setting)

    found = list(keys(Setting("", Config, None, "")))
    assert len(found) > 100
    read = {key: rf'\.{name}\b(?! *=[^=])|getattr\(\w+, "{name}"' for key in found for name in [key.split(".")[-1]]}
    assert [key for key, pattern in read.items() if not re.search(pattern, code)] == []
