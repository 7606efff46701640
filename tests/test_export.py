import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import pretrain.export
from data.batch import Batch
from data.batches import Row, collate
from data.decode import Waveform
from data.transforms import SAMPLE_RATE, OnDevice, make_field
from pretrain.export import ExportError, export, main, verify
from pretrain.model.encoder import Encoder
from pretrain.stock import PAIRS, Pair
from tests.tiny import MODEL, VIEWS, picture, tiny_encoder, tiny_tokenizer, tone

TEXTS = ["high", "one middle tone, played on an organ", "  a low tone ", "größer than\nthe vocabulary knows, and cut"]

# What a user does who has the three folders and transformers, and nothing of ours.
READER = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pretrain", "objectives", "data", "eval", "tests"):
            raise ModuleNotFoundError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
for name in ("pretrain", "objectives", "data", "eval", "pretrain.model.encoder"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(name + " can be imported")

from pathlib import Path
import numpy as np, torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer

export, raw = Path(sys.argv[1]), Path(sys.argv[2])
images = [Image.open(path) for path in sorted(raw.glob("*.png"))]
texts = json.loads((raw / "texts.json").read_text())
sounds = [np.load(path) for path in sorted(raw.glob("*.npy"))]
inputs = {
    "image": AutoImageProcessor.from_pretrained(export / "image")(images, return_tensors="pt"),
    "text": AutoTokenizer.from_pretrained(export / "text")(texts, padding=True, truncation=True, return_tensors="pt"),
    "audio": AutoFeatureExtractor.from_pretrained(export / "audio")(sounds, sampling_rate=16000, return_tensors="pt"),
}
report, tensors = {}, {}
for name, given in inputs.items():
    model, info = AutoModel.from_pretrained(export / name, output_loading_info=True)
    report[name] = {
        "class": type(model).__name__,
        **{key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
    }
    with torch.inference_mode():
        outputs = model(**given)
    tensors |= {f"{name}.input.{key}": value.clone() for key, value in given.items()}
    tensors |= {f"{name}.{key}": outputs[key].clone() for key in ("last_hidden_state", "pooler_output")}
save_file(tensors, raw / "outputs.safetensors")
(raw / "report.json").write_text(json.dumps(report))
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("pretrain", "objectives", "data", "eval")))
"""


class Exported(NamedTuple):
    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    folders: dict[str, Path]
    seen: Batch
    outputs: dict[str, Tensor]
    report: dict[str, Any]


def views_of(pictures: list[Image.Image], sounds: list[Any], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Raw values through our own deterministic views."""
    raw = [
        {
            "image": np.asarray(image),
            "text": text.strip(),
            "audio": Waveform(sound.astype(np.float32) / 32768, SAMPLE_RATE),
        }
        for image, text, sound in zip(pictures, TEXTS, sounds, strict=True)
    ]
    rows = [Row(str(i), values) for i, values in enumerate(raw)]
    batch: Batch = OnDevice(VIEWS)(collate(rows, len(rows), VIEWS, tokenizer, training=False))
    return batch


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exports of a random encoder, and what a process without our packages makes of raw inputs with them."""
    out = tmp_path_factory.mktemp("export")
    raw = tmp_path_factory.mktemp("raw")
    tokenizer = tiny_tokenizer()
    encoder = tiny_encoder(tokenizer)
    folders = export(encoder, tokenizer, out)

    random = np.random.default_rng(0)
    pictures = [picture(label % 3, random) for label in range(3)] + [Image.new("RGB", (50, 7), "#80ff00")]
    # The view has 5360 samples: shorter ones are padded, the last one is cut.
    sounds = [tone(label % 3, random, SAMPLE_RATE, seconds) for label, seconds in enumerate((0.1, 0.25, 0.335, 0.6))]
    for i, (image, sound) in enumerate(zip(pictures, sounds, strict=True)):
        image.save(raw / f"{i}.png")
        np.save(raw / f"{i}.npy", sound.astype(np.float32) / 32768)
    (raw / "texts.json").write_text(json.dumps([text.strip() for text in TEXTS]))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(out), str(raw)],
        check=False,
        capture_output=True,
        text=True,
        cwd=raw,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    return Exported(
        encoder,
        tokenizer,
        folders,
        views_of(pictures, sounds, tokenizer),
        load_file(raw / "outputs.safetensors"),
        json.loads((raw / "report.json").read_text()),
    )


def test_every_modality_loads_whole_without_our_packages(exported: Exported) -> None:
    classes = {"image": "ViTModel", "text": "RobertaPreLayerNormModel", "audio": "ASTModel"}
    assert exported.report == {
        name: {"class": cls, "missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        for name, cls in classes.items()
    }
    assert {name: folder.name for name, folder in exported.folders.items()} == {name: name for name in classes}


@pytest.mark.parametrize(
    ("modality", "name", "tolerance"), [("image", "pixel_values", 1e-6), ("audio", "input_values", 1e-5)]
)
def test_the_processor_makes_what_training_saw(exported: Exported, modality: str, name: str, tolerance: float) -> None:
    got, ours = exported.outputs[f"{modality}.input.{name}"], exported.seen.fields[modality].x
    assert got.shape == ours.shape
    assert (got - ours).abs().max() <= tolerance
    assert all(row.std() > 0 for row in ours[:3])


def test_the_tokenizer_makes_what_training_saw(exported: Exported) -> None:
    ours = exported.seen.fields["text"]
    assert ours.valid is not None
    assert torch.equal(exported.outputs["text.input.input_ids"], ours.x)
    assert torch.equal(exported.outputs["text.input.attention_mask"].bool(), ours.valid)
    lengths = ours.valid.sum(1).tolist()
    assert lengths[0] < lengths[2] < lengths[1] <= lengths[3] == 12


@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_features_from_raw_inputs_are_the_encoders(exported: Exported, modality: str) -> None:
    field = exported.seen.fields[modality]
    with torch.inference_mode():
        states = exported.encoder.encode(modality, field)
        features = exported.encoder.pool(modality, states)
    valid = torch.ones(states.shape[:2], dtype=torch.bool) if field.valid is None else field.valid
    assert bool(valid.all()) == (modality != "text")
    assert (exported.outputs[f"{modality}.last_hidden_state"] - states)[valid].abs().max() <= 1e-5
    assert (exported.outputs[f"{modality}.pooler_output"] - features).abs().max() <= 1e-5
    assert (features[0] - features[1]).abs().max() > 1e-2
    assert features.abs().max() < 20  # a tolerance means something only for values of this order


@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_files_are_those_of_transformers(exported: Exported, modality: str) -> None:
    beside = {
        "image": {"preprocessor_config.json"},
        "text": {"tokenizer.json", "tokenizer_config.json"},
        "audio": {"preprocessor_config.json"},
    }
    names = {path.name for path in exported.folders[modality].iterdir()}
    assert names == {"config.json", "model.safetensors"} | beside[modality]
    config = json.loads((exported.folders[modality] / "config.json").read_text())
    assert config["architectures"] == [exported.report[modality]["class"]]


def test_the_tokenizer_names_a_class_that_every_release_has(exported: Exported) -> None:
    config = json.loads((exported.folders["text"] / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 12
    loaded = PreTrainedTokenizerFast.from_pretrained(exported.folders["text"])
    assert loaded("a low tone")["input_ids"] == exported.tokenizer("a low tone")["input_ids"]


def test_truncation_and_padding_of_training_are_not_in_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer(["a", "a low tone"], padding=True, truncation=True, max_length=3)
    folder = export(tiny_encoder(tokenizer), tokenizer, tmp_path)["text"]
    stored = json.loads((folder / "tokenizer.json").read_text())
    assert stored["truncation"] is None
    assert stored["padding"] is None


def test_a_grey_image_is_read_as_in_training(exported: Exported) -> None:
    processor = AutoImageProcessor.from_pretrained(exported.folders["image"])
    view = VIEWS.image
    assert view is not None
    grey = picture(1, np.random.default_rng(0)).convert("L")
    pixels = make_field(view, [np.asarray(grey.convert("RGB"))], exported.tokenizer)
    expected = view.on_device()(pixels).x[0]
    assert (processor(grey, return_tensors="pt")["pixel_values"][0] - expected).abs().max() <= 1e-6


def forget(monkeypatch: pytest.MonkeyPatch, modality: str, part: str) -> None:
    """Let an export leave out the tensors with ``part`` in their names."""
    pairs = PAIRS[modality]

    def others(encoder: Encoder, model: Any) -> list[Pair]:
        every = list(pairs(encoder, model))
        kept = [pair for pair in every if part not in pair.name]
        assert len(kept) < len(every)
        return kept

    monkeypatch.setitem(PAIRS, modality, others)


@pytest.mark.parametrize(
    ("modality", "part"),
    [
        *(("image", part) for part in ("positions", "prefix", "embed", "blocks.1.attention.qkv.bias.v", "fc2.weight")),
        *(
            ("text", part)
            for part in ("positions", "tokenizers.text.norm", "blocks.0.attention.norm", "heads.text.dense")
        ),
        *(("audio", part) for part in ("positions", "prefix.1", "embed.bias", "blocks.1.attention.out", "norm.weight")),
    ],
)
def test_an_export_with_a_forgotten_copy_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported, modality: str, part: str
) -> None:
    forget(monkeypatch, modality, part)
    monkeypatch.setattr(pretrain.export, "EXPORTS", {modality: pretrain.export.EXPORTS[modality]})
    monkeypatch.setattr(type(VIEWS), "used", {modality: VIEWS.used[modality]})
    with pytest.raises(ExportError, match=f"{modality} model differs by"):
        export(exported.encoder, exported.tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sharing", ["ffn", "none"])
def test_weights_of_their_own_are_exported(tmp_path: Path, exported: Exported, sharing: str) -> None:
    encoder = tiny_encoder(exported.tokenizer, model=dataclasses.replace(MODEL, sharing=sharing))
    assert set(export(encoder, exported.tokenizer, tmp_path)) == {"image", "text", "audio"}  # each was compared


def test_a_failed_export_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported
) -> None:
    export(exported.encoder, exported.tokenizer, tmp_path)
    before = (tmp_path / "image" / "model.safetensors").read_bytes()
    forget(monkeypatch, "image", "qkv")
    with pytest.raises(ExportError):
        export(tiny_encoder(exported.tokenizer, seed=1), exported.tokenizer, tmp_path)
    assert (tmp_path / "image" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "image", "text"]


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, exported: Exported) -> None:
    encoder = tiny_encoder(exported.tokenizer)
    with torch.no_grad():
        encoder.get_parameter("norm.all.bias")[0] = torch.nan
    with pytest.raises(ExportError, match="nan"):
        export(encoder, exported.tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_are_missing_in_the_file_are_refused(tmp_path: Path, exported: Exported) -> None:
    folder = export(exported.encoder, exported.tokenizer, tmp_path)["image"]
    tensors = load_file(folder / "model.safetensors")
    dropped = sorted(tensors)[-1]
    del tensors[dropped]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="missing_keys"):
        verify(exported.encoder, "image", folder)


def test_an_export_replaces_the_earlier_one(tmp_path: Path, exported: Exported) -> None:
    for modality in ("image", "text", "audio"):
        (tmp_path / modality).mkdir()
        for name in ("config.json", "model.safetensors", "stale.txt"):
            (tmp_path / modality / name).write_text("of an earlier export")
        (tmp_path / f".{modality}.partial").mkdir()
        (tmp_path / f".{modality}.partial" / "config.json").write_text("of an export that was killed")
    other = tiny_encoder(exported.tokenizer, seed=1)
    for name, folder in export(other, exported.tokenizer, tmp_path).items():
        assert {path.name for path in folder.iterdir()} == {path.name for path in exported.folders[name].iterdir()}
        verify(other, name, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "image", "text"]


def test_files_that_are_no_export_are_not_touched(tmp_path: Path, exported: Exported) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "cat.jpg").write_text("a cat")
    with pytest.raises(ExportError, match="no export"):
        export(exported.encoder, exported.tokenizer, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["image", "cat.jpg"]


def test_only_the_modalities_of_the_encoder_are_exported(tmp_path: Path, exported: Exported) -> None:
    views = type(VIEWS)(image=VIEWS.image, text=None, audio=None)
    encoder = Encoder(MODEL, views, exported.encoder.vocabulary)
    assert list(export(encoder, exported.tokenizer, tmp_path)) == ["image"]
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_the_command_line_exports_a_checkpoint(
    tmp_path: Path, exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "last" / "encoder"
    folder.mkdir(parents=True)
    exported.encoder.save(folder)
    exported.tokenizer.save_pretrained(folder / "tokenizer")
    assert main([str(tmp_path / "last"), str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "audio") in capsys.readouterr().out
    verify(exported.encoder, "audio", tmp_path / "out" / "audio")


def test_the_command_line_says_which_checkpoint_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
