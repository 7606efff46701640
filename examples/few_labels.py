"""What the examples in plain libraries share: a few labelled samples of shards, training with them, a table of scores.

Copy it along with the script that you start from.
"""

import argparse
import io
import json
import random
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
import transformers
import webdataset
from PIL import Image
from transformers import Trainer, TrainingArguments

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt",)
SOUNDS = ("flac", "wav", "ogg")


class Sample(NamedTuple):
    """One member of a sample, and the sample's label.

    Attributes:
        data: the member's bytes.
        label: as text; empty where labels are not asked for.
    """

    data: bytes
    label: str

    def picture(self) -> Image.Image:
        """In RGB."""
        return Image.open(io.BytesIO(self.data)).convert("RGB")

    def text(self) -> str:
        """UTF-8, without the white space around it."""
        return self.data.decode().strip()

    def sound(self, rate: int) -> npt.NDArray[np.float32]:
        """(T,) mono, from -1 to 1, resampled to ``rate``."""
        sound, own = soundfile.read(io.BytesIO(self.data), dtype="float32", always_2d=True)
        mono: npt.NDArray[np.float32] = sound.mean(1)
        return mono if own == rate else soxr.resample(mono, own, rate)


def another_view(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A picture turned by up to 10 degrees, of which a part of 0.7 to 1 in width and height is left."""
    turned = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    width, height = (round(side * rng.uniform(0.7, 1)) for side in turned.size)
    left, top = rng.randint(0, turned.width - width), rng.randint(0, turned.height - height)
    return turned.crop((left, top, left + width, top + height))


class Start(NamedTuple):
    """A way to begin.

    Attributes:
        build: makes the model, anew for every seed.
        learning_rate: at the end of warm-up.
    """

    build: Callable[[], Any]
    learning_rate: float


def reader(about: str | None, train: bool = True) -> argparse.ArgumentParser:
    """The options of all examples: an export and shards; ``about`` is the script's docstring."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("export", type=Path, help="folder of an export, such as runs/digits/export")
    if train:
        made.add_argument("--train", nargs="+", required=True, metavar="SHARDS", help="WebDataset tars, patterns too")
    made.add_argument("--test", nargs="+", required=True, metavar="SHARDS")
    return made


def trainer(about: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of all fine-tuning examples; ``defaults`` are the script's own values of some."""
    made = reader(about)
    made.add_argument("--label", default="label", help="field of each sample's .json that holds the class")
    made.add_argument("--labels", type=int, default=100, help="how many labelled samples to train on (%(default)s)")
    made.add_argument("--views", type=int, default=8, help="random views that are made of each labelled sample")
    made.add_argument("--steps", type=int, default=150)
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training of each start per seed")
    made.add_argument("--save", type=Path, metavar="FOLDER", help="keep the first seed's fine-tuned model there")
    made.set_defaults(**defaults)
    return made


def run(main: Callable[[argparse.Namespace], None], made: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run a script; returns the exit code, 2 for users' mistakes."""
    given = made.parse_args(argv)
    transformers.logging.set_verbosity_error()  # its report of new heads: `pretrained` looks at what is missing
    transformers.logging.disable_progress_bar()
    try:
        main(given)
    # Libraries raise them too, for files that they can't read.
    except (ValueError, OSError, soundfile.SoundFileError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def part(export: Path, name: str) -> Path:
    """A folder of an export.

    Raises:
        ValueError: there is none.
    """
    if not (export / name / "config.json").is_file():
        found = sorted(str(path.parent.relative_to(export)) for path in export.rglob("config.json"))
        raise ValueError(f"{export}: no model in its folder {name}; it has {', '.join(found) or 'none'}")
    return export / name


def pretrained(auto: Any, folder: Path, classes: Sequence[str]) -> Any:
    """A model with a new head for ``classes`` on an export's stream; ``auto`` is the ``AutoModelFor...`` to load.

    Raises:
        ValueError: weights are missing besides the head's.
    """
    model, loading = auto.from_pretrained(folder, dtype=torch.float32, **_names(classes), output_loading_info=True)
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("classifier."))
    if missing:  # they would be random, and no one would notice
        raise ValueError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model


def scratch(auto: Any, folder: Path, classes: Sequence[str] = ()) -> Any:
    """The same architecture with random weights to train, and a head for ``classes`` if there are any.

    The stock standard deviation of 0.02 is made for widths near 1,000; 1 / sqrt(width), that of Xavier (Glorot and
    Bengio 2010), learns faster in a narrow model.
    """
    config = transformers.AutoConfig.from_pretrained(folder, **(_names(classes) if classes else {}))
    config.initializer_range = config.hidden_size**-0.5
    return auto.from_config(config, dtype=torch.float32)


def random_weights(auto: Any, folder: Path) -> Any:
    """The model of a folder as `transformers` would begin it, to be looked at untrained."""
    torch.manual_seed(0)
    return auto.from_config(transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()


def _names(classes: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def read(shards: Sequence[str], extensions: Sequence[str], label: str | None) -> list[Sample]:
    """All distinct samples that have a member with one of ``extensions``; equal ones count once.

    Args:
        shards: paths of local tars, or patterns of their names.
        extensions: the first that a sample has is read.
        label: field of its ``.json`` that holds the class; None: labels are left empty.

    Raises:
        ValueError: no such shard, no such member in any sample, or a sample without the label.
    """
    found: dict[Sample, None] = {}  # a dict keeps the order
    for pattern in shards:
        paths = sorted(str(path.absolute()) for path in Path(pattern).parent.glob(Path(pattern).name))
        if not paths:
            raise ValueError(f"{pattern}: no such shard")
        for sample in webdataset.WebDataset(paths, shardshuffle=False):
            member = next((extension for extension in extensions if extension in sample), None)
            if member is not None:
                name = "" if label is None else _label(sample, label)
                found[Sample(sample[member], name)] = None
    if not found:
        raise ValueError(f"{' '.join(shards)}: no sample has a member {' or '.join(extensions)}")
    return list(found)


def _label(sample: Mapping[str, Any], field: str) -> str:
    where = f"{sample['__url__']}: sample {sample['__key__']}"
    if "json" not in sample:
        raise ValueError(f"{where} has no .json, so no label")
    fields = json.loads(sample["json"])
    value = fields.get(field) if isinstance(fields, dict) else None
    if isinstance(value, str | int):
        return str(value)
    known = ", ".join(fields) if isinstance(fields, dict) else "no fields"
    raise ValueError(f"{where}: its .json has no text or whole number as {field!r}; it has {known}")


def templates_of(given: Sequence[str] | None, default: str) -> Sequence[str]:
    """Prompts with {} for the class: those of ``--template``, or the ``default``.

    Raises:
        ValueError: one without {}, with which all classes would have the same prompt.
    """
    if missing := [template for template in given or () if "{}" not in template]:
        raise ValueError(f"--template {missing[0]!r}: {{}} is needed where the class's name goes")
    return given or [default]


def class_names(given: Sequence[str], samples: Sequence[Sample]) -> dict[str, str]:
    """Label -> the name that prompts give it, from ``LABEL=NAME`` or, where the two are the same, ``NAME``.

    Raises:
        ValueError: a label without a name.
    """
    names = {label: name or label for label, _, name in (each.partition("=") for each in given)}
    if missing := sorted({sample.label for sample in samples} - set(names)):
        raise ValueError(f"--classes: no name for {', '.join(missing)}; LABEL=NAME gives one")
    return names


def draw(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """``count`` random samples, as many of each class as of any other.

    Raises:
        ValueError: ``count`` is no multiple of the number of classes, or a class has too few.
    """
    by_class: dict[str, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    each, left = divmod(count, len(by_class))
    if left or each < 1:
        raise ValueError(f"{count} labels: a multiple of the {len(by_class)} classes is needed")
    rng = random.Random(seed)
    drawn = []
    for name in sorted(by_class):
        if len(by_class[name]) < each:
            raise ValueError(f"{count} labels: class {name!r} has {len(by_class[name])} distinct samples, not {each}")
        drawn += rng.sample(by_class[name], each)
    return drawn


def compare(
    given: argparse.Namespace,
    extensions: Sequence[str],
    encode: Callable[[Sample, random.Random | None], dict[str, Any]],
    starts: Callable[[Sequence[str]], Mapping[str, Start]],
    processor: Any,
) -> dict[str, list[float]]:
    """Train every start on the same few labels with the same schedule, score it on all test samples, print a table.

    Args:
        given: the options of `trainer`.
        extensions: of the member to read.
        encode: makes of a sample what the model reads, without a batch dimension: changed at random as `--views` of
            it are to differ, or, without a generator, as it is.
        starts: names of the classes -> the ways to begin; `--save` keeps the first one's model.
        processor: what goes with the saved model.

    Returns:
        start -> accuracy per seed, from 0 to 1.

    Raises:
        ValueError: shards, labels or numbers that can't be used.
    """
    for name in ("labels", "views", "steps", "batch_size"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)}: 1 or more is allowed")
    samples, tests = (read(shards, extensions, given.label) for shards in (given.train, given.test))
    classes = sorted({sample.label for sample in samples}, key=lambda name: (len(name), name))  # 9 before 10
    if unknown := {sample.label for sample in tests} - set(classes):
        raise ValueError(f"--test has classes that --train lacks: {', '.join(sorted(unknown))}")
    if len(classes) < 2:
        raise ValueError(f"--train: two classes are needed at least, {given.label!r} is {classes[0]!r} everywhere")

    def row(sample: Sample, rng: random.Random | None = None) -> dict[str, Any]:
        return {**encode(sample, rng), "labels": classes.index(sample.label)}

    rows = {sample: row(sample) for sample in tests}
    scores: dict[str, list[float]] = {name: [] for name in starts(classes)}
    scored = len(tests)
    for seed in given.seeds:
        drawn = draw(samples, given.labels, seed)
        rng = random.Random(seed)
        train = [row(sample, rng) for sample in drawn for _ in range(given.views)]
        trained = set(drawn)
        test = [rows[sample] for sample in tests if sample not in trained]  # none is scored that was trained on
        if not test:
            raise ValueError("--test: nothing is left that is not among the labelled samples")
        scored = min(scored, len(test))
        for name, start in starts(classes).items():
            torch.manual_seed(seed)
            model = start.build()
            scores[name].append(fine_tune(model, train, test, given, start.learning_rate, seed))
            if given.save is not None and seed == given.seeds[0] and name == next(iter(scores)):
                model.save_pretrained(given.save)
                processor.save_pretrained(given.save)
    print(f"{given.labels} labels of {len(classes)} classes, {scored} test samples, {given.steps} steps\n")
    with_means = {name: [*values, float(np.mean(values))] for name, values in scores.items()}
    print_scores(with_means, [*(f"seed {seed}" for seed in given.seeds), "mean"], 1 / len(classes))
    return scores


def fine_tune(model: Any, train: Any, test: Any, given: argparse.Namespace, learning_rate: float, seed: int) -> float:
    """Train on rows as models take them; returns the accuracy on others. ``model`` is changed."""
    trained = fit(model, train, given, learning_rate, seed, compute_metrics=accuracy)
    return float(trained.evaluate(test)["eval_accuracy"])


def fit(model: Any, rows: Any, given: argparse.Namespace, learning_rate: float, seed: int, **more: Any) -> Trainer:
    """Train on rows as models take them; returns the `Trainer`, to which ``more`` goes."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch_size,
            per_device_eval_batch_size=256,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,  # of all
            weight_decay=0.05,
            seed=seed,
            label_names=["labels"],
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        made = Trainer(model, settings, train_dataset=rows, **more)
        made.remove_callback(transformers.PrinterCallback)  # it would print every dict of numbers
        made.train()
    return made


def accuracy(outputs: Any) -> dict[str, float]:
    """Of the class with the highest logit."""
    return {"accuracy": float((outputs.predictions.argmax(-1) == outputs.label_ids).mean())}


def print_scores(scores: Mapping[str, Sequence[float]], columns: Sequence[str], chance: float | None = None) -> None:
    """A table in per cent, with a row per name."""
    width = max(len(name) for name in scores) + 2
    print(" " * width + "".join(f"{name:>9}" for name in columns))
    for name, values in scores.items():
        print(f"{name:{width}}" + "".join(f"{100 * value:9.1f}" for value in values))
    if chance is not None:
        print(f"{'chance':{width}}{100 * chance:9.1f}")
