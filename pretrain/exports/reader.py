"""What a user of an export does, in a process that has transformers and nothing of this project: load and run.

    python -P pretrain/exports/reader.py TASK    # as `pretrain.exports.verify` starts it

TASK holds ``task.json`` (which folders, with which class, what to call), ``inputs.safetensors`` (raw samples, and what
the encoder reads of them, in float64) and ``texts.json``; it gets ``outputs.safetensors`` and ``report.json``.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def read(task: Path, loaders: Mapping[str, Any] | None = None) -> None:
    """Do all that ``task.json`` asks for.

    Args:
        task: the folder.
        loaders: folder's name -> a class that loads it, in the place of the one that it names.
    """
    asked = json.loads((task / "task.json").read_text())
    export = Path(asked["export"])
    tensors = load_file(task / "inputs.safetensors")
    inputs = {name.removeprefix("read."): value for name, value in tensors.items() if name.startswith("read.")}
    raw = {name.removeprefix("raw."): value for name, value in tensors.items() if name.startswith("raw.")}
    texts = json.loads((task / "texts.json").read_text())
    outputs = {f"processed|{name}": value for name, value in process(export, asked["processors"], raw, texts).items()}
    report = {}
    for name, spec in asked["folders"].items():
        loader = (loaders or {}).get(name) or getattr(transformers, spec["auto"])
        trust = {"trust_remote_code": True} if spec["auto"] == "AutoModel" and loader is transformers.AutoModel else {}
        model, info = loader.from_pretrained(export / name, output_loading_info=True, **trust)
        report[name] = {"class": type(model).__name__, **{key: sorted(map(str, info[key])) for key in KEYS}}
        # In float64 a difference is a mistake, however deep the model; in float32 it may be rounding.
        model = model.double().eval()
        for method, names in spec["calls"].items():
            with torch.inference_mode():
                got = (getattr(model, method) if method else model)(**{key: inputs[key] for key in names})
            named = {method: got} if method else {key: value for key, value in got.items() if torch.is_tensor(value)}
            outputs |= {f"{name}|{key}": value.clone().contiguous() for key, value in named.items()}
    save_file(outputs, task / "outputs.safetensors")
    (task / "report.json").write_text(json.dumps({"transformers": transformers.__version__, "folders": report}))


def process(export: Path, folders: dict[str, str], raw: dict[str, Tensor], texts: list[str]) -> dict[str, Tensor]:
    """Raw samples through the processors of the export; ``folders``: modality -> the folder that has its own."""
    made: dict[str, Tensor] = {}
    if "image" in folders:
        images = [Image.fromarray(raw[name].numpy()) for name in sorted(raw) if name.startswith("image.")]
        # Pictures are resized by Pillow, as in training; where torchvision is installed, it is what transformers takes.
        for name, choice in {"pixel_values": {"backend": "pil"}, "default_pixel_values": {}}.items():
            processor = transformers.AutoImageProcessor.from_pretrained(export / folders["image"], **choice)
            made[name] = processor(images, return_tensors="pt")["pixel_values"]
    if "text" in folders:
        tokenizer = transformers.AutoTokenizer.from_pretrained(export / folders["text"])
        options = {"padding": True, "truncation": True, "split_special_tokens": True, "return_tensors": "pt"}
        encoded = tokenizer(texts, **options)
        made |= {name: encoded[name] for name in ("input_ids", "attention_mask")}
    if "audio" in folders:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(export / folders["audio"])
        sounds = [raw[name].numpy() for name in sorted(raw) if name.startswith("audio.")]
        made["input_values"] = extractor(sounds, sampling_rate=16000, return_tensors="pt")["input_values"]
    return made


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    read(Path(sys.argv[1]))
