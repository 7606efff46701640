"""Model cards: what an export is, what it was made from and how, what it scored, and the lines that load it."""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.manifest import MANIFEST
from data.stream import STATE
from eval.report import SCHEMA as RESULTS_SCHEMA
from eval.report import Results, table
from pretrain.checkpoint import SCHEMA as CHECKPOINT_SCHEMA
from pretrain.exports.folders import FOLDERS, absent_of
from pretrain.exports.graphs import OPSET
from pretrain.exports.subject import Subject
from pretrain.model.encoder import SCHEMA as ENCODER_SCHEMA

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
LICENCE = "unknown"
IMAGE = """\
from PIL import Image
from transformers import AutoImageProcessor, {model}

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = {model}.from_pretrained("FOLDER")
inputs = processor(Image.open("picture.jpg").convert("RGB"), return_tensors="pt")
print(model(**inputs).{output}.shape)"""
TEXT = """\
from transformers import AutoTokenizer, {model}

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {model}.from_pretrained("FOLDER")
inputs = tokenizer(["a caption"], padding=True, truncation=True, return_tensors="pt")
print(model(**inputs).{output}.shape)"""
AUDIO = """\
import soundfile
from transformers import AutoFeatureExtractor, {model}

extractor = AutoFeatureExtractor.from_pretrained("FOLDER")
model = {model}.from_pretrained("FOLDER")
sound, rate = soundfile.read("clip.wav", dtype="float32")  # mono, 16 kHz: resample others first
print(model(**extractor(sound, sampling_rate=rate, return_tensors="pt")).{output}.shape)"""
IMAGE_TEXT = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER")
images = AutoImageProcessor.from_pretrained("FOLDER")([Image.open("picture.jpg").convert("RGB")], return_tensors="pt")
captions = ["a caption", "another one"]
texts = AutoTokenizer.from_pretrained("FOLDER")(captions, padding=True, truncation=True, return_tensors="pt")
print(model(**images, **texts).logits_per_image.softmax(dim=-1))"""
JOINT = """\
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER/../text")  # each modality's processor lies in its own folder
inputs = tokenizer(["a caption"], truncation=True, return_tensors="pt")
print(model(input_ids=inputs["input_ids"]).last_hidden_state.shape)  # pixel_values=, input_values= besides"""
JOINT_WITHOUT_TEXT = """\
from transformers import AutoModel

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)
help(model.forward)  # takes pixel_values= and input_values= as the processors in ../image and ../audio make them"""
# Folder -> pipeline of the hub, and the lines that load it; FOLDER stands for where it is.
LOADS: dict[str, tuple[str, str]] = {
    "image": ("image-feature-extraction", IMAGE.format(model="AutoModel", output="pooler_output")),
    "text": ("feature-extraction", TEXT.format(model="AutoModel", output="pooler_output")),
    "audio": ("feature-extraction", AUDIO.format(model="AutoModel", output="pooler_output")),
    "text/masked_lm": ("fill-mask", TEXT.format(model="AutoModelForMaskedLM", output="logits")),
    "embed_image": (
        "image-feature-extraction",
        IMAGE.format(model="AutoModelForImageClassification", output="logits"),
    ),
    "embed_text": ("feature-extraction", TEXT.format(model="AutoModelForSequenceClassification", output="logits")),
    "embed_audio": ("feature-extraction", AUDIO.format(model="AutoModelForAudioClassification", output="logits")),
    "image_text": ("zero-shot-image-classification", IMAGE_TEXT),
    "joint": ("feature-extraction", JOINT),
}
USE = """\
For features to fine-tune or to probe, and for search across modalities, on data like those that it was trained on. It
was trained on pairs without labels, and knows and repeats what stands in them, wrong or one-sided as that may be. It
was not tested on other data, on other languages or for decisions about people; test it on yours before you rely on
it. Captions longer than the text view, and sounds longer than the audio view, are cut."""


class About(NamedTuple):
    """What is known of where an encoder comes from.

    Attributes:
        checkpoint: the run's and the checkpoint's name; empty where none is known.
        step: optimiser steps done.
        data: what fixes the data: sources, counts, fingerprints, seed.
        recipe: what the user gave, as YAML; else the whole configuration.
        results: its evaluation; None where there is none of these very weights.
        averaged: whether the weights are an average over steps.
        licence: of the weights, as the hub names licences.
    """

    checkpoint: str = ""
    step: int | None = None
    data: Mapping[str, Any] = {}
    recipe: str = ""
    results: Results | None = None
    averaged: bool = False
    licence: str = LICENCE


def read_about(checkpoint: Path, *, averaged: bool = False, evaluated: bool = True, licence: str = LICENCE) -> About:
    """What a checkpoint and the run around it say of themselves; what is not there is left out.

    Args:
        checkpoint: a checkpoint's folder, within a run's ``checkpoints`` or anywhere.
        averaged: whether its average is exported.
        evaluated: whether what is exported is what the run evaluates: the same weights, for inputs of the same size.
        licence: of the weights.
    """
    run = checkpoint.resolve().parent.parent
    state, stream = _json(checkpoint / "state.json"), _json(checkpoint / STATE)
    recipes = [path for path in (run / "given.yaml", run / "config.yaml") if path.is_file()]
    return About(
        str(Path(*checkpoint.resolve().parts[-3:])),  # the folders above them are nobody else's business
        state.get("step"),
        stream.get("fingerprint", {}),
        recipes[0].read_text() if recipes else "",
        _results(run, checkpoint) if evaluated else None,
        averaged,
        licence,
    )


def card(name: str, subject: Subject, about: About, differences: Mapping[str, float], verified_with: str) -> str:
    """The card of one folder, as Markdown behind the hub's metadata.

    Args:
        name: of the folder, such as ``embed_image``.
        subject: what was exported.
        about: where it comes from.
        differences: folder -> the largest difference that its verification found.
        verified_with: which samples that was done with.
    """
    folder = FOLDERS[name]
    pipeline, lines = LOADS[name]
    if name == "joint" and "text" not in subject.modalities:
        lines = JOINT_WITHOUT_TEXT
    if subject.dtype != torch.float32:  # in which processors make their inputs
        lines = re.sub(r"^model = .*$", r"\g<0>.float()", lines, flags=re.MULTILINE)
    notes = ""
    if name == "image_text" and (bias := subject.bias("image_text")) is not None:
        notes = (
            f"\nIt was trained with the sigmoid loss, whose bias the stock class has no place for: the probability of "
            f"a pair is sigmoid(logits_per_image + ({bias.item():.4f})); the config has it as `logit_bias`.\n"
        )
    if name == "text" and not subject.contrasted:
        notes = "\nThe run had no contrastive loss: the pooler is as random as it began; use `last_hidden_state`.\n"
    return f"""\
{_metadata(about, pipeline, subject)}
# {name}

{folder.about}
{notes}
```python
{lines.replace("FOLDER", name)}
```

## Verified

Loaded in a process of its own, with no tensor missing or left over, and compared with the encoder on
{verified_with}, in float64: the largest difference was {differences[name]:.1e}. The processors make what training saw.

{_origin(subject, about)}"""


def overview(subject: Subject, about: About, differences: Mapping[str, float], graphs: Mapping[str, float]) -> str:
    """The card of the whole export."""
    rows = "\n".join(f"| `{name}/` | {FOLDERS[name].about} | {value:.1e} |" for name, value in differences.items())
    missing = {name: why for name, why in absent_of(subject).items() if "encoder has" not in why}
    absent = "".join(f"\nThere is no `{name}/`: {why}." for name, why in missing.items())
    onnx = "".join(
        f"\n`onnx/{name}.onnx`: the stream as a graph of ONNX opset {OPSET}, off by {difference:.0e} under onnxruntime."
        for name, difference in graphs.items()
    )
    return f"""\
{_metadata(about, "feature-extraction", subject)}
# An encoder of {", ".join(subject.modalities)}

| folder | what | largest difference from the encoder, in float64 |
| --- | --- | --- |
{rows}
{absent}{onnx}

Each folder has a card with the lines that load it; from the hub it is `from_pretrained(REPO, subfolder=...)`, but for
`joint/`: `transformers` looks for its code at the top, so take `huggingface_hub.snapshot_download(REPO)` first.
`{MANIFEST}` has the size and sha256 of every file: `python pretrain/export.py --check FOLDER` compares them.

{_origin(subject, about)}"""


def versions() -> dict[str, str]:
    """Of Python and the libraries that wrote the files."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _metadata(about: About, pipeline: str, subject: Subject) -> str:
    tags = "".join(f"\n- {tag}" for tag in ("triptych", *subject.modalities))
    return f"---\nlicense: {about.licence}\nlibrary_name: transformers\npipeline_tag: {pipeline}\ntags:{tags}\n---\n"


def _origin(subject: Subject, about: About) -> str:
    """What all cards of an export have in common."""
    config = subject.encoder.config
    parameters = sum(parameter.numel() for parameter in subject.encoder.parameters())
    data = "\n".join(f"| {key} | {value} |" for key, value in about.data.items())
    steps = "not known" if about.step is None else f"{about.step:,}"
    average = ", an average of the weights over steps" if about.averaged else ""
    results = "Not evaluated."
    if about.results is not None:
        results = f"On the test split, in per cent.\n\n```\n{table(about.results)}\n```"
    licence = (
        "Nobody has said under which licence these weights may be used; that depends on the data, too."
        if about.licence == LICENCE
        else f"Weights: {about.licence}."
    )
    if len(subject.modalities) > 1:
        licence += " The code in `joint/` is under Apache-2.0."
    return f"""\
## Intended use and limits

{USE}

## Results

{results}

## Training

Steps: {steps}{average}. Encoder: {parameters / 1e6:.2f} M parameters, width {config.width}, depth {config.depth}, \
{config.heads} heads, embeddings of {config.embed_dim}, `model.sharing={config.sharing}`. Saved in \
{str(subject.dtype).removeprefix("torch.")}. Checkpoint: `{about.checkpoint or "not known"}`.

| data | |
| --- | --- |
{data or "| not known | |"}

<details><summary>Recipe</summary>

```yaml
{about.recipe.strip() or "# not known"}
```

</details>

## Licence

{licence}

Written with {", ".join(f"{name} {number}" for name, number in versions().items())}; checkpoint schema \
{CHECKPOINT_SCHEMA}, encoder schema {ENCODER_SCHEMA}.
"""


def _results(run: Path, checkpoint: Path) -> Results | None:
    """The run's evaluation, if it is of this checkpoint's weights."""
    found = _json(run / "eval" / "results.json")
    weights = checkpoint / "encoder" / "model.safetensors"
    if found.get("schema") != RESULTS_SCHEMA or not weights.is_file():
        return None
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if found.get("about", {}).get("encoder", {}).get("sha256") != digest:
        return None
    results: Results = found["results"]
    return results


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not there or damaged: a card does without."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
