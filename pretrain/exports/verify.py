"""Whether an export gives what the encoder gives: loaded by a process that has `transformers` alone."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.batch import Field
from data.decode import Waveform
from data.source import SampleError, Source
from data.transforms import FRAME, SAMPLE_RATE, Views
from pretrain.exports import reader
from pretrain.exports.folders import INPUTS, PROCESSORS, Folder, see
from pretrain.exports.modeling_triptych import TriptychModel
from pretrain.exports.subject import ExportError, Subject

SAMPLES = 4
TOLERANCE = 1e-6  # of features in float64
# Of what processors make: pixels are rounded once, log-mel is computed in float32 there.
PROCESSED = {
    "pixel_values": 1e-6,
    # torchvision, where it is installed, rounds otherwise on the way: by a level of 256, rarely by two.
    "default_pixel_values": 2 / 127.5 + 1e-6,
    "input_ids": 0.0,
    "attention_mask": 0.0,
    "input_values": 1e-4,
}
TEXTS = ("a", "a short caption", "Größe, façade, 雨", "a longer caption, of some more words than the others have")
# How many samples in a row are looked at for some that can be used.
LOOKS = 64


class Sample(NamedTuple):
    """A few raw samples, the same number of each modality.

    Attributes:
        values: modality -> decoded members: image (H, W, 3) uint8, text str, audio Waveform.
        origin: where they come from, for the card.
    """

    values: dict[str, list[Any]]
    origin: str


class Inputs(NamedTuple):
    """The same samples as files hold them, and as the encoder reads them.

    Attributes:
        raw: ``image.0`` (H, W, 3) uint8 and ``audio.0`` (T,) float32 at 16 kHz, and so on.
        texts: captions.
        fields: modality -> what the encoder reads, in float32.
    """

    raw: dict[str, Tensor]
    texts: list[str]
    fields: dict[str, Field]


def real_samples(source: Source, views: Views) -> Sample | None:
    """The first samples of a source that have every modality in use, or None where there are too few.

    Raises:
        ShardError, FetchError: shards that can't be read.
    """
    found: dict[str, list[Any]] = {name: [] for name in views.used}
    for shard, number in islice(source.places(), LOOKS):
        try:
            values = source.values(shard, number, views.used, training=False)
        except SampleError:  # the run counted it; here another one does
            continue
        sound = values.get("audio")
        # The stock extractor takes no sound that is shorter than one of its frames.
        if views.used.keys() == values.keys() and (
            sound is None or len(sound.samples) / sound.rate > 2 * FRAME / SAMPLE_RATE
        ):
            for name, value in values.items():
                found[name].append(value)
        if all(len(each) == SAMPLES for each in found.values()):
            return Sample(found, f"{SAMPLES} samples of {source.name}")
    return None


def random_samples(views: Views) -> Sample:
    """Noise of different sizes and lengths, and captions of different lengths."""
    random = np.random.default_rng(0)
    values: dict[str, list[Any]] = {
        "image": [random.integers(0, 256, (40 + 9 * i, 64 - 5 * i, 3), dtype=np.uint8) for i in range(SAMPLES)],
        "text": list(TEXTS),
        "audio": [
            Waveform(random.integers(-9999, 9999, FRAME * (i + 1) * 7, dtype=np.int16), SAMPLE_RATE)
            for i in range(SAMPLES)
        ],
    }
    return Sample({name: values[name] for name in views.used}, "random samples")


def make_inputs(views: Views, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Inputs:
    """Raw samples, and what the deterministic views make of them."""
    raw: dict[str, Tensor] = {}
    texts: list[str] = []
    fields: dict[str, Field] = {}
    for name, view in views.used.items():
        values = sample.values[name]
        room: Any = view.allocate(len(values), training=False)
        for i, value in enumerate(values):
            view.put(room, i, value, None)
        fields[name] = view.on_device()(view.field(room, len(values), tokenizer))
        if name == "image":
            raw |= {f"image.{i}": torch.from_numpy(np.array(Image.fromarray(value))) for i, value in enumerate(values)}
        elif name == "text":
            texts = list(values)
        else:  # as it was resampled
            lengths = room.lengths.tolist()
            raw |= {f"audio.{i}": room.samples[i, :length].float() / 32768 for i, length in enumerate(lengths)}
    return Inputs(raw, texts, fields)


def verify(
    subject: Subject,
    out: Path,
    folders: Mapping[str, Folder],
    sample: Sample,
    *,
    fresh: bool = True,
    environment: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Load every folder and compare what it gives in float64 with the encoder, and its processors with our views.

    Args:
        subject: what was exported.
        out: holds the folders.
        folders: the names and kinds of those to look at.
        sample: what to look with.
        fresh: in a process of its own, as a user would, and not in this one.
        environment: variables for that process besides those of this one.

    Returns:
        folder -> the largest difference found.

    Raises:
        ExportError: a folder that does not load whole, or gives something else.
    """
    inputs = make_inputs(subject.encoder.views, subject.tokenizer, sample)
    read = _as_stock(inputs.fields)
    with torch.inference_mode():
        seen = see(subject, inputs.fields)
        calls = {name: folder.expected(seen) for name, folder in folders.items()}
    with tempfile.TemporaryDirectory() as name:
        task = Path(name)
        asked = {
            "export": str(out.resolve()),
            "processors": _processors(folders),
            "folders": {
                name: {
                    "auto": folder.loads,
                    "calls": {call.method: _names(call.modalities, read) for call in calls[name]},
                }
                for name, folder in folders.items()
            },
        }
        (task / "task.json").write_text(json.dumps(asked))
        (task / "texts.json").write_text(json.dumps(inputs.texts))
        doubles = {f"read.{key}": value.double() if value.is_floating_point() else value for key, value in read.items()}
        save_file(
            {**doubles, **{f"raw.{key}": value for key, value in inputs.raw.items()}}, task / "inputs.safetensors"
        )
        if fresh:
            _read_afresh(task, environment or {})
        else:
            reader.read(task, {"joint": TriptychModel})
        report = json.loads((task / "report.json").read_text())["folders"]
        got = load_file(task / "outputs.safetensors")
    for name, found in report.items():
        if problems := {key: found[key] for key in reader.KEYS if found[key]}:
            raise ExportError(f"{out / name}: the saved model does not load whole: {problems}")
    for made, tolerance in PROCESSED.items():
        if f"processed|{made}" not in got:  # no folder that was chosen reads it
            continue
        key = made.removeprefix("default_")
        difference = _difference(got[f"processed|{made}"], read[key])
        if not difference <= tolerance:
            raise ExportError(
                f"{out}: the exported processors make other {made} than training saw: they differ by {difference:.1e}"
            )
    return {name: _compare(subject, out / name, name, calls[name], got) for name in folders}


def _compare(subject: Subject, folder: Path, name: str, calls: Sequence[Any], got: Mapping[str, Tensor]) -> float:
    """The largest difference of a folder's outputs."""
    largest = 0.0
    tolerance = _tolerance(subject, name)
    for call in calls:
        for output, expected in call.outputs.items():
            difference = _difference(got[f"{name}|{output}"], expected)
            if not difference <= tolerance:  # NaN is no match either
                raise ExportError(f"{folder}: {output} of the saved {name} model differs by {difference:.1e}")
            largest = max(largest, difference)
    return largest


def _tolerance(subject: Subject, name: str) -> float:
    config = subject.encoder.config
    if name == "image_text" and config.embed_dim > config.width:
        # The one folder whose weights are computed, and rounded after that; its logits are up to 100 times a cosine.
        return 500 * torch.finfo(subject.dtype).eps
    return TOLERANCE


def _processors(folders: Mapping[str, Folder]) -> dict[str, str]:
    """Modality -> the first folder that has its processor."""
    holders = {
        modality: [name for name, folder in folders.items() if write in folder.processors]
        for modality, write in PROCESSORS.items()
    }
    return {modality: names[0] for modality, names in holders.items() if names}


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return (one.double() - other.double()).abs().max().item()


def _as_stock(fields: Mapping[str, Field]) -> dict[str, Tensor]:
    """What the encoder reads, by the names of stock models."""
    made: dict[str, Tensor] = {}
    for name, field in fields.items():
        values, *masks = INPUTS[name]
        made[values] = field.x.contiguous()
        for mask in masks:
            valid = torch.ones_like(field.x, dtype=torch.bool) if field.valid is None else field.valid
            made[mask] = valid.long()
    return made


def _names(modalities: Iterable[str], read: Mapping[str, Tensor]) -> list[str]:
    return [key for name in modalities for key in INPUTS[name] if key in read]


def _read_afresh(task: Path, environment: Mapping[str, str]) -> None:
    """`reader` in a process that finds none of our packages on its path."""
    env = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",  # the encoder is compared on the CPU
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(task / "modules"),  # the joint model's code is copied there when it is loaded
        **environment,
    }
    command = [sys.executable, "-P", reader.__file__, str(task)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=task)  # noqa: S603
    if done.returncode != 0:
        raise ExportError(f"the export could not be loaded by a process of its own:\n{done.stderr.strip()}")
