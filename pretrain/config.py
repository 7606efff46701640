"""The configuration of a run: a typed tree of dataclasses, filled from YAML recipes and `key=value` overrides.

A recipe may begin with ``extends: other.yaml``: the other is read first, and this one lies over it.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import UserError
from data.stream import DataConfig
from data.text import TokenizerConfig
from eval.tasks import EvalConfig
from objectives.pretraining import OBJECTIVES, ObjectivesConfig
from pretrain.exports.folders import ExportConfig
from pretrain.model.tokenizers import PRESETS, ModelConfig
from pretrain.trackers import TrackerConfig

RECIPES = Path(__file__).parent / "recipes"
COMMAND_LINE = "command line"


class ConfigError(UserError):
    """A recipe or an override that can't be used; names every key that is wrong."""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 10_000
    """Optimiser steps in all."""
    batch_size: int = 256
    """Samples per step."""
    accumulate: int = 1
    """Micro-batches that a step goes through one after the other, which takes less memory; they divide batch_size."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Decay of weight matrices; norms, biases, embeddings, positions and scales have none."""
    beta2: float = 0.98
    """AdamW's second-moment decay; below the usual 0.999 because contrastive gradients change fast."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    schedule: str = "cosine"
    """How the learning rate goes on. Allowed: cosine (it falls to 0), constant (it stays, until the cooldown)."""
    cooldown: float = 0.2
    """With constant: last share of the steps, in which the learning rate falls to 0 in a straight line."""
    layer_decay: float = 1.0
    """Factor on the learning rate for each layer that is further from the encoder's end; below 1 for init_from."""
    ema: float | None = None
    """Share of itself that an average of the encoder's weights keeps at a step, such as 0.9999, less at first; the
    average is then what evaluation and export use. null: there is none."""
    clip_norm: float = 1.0
    """Largest norm of the gradient over all parameters."""
    precision: str = "auto"
    """Allowed: auto (bf16 where the device is fast in it), fp32, bf16, fp16 (on GPUs, with scaled gradients)."""
    max_bad_steps: int = 10
    """Steps whose gradient is not finite are left out; with more than so many in a run it stops."""
    timeout: float = 600
    """Seconds that a process waits for another one before it ends with an error."""
    compile: bool = False
    """Compile the Transformer blocks: a few minutes at the start, faster steps after."""
    recompute: bool = False
    """Compute the blocks' activations again in the backward pass (activation checkpointing): less memory, more time."""
    threads: int | None = None
    """CPU threads when training on a CPU; null takes all cores there are, shared evenly by a machine's processes."""
    log_every: int = 20
    """Steps between two lines of progress and of metrics.jsonl."""
    save_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this are kept for good, such as 10 times save_every; null: none is."""
    pictures: bool = True
    """With each checkpoint, a picture of inputs, masks and reconstructed pixels in `out`/pictures; needs matplotlib."""
    gradients_every: int | None = None
    """Steps between two looks at how strongly each loss pulls at the trunk, and in which direction; null: never."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: allowed is 1 or more")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"train.accumulate={self.accumulate}: allowed is a divisor of train.batch_size={self.batch_size}"
            )
        if self.batch_size < 2:
            raise ValueError(f"train.batch_size={self.batch_size}: allowed is 2 or more; contrast needs two samples")
        for name in ("learning_rate", "clip_norm", "timeout"):
            if not 0 < getattr(self, name) < math.inf:  # NaN is not, either
                raise ValueError(f"train.{name}={getattr(self, name)}: allowed is above 0")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"train.warmup={self.warmup}: allowed is 0 to 1, a share of the steps")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"train.schedule={self.schedule}: allowed are cosine, constant")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"train.cooldown={self.cooldown}: allowed is 0 to 1, a share of the steps")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"train.layer_decay={self.layer_decay}: allowed is above 0 and at most 1")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"train.ema={self.ema}: allowed is 0 to below 1, or null")
        if self.max_bad_steps < 0:
            raise ValueError(f"train.max_bad_steps={self.max_bad_steps}: allowed is 0 or more")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"train.keep_every={self.keep_every}: allowed is 1 or more, or null")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"train.beta2={self.beta2}: allowed is 0 to below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"train.weight_decay={self.weight_decay}: allowed is 0 or more")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"train.precision={self.precision}: allowed are auto, fp32, bf16, fp16")
        if self.gradients_every is not None and self.gradients_every < 1:
            raise ValueError(f"train.gradients_every={self.gradients_every}: allowed is 1 or more, or null")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"train.threads={self.threads}: allowed is 1 or more, or null")


@dataclass
class Config:
    """A whole run."""

    out: str = "runs/run"
    """Folder of the run, made if need be."""
    seed: int = 0
    """Fixes the initial weights, the order of the data, augmentation and masks."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint in `out`, if there is one; none: refuse an `out` that has one; or a
    checkpoint, or a run, from whose newest one to go on in an `out` that has none."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards and what is read of them."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to tokens."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The encoder."""
    init_from: dict[str, str] = field(default_factory=dict)
    """Modality -> a ViTModel (image), RobertaPreLayerNormModel (text) or ASTModel (audio) with whose weights its stream
    begins: a folder, such as an export, or a hub id."""
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    """The losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """The evaluation at the end, and looks at the encoder on the way."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The export at the end."""
    trackers: TrackerConfig = field(default_factory=TrackerConfig)
    """Where metrics go besides metrics.jsonl."""
    doctor: bool = False
    """Examine shards, speed, memory, ranks and this machine, and stop."""
    dry_run: bool = False
    """Make two steps and then all that comes at a run's end, in the folder `out`/dry_run, to see that it works."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: allowed is 0 to 2**32 - 1")
        if not self.resume:
            raise ValueError("resume=: allowed are auto, none, or the path of a checkpoint or run")
        if not self.data.train:
            raise ValueError("data.train is empty: name the training shards")
        if self.eval.label is not None and not (self.data.val and self.data.test):
            raise ValueError(f"eval.label={self.eval.label} needs data.val and data.test; null skips the evaluation")
        if self.eval.monitor.every is not None and not self.data.val:
            raise ValueError(f"eval.monitor.every={self.eval.monitor.every} needs data.val; null: no looks on the way")
        used = self.data.views.used
        if not any(OBJECTIVES[name].learns_from(used) for name in self.objectives.used):
            raise ValueError(
                f"data.views has only {', '.join(used)}, from which none of the objectives of weight above 0 "
                f"({', '.join(self.objectives.used)}) learns"
            )
        if self.tokenizer.name is None and self.tokenizer.train is None:
            raise ValueError("tokenizer: give name (a folder or hub id) or train (a vocabulary size)")


class Part(NamedTuple):
    """What one recipe or one override gives.

    Attributes:
        origin: the recipe's path, or ``COMMAND_LINE``.
        given: its keys and values, as yet unchecked; of a recipe without ``extends``.
    """

    origin: str
    given: DictConfig


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, lay it over those that it extends, and overrides over all.

    Args:
        recipe: a YAML file, or the bare name of a shipped one.
        overrides: ``key=value`` with dotted keys and YAML values.

    Raises:
        ConfigError: no such file, no YAML, unknown keys (all of them, with suggestions), wrong types, bounds.
    """
    schema = OmegaConf.structured(Config)
    parts = _read_parts(recipe, overrides)
    if unknown := [line for part in parts for line in _unknown(part, schema)]:
        raise ConfigError("\n".join(unknown))
    given = [part.given for part in parts]
    for each in given:
        if (misfit := next(_misfits(each, schema), None)) is not None:
            raise ConfigError(misfit)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, _preset(given), *given))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}" if error.full_key else reason) from error
    except ValueError as error:  # from a __post_init__, which names its key; OmegaConf adds lines of its own
        raise ConfigError(str(error).splitlines()[0]) from error
    if not isinstance(config, Config):
        raise TypeError(f"the schema gave a {type(config).__name__}")
    return config


def find_recipe(name: str, folder: Path = Path()) -> Path:
    """The recipe at the path ``name``, or the shipped one of that bare name.

    Args:
        name: a path or a name, such as ``digits``.
        folder: where a relative path starts from.

    Raises:
        ConfigError: there is neither; lists the names of the shipped ones.
    """
    path = folder / name
    if path.is_file():
        return path
    shipped = {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.yaml"))}
    if name not in shipped:
        raise ConfigError(f"no recipe at {path}; a path is needed, or the name of a shipped one: {', '.join(shipped)}")
    return shipped[name]


def to_yaml(config: Config) -> str:
    """The whole configuration as a recipe that gives the same run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def given_yaml(recipe: Path, overrides: Sequence[str] = ()) -> str:
    """What the user gave, as one recipe that gives the same run; what it does not name was left to the defaults.

    Raises:
        ConfigError: a recipe or an override that can't be read.
    """
    parts = _read_parts(recipe, overrides)
    origins = dict.fromkeys(part.origin for part in parts if part.origin != COMMAND_LINE)
    lines = ["Given, each over the ones before it:", *origins, *overrides]
    header = "".join(f"# {line if line.isprintable() else repr(line)}\n" for line in lines)
    return header + OmegaConf.to_yaml(OmegaConf.merge(*(part.given for part in parts)))


def read_yaml(source: Path | IO[str], name: str) -> DictConfig:
    """A mapping of keys to values.

    Raises:
        ConfigError: begins with ``name``; no YAML, or YAML of something else.
    """
    try:
        given = OmegaConf.load(source)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:  # OSError: a lone number
        raise ConfigError(f"{name}: {error}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{name}: a mapping of keys to values is needed")
    return given


def _read_parts(recipe: Path, overrides: Sequence[str]) -> list[Part]:
    """All that is given, each to lie over the ones before it."""
    parts = _read_recipes(recipe)
    for override in overrides:
        given = OmegaConf.create()
        try:
            given.merge_with_dotlist([_checked_override(override)])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{COMMAND_LINE}: {override}: {error}") from error
        parts.append(Part(COMMAND_LINE, given))
    for i, part in enumerate(parts):
        if _name_source(part.given):
            _drop_sources([earlier.given for earlier in parts[:i]])
    return parts


def _read_recipes(recipe: Path) -> list[Part]:
    """A recipe behind those that it extends."""
    chain = [find_recipe(str(recipe))]
    parts = [Part(str(chain[0]), read_yaml(chain[0], str(chain[0])))]
    while (name := _take_extends(parts[0])) is not None:
        so_far = " extends ".join(map(str, chain))
        try:
            path = find_recipe(name, chain[-1].parent)
        except ConfigError as error:
            raise ConfigError(f"{so_far} extends {name}: {error}") from error
        if any(path.samefile(other) for other in chain):
            raise ConfigError(f"{so_far} extends {path}: a recipe can't extend itself")
        chain.append(path)
        parts.insert(0, Part(str(path), read_yaml(path, str(path))))
    return parts


def _take_extends(part: Part) -> str | None:
    """Which recipe a recipe extends; no longer among its keys after that."""
    if part.given._get_node("extends") is None:
        return None
    try:
        name = part.given.pop("extends")
    except OmegaConfBaseException as error:  # an interpolation of a key that is not there
        raise ConfigError(f"{part.origin}: extends: {str(error).splitlines()[0]}") from error
    if not isinstance(name, str):
        raise ConfigError(f"{part.origin}: extends: {name} is no path or name of a recipe")
    return name


def _preset(given: Sequence[DictConfig]) -> DictConfig:
    """The shape that ``model.preset`` stands for, under whatever else is given."""
    name = OmegaConf.select(OmegaConf.merge(*given), "model.preset")
    known = isinstance(name, str) and name in PRESETS  # another name is refused with all other values
    return OmegaConf.create({"model": PRESETS[name]} if known else {})


def _checked_override(override: str) -> str:
    if "=" not in override:
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is no key=value")
    return override


def _name_source(given: DictConfig) -> bool:
    """Where ``data.train`` is a list of shards, make it a source of the name train; returns whether it was one."""
    try:
        data = given.get("data")
        shards = data.get("train") if isinstance(data, DictConfig) else None
    except OmegaConfBaseException as error:  # an interpolation of a key that is not there
        raise ConfigError(f"data.train: {error}") from error
    if not isinstance(shards, ListConfig | str):
        return False
    data.train = {"train": {"shards": [shards] if isinstance(shards, str) else shards}} if shards else {}
    return True


def _drop_sources(earlier: Iterable[DictConfig]) -> None:
    """A list of shards takes the place of all sources that were given before it."""
    for part in earlier:
        if isinstance(data := part.get("data"), DictConfig):
            data.pop("train", None)


def child_schema(schema: DictConfig, name: Any) -> Any:
    """The schema of the key ``name``; None if there is no such key."""
    element = schema._metadata.element_type
    if is_dataclass(element):  # a mapping from names of the user's choice
        return OmegaConf.structured(element)
    if element in (str, int, float, bool):
        return element
    return schema._get_node(name) if name in schema else None


def _unknown(part: Part, schema: DictConfig) -> Iterator[str]:
    """Lines about keys that there are not."""
    known = list(all_keys(schema))
    if part.origin != COMMAND_LINE:
        known.append("extends")
    for key in _unknown_keys(part.given, schema):
        if part.origin == COMMAND_LINE and key == "extends":
            yield f"{COMMAND_LINE}: extends stands in recipes only: name the other recipe in the place of this one"
        else:
            yield f"{part.origin}: unknown key {key!r}{suggestion(key, known)}"


def _unknown_keys(given: Any, schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of ``given`` that ``schema`` lacks."""
    if not isinstance(given, DictConfig) or not isinstance(schema, DictConfig):
        return
    for name in given:
        key, child = f"{prefix}{name!s}", child_schema(schema, name)
        if child is None:
            yield key
        else:
            yield from _unknown_keys(given._get_node(name), child, f"{key}.")


def _misfits(given: Any, schema: Any, prefix: str = "") -> Iterator[str]:
    """Sections and lists that got a value of another kind; OmegaConf's own message names no key, or there is none."""
    for name in given:
        key, node, expected = f"{prefix}{name!s}", given._get_node(name), child_schema(schema, name)
        if node._is_none() or node._is_interpolation():
            continue
        if isinstance(expected, DictConfig):
            if isinstance(node, DictConfig):
                yield from _misfits(node, expected, f"{key}.")
            else:
                allowed = ", ".join(map(str, expected)) or "names of your choice"
                yield f"{key}: {node} is no section; allowed are its keys: {allowed}"
        elif isinstance(expected, type) and isinstance(node, DictConfig | ListConfig):
            yield f"{key}: {node} is no single value"
        elif isinstance(expected, ListConfig):
            if not isinstance(node, ListConfig):
                yield f"{key}: {node} is no list; allowed is [..., ...]"
            else:
                items = (node._get_node(i) for i in range(len(node)))
                nested = (item for item in items if isinstance(item, DictConfig | ListConfig))
                yield from (f"{key}: {item} within a list; allowed are single values" for item in nested)


def all_keys(schema: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a schema, sections and leaves; NAME stands for a name of the user's choice."""
    element = schema._metadata.element_type
    if is_dataclass(element):
        yield from all_keys(OmegaConf.structured(element), f"{prefix}NAME.")
    for name in schema:
        yield f"{prefix}{name!s}"
        node = schema._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from all_keys(node, f"{prefix}{name!s}.")


def suggestion(key: str, known: Sequence[str]) -> str:
    """The nearest known key: by its whole name, or by its last part if that is spelt right but misplaced."""
    last = key.rpartition(".")[2]
    near = [other for other in known if other.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [
        other
        for match in difflib.get_close_matches(last, [other.rpartition(".")[2] for other in known], n=1, cutoff=0.6)
        for other in known
        if other.rpartition(".")[2] == match
    ]
    return f"; did you mean {' or '.join(repr(other) for other in near[:3])}?" if near else ""
