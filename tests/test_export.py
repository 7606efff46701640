import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import pretrain.exports.folders
from data.batch import Batch
from data.batches import Row, collate
from data.transforms import SAMPLE_RATE, ImageView, OnDevice, Views, make_field
from pretrain.export import export
from pretrain.exports.folders import FOLDERS, folders_of
from pretrain.exports.image_text import with_bias_in_pooler
from pretrain.exports.modeling_triptych import TriptychModel
from pretrain.exports.streams import save_image_processor
from pretrain.exports.subject import ExportError, Subject
from pretrain.exports.verify import PROCESSED, random_samples, verify
from pretrain.initial import load_initial
from pretrain.model.encoder import Encoder
from pretrain.stock import EMBED_PAIRS, PAIRS, Pair
from tests.exported import ALL, learned, samples, subject
from tests.tiny import MODEL, VIEWS, picture, tiny_encoder

CLASSES = {
    "image": "ViTModel",
    "text": "RobertaPreLayerNormModel",
    "audio": "ASTModel",
    "text/masked_lm": "RobertaPreLayerNormForMaskedLM",
    "embed_image": "ViTForImageClassification",
    "embed_text": "RobertaPreLayerNormForSequenceClassification",
    "embed_audio": "ASTForAudioClassification",
    "image_text": "VisionTextDualEncoderModel",
    "joint": "TriptychModel",
}
# Keeps a process from importing anything of ours, and leaves a file that says so.
BLOCKER = """
import importlib.abc, pathlib, sys

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
pathlib.Path(__file__).with_name("blocked").touch()
"""


class Exported(NamedTuple):
    subject: Subject
    out: Path
    folders: dict[str, Path]
    seen: Batch
    inputs: dict[str, dict[str, Any]]


def write(made: Subject, out: Path, **settings: Any) -> dict[str, Path]:
    return export(made.encoder, made.tokenizer, out, made.objectives, sample=samples(), **{"fresh": False, **settings})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exports of a random encoder, and what their processors make of raw inputs."""
    out = tmp_path_factory.mktemp("export")
    made, values = subject(), samples().values
    folders = write(made, out)
    rows = [Row(str(i), {name: each[i] for name, each in values.items()}) for i in range(4)]
    images = AutoImageProcessor.from_pretrained(out / "image")
    tokenizer: Any = AutoTokenizer.from_pretrained(out / "text")
    sounds: Any = AutoFeatureExtractor.from_pretrained(out / "audio")
    waves = [sound.samples.astype(np.float32) / 32768 for sound in values["audio"]]
    return Exported(
        made,
        out,
        folders,
        OnDevice(VIEWS)(collate(rows, 4, VIEWS, made.tokenizer, training=False)),
        {
            "image": dict(images([Image.fromarray(each) for each in values["image"]], return_tensors="pt")),
            "text": dict(tokenizer(values["text"], padding=True, truncation=True, return_tensors="pt")),
            "audio": dict(sounds(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt")),
        },
    )


def differences(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / "export.json").read_text())["verified"]["differences"]
    return found


def test_the_streams_come_first_and_all_folders_are_there(exported: Exported) -> None:
    assert list(exported.folders) == ALL
    assert all(folder == exported.out / name for name, folder in exported.folders.items())


def test_a_process_without_our_packages_gets_the_encoders_outputs_of_every_folder(
    tmp_path: Path, exported: Exported
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    found = verify(
        exported.subject,
        exported.out,
        folders_of(exported.subject),
        samples(),
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert (tmp_path / "blocked").exists()
    assert found.keys() == set(ALL)
    assert max(found.values()) < 1e-6


def test_a_process_that_cannot_load_the_export_is_an_error_with_its_words(tmp_path: Path, exported: Exported) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(os.write(2, b'no such luck'))")
    with pytest.raises(ExportError, match="process of its own:\nno such luck"):
        verify(exported.subject, exported.out, {}, samples(), environment={"PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize("sharing", ["ffn", "none"])
def test_every_folder_is_exact_with_weights_of_their_own(tmp_path: Path, sharing: str) -> None:
    write(subject(model=dataclasses.replace(MODEL, sharing=sharing)), tmp_path)
    found = differences(tmp_path)
    assert found.keys() == set(ALL)
    assert max(found.values()) < 1e-6


@pytest.mark.parametrize(
    ("modality", "name", "tolerance"), [("image", "pixel_values", 1e-6), ("audio", "input_values", 1e-5)]
)
def test_the_processor_makes_what_training_saw(exported: Exported, modality: str, name: str, tolerance: float) -> None:
    got, ours = exported.inputs[modality][name], exported.seen.fields[modality].x
    assert got.shape == ours.shape
    assert (got - ours).abs().max() <= tolerance
    assert all(row.std() > 0 for row in ours[:3])


def test_the_tokenizer_makes_what_training_saw(exported: Exported) -> None:
    ours = exported.seen.fields["text"]
    assert ours.valid is not None
    assert torch.equal(exported.inputs["text"]["input_ids"], ours.x)
    assert torch.equal(exported.inputs["text"]["attention_mask"].bool(), ours.valid)
    lengths = ours.valid.sum(1).tolist()
    assert lengths[0] < lengths[2] < lengths[1] <= lengths[3] == 12


@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_features_from_raw_inputs_are_the_encoders(exported: Exported, modality: str) -> None:
    encoder, field = exported.subject.encoder, exported.seen.fields[modality]
    model: Any = AutoModel.from_pretrained(exported.folders[modality])
    with torch.inference_mode():
        states = encoder.encode(modality, field)
        features = encoder.pool(modality, states)
        outputs = model(**exported.inputs[modality])
    assert (outputs.last_hidden_state - states).abs().max() <= 1e-5
    assert (outputs.pooler_output - features).abs().max() <= 1e-5
    assert (features[0] - features[1]).abs().max() > 1e-2
    assert features.abs().max() < 20  # a tolerance means something only for values of this order


LOADERS: dict[str, Any] = {
    "embed_image": AutoModelForImageClassification,
    "embed_text": AutoModelForSequenceClassification,
    "embed_audio": AutoModelForAudioClassification,
}


@pytest.mark.parametrize("name", list(LOADERS))
def test_embeddings_do_not_depend_on_padding_or_on_the_rest_of_the_batch(exported: Exported, name: str) -> None:
    modality = name.removeprefix("embed_")
    model, inputs = LOADERS[name].from_pretrained(exported.out / name), exported.inputs[modality]
    with torch.inference_mode():
        together = model(**inputs).logits
        for i in range(4):
            alone = {key: value[i : i + 1] for key, value in inputs.items()}
            if modality == "text":  # without its padding
                length = int(alone["attention_mask"].sum())
                alone = {key: value[:, :length] for key, value in alone.items()}
            torch.testing.assert_close(model(**alone).logits, together[i : i + 1], rtol=0, atol=1e-5)
    with torch.inference_mode():
        expected = exported.subject.encoder(modality, exported.seen.fields[modality])[1]
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_image_and_text_are_compared_with_the_learned_scale(exported: Exported) -> None:
    model: Any = AutoModel.from_pretrained(exported.out / "image_text")
    assert type(model).__name__ == "VisionTextDualEncoderModel"
    with torch.inference_mode():
        outputs = model(**exported.inputs["image"], **exported.inputs["text"])
        image, text = (exported.subject.encoder(name, exported.seen.fields[name])[1] for name in ("image", "text"))
    scale = exported.subject.objectives["contrastive.log_scale.image_text"].exp()
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(outputs.logits_per_image, scale * cosines, rtol=0, atol=1e-4)
    assert model.logit_scale.item() == exported.subject.objectives["contrastive.log_scale.image_text"].item()


def test_a_scale_past_its_limit_is_exported_as_the_loss_uses_it() -> None:
    made = subject()
    made = dataclasses.replace(made, objectives={"contrastive.log_scale.image_text": torch.tensor([9.0])})
    assert made.log_scale("image_text").exp().item() == pytest.approx(100)


def test_a_bias_of_the_sigmoid_loss_is_in_the_config_and_in_the_joint_model(tmp_path: Path) -> None:
    made = subject()
    objectives = learned(made.encoder, sigmoid=True)
    export(made.encoder, made.tokenizer, tmp_path, objectives, fresh=False)
    bias = objectives["contrastive.bias.image_text"].item()
    assert json.loads((tmp_path / "image_text" / "config.json").read_text())["logit_bias"] == pytest.approx(bias)
    assert f"({bias:.4f})" in (tmp_path / "image_text" / "README.md").read_text()
    joint = TriptychModel.from_pretrained(tmp_path / "joint")
    one, other = torch.randn(3, 8), torch.randn(2, 8)
    for pair in ("image_text", "text_audio"):
        scale, shift = (objectives[f"contrastive.{name}.{pair}"] for name in ("log_scale", "bias"))
        cosines = torch.nn.functional.cosine_similarity(one[:, None], other[None], dim=-1)
        torch.testing.assert_close(joint.similarity(pair, one, other), scale.exp() * cosines + shift)
    with pytest.raises(ValueError, match="video_text was not trained to be compared; trained were: image_text, "):
        joint.similarity("video_text", one, other)


@pytest.mark.parametrize("gains", ["random", "a zero", "two zeros", "negative"])
def test_an_embedding_wider_than_the_model_is_exact_too(tmp_path: Path, gains: str) -> None:
    made = subject(model=dataclasses.replace(MODEL, embed_dim=24))  # the width is 16
    gain = made.encoder.get_parameter("norm.all.weight")
    with torch.no_grad():
        if "zero" in gains:
            gain[: 1 + ("two" in gains)] = 0
        elif gains == "negative":
            gain.neg_()
    double = made.encoder.double()
    pooler, bias, projection = with_bias_in_pooler(double)
    x = torch.randn(50, 16).double()
    states = torch.nn.functional.layer_norm(x, (16,), gain, double.get_parameter("norm.all.bias"), 1e-6)
    expected = double.project("image", states)
    got = (states @ pooler.T + bias) @ projection.T
    assert pooler.abs().max() < 3  # well conditioned, whatever the gains
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    made.encoder.float()
    write(made, tmp_path)
    assert differences(tmp_path)["image_text"] < 1e-4


def test_the_language_model_head_is_the_objectives(exported: Exported) -> None:
    model: Any = AutoModelForMaskedLM.from_pretrained(exported.out / "text" / "masked_lm")
    inputs, given = exported.inputs["text"], exported.subject.objectives
    with torch.inference_mode():
        logits = model(**inputs).logits
        states = exported.subject.encoder.encode("text", exported.seen.fields["text"])
        hidden = torch.nn.functional.gelu(
            states @ given["masked_language.dense.weight"].T + given["masked_language.dense.bias"]
        )
        hidden = torch.nn.functional.layer_norm(
            hidden, (16,), given["masked_language.norm.weight"], given["masked_language.norm.bias"], 1e-6
        )
        embedding = exported.subject.encoder.get_parameter("tokenizers.text.embed.weight")
        expected = hidden @ embedding.T + given["masked_language.bias"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    stored = load_file(exported.out / "text" / "masked_lm" / "model.safetensors")
    assert "lm_head.decoder.weight" not in stored  # tied


@pytest.mark.parametrize(
    "pairs", [("image", "text"), ("image", "audio"), ("text", "audio"), ("image", "text", "audio")]
)
def test_the_joint_model_reads_any_modalities_as_the_trunk_does(exported: Exported, pairs: tuple[str, ...]) -> None:
    model, encoder = TriptychModel.from_pretrained(exported.out / "joint"), exported.subject.encoder
    inputs = {key: value for name in pairs for key, value in exported.inputs[name].items() if key != "token_type_ids"}
    with torch.inference_mode():
        got = model(**inputs)
        expected = encoder.trunk({name: encoder.tokens(name, exported.seen.fields[name]) for name in pairs})
        for name in pairs:
            torch.testing.assert_close(got[f"{name}_features"], encoder.pool(name, expected[name]), rtol=0, atol=1e-4)
    torch.testing.assert_close(got.last_hidden_state, torch.cat(list(expected.values()), 1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="at least one of pixel_values"):
        model()


@pytest.mark.parametrize("name", ALL)
def test_files_are_those_of_transformers(exported: Exported, name: str) -> None:
    read = {
        "image": {"preprocessor_config.json"},
        "text": {"tokenizer.json", "tokenizer_config.json"},
        "audio": {"preprocessor_config.json"},
    }
    beside = set().union(*(read[part] for part in ("image", "text", "audio") if part in name))
    if name == "text":
        beside |= {"modules.json", "sentence_bert_config.json"}
    if name == "joint":
        beside = {"modeling_triptych.py"}
    folder = exported.out / name
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {"config.json", "model.safetensors", "README.md"} | beside
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [CLASSES[name]]
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_the_text_folder_has_what_sentence_transformers_needs(exported: Exported) -> None:
    folder = exported.out / "text"
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense", "3_Dense", "4_Normalize"]
    assert {module["type"].rpartition(".")[0] for module in modules} == {"sentence_transformers.models"}
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_cls_token"]
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 12
    with torch.inference_mode():  # as its Transformer, Pooling, Dense, Dense and Normalize do
        x = AutoModel.from_pretrained(folder)(**exported.inputs["text"]).last_hidden_state[:, 0]
        for part in ("2_Dense", "3_Dense"):
            config = json.loads((folder / part / "config.json").read_text())
            weights = load_file(folder / part / "model.safetensors")
            x = x @ weights["linear.weight"].T + (weights["linear.bias"] if config["bias"] else 0)
            x = {"Tanh": torch.tanh, "Identity": lambda x: x}[config["activation_function"].rpartition(".")[2]](x)
        expected = exported.subject.encoder("text", exported.seen.fields["text"])[1]
    normal = torch.nn.functional.normalize
    torch.testing.assert_close(normal(x, dim=-1), normal(expected, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("image", ["embeddings.cls_token", "encoder.layer.1.attention.attention.query.weight", "pooler.dense.bias"]),
        ("text", ["embeddings.LayerNorm.weight", "encoder.layer.0.attention.self.key.bias", "pooler.dense.weight"]),
        ("audio", ["embeddings.distillation_token", "encoder.layer.0.intermediate.dense.weight", "layernorm.bias"]),
        ("embed_image", ["vit.layernorm.weight", "classifier.bias"]),
        ("embed_text", ["roberta_prelayernorm.LayerNorm.weight", "classifier.out_proj.bias"]),
        ("embed_audio", ["audio_spectrogram_transformer.layernorm.bias", "classifier.dense.weight"]),
        ("image_text", ["vision_model.pooler.dense.bias", "text_projection.weight", "logit_scale"]),
        ("joint", ["blocks.0.attention.all.qkv.weight", "heads.text.dense.bias", "log_scale.image_audio"]),
    ],
)
def test_names_on_disk_are_those_that_older_releases_know(exported: Exported, name: str, keys: list[str]) -> None:
    stored = load_file(exported.out / name / "model.safetensors")
    assert set(keys) <= stored.keys()
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())


@pytest.mark.parametrize("name", ["text", "text/masked_lm", "embed_text", "image_text"])
def test_the_tokenizer_names_a_class_that_every_release_has(exported: Exported, name: str) -> None:
    config = json.loads((exported.out / name / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 12
    assert config["add_prefix_space"] is True  # else 4.x makes other ids
    loaded = PreTrainedTokenizerFast.from_pretrained(exported.out / name)
    assert loaded("a low tone")["input_ids"] == exported.subject.tokenizer("a low tone")["input_ids"]


def test_truncation_and_padding_of_training_are_not_in_the_tokenizer(exported: Exported) -> None:
    exported.subject.tokenizer(["a", "a low tone"], padding=True, truncation=True, max_length=3)
    stored = json.loads((exported.out / "text" / "tokenizer.json").read_text())
    assert stored["truncation"] is None
    assert stored["padding"] is None


def test_a_grey_image_is_read_as_in_training(exported: Exported) -> None:
    processor = AutoImageProcessor.from_pretrained(exported.folders["image"])
    view = VIEWS.image
    assert view is not None
    grey = picture(1, np.random.default_rng(0)).convert("L")
    pixels = make_field(view, [np.asarray(grey.convert("RGB"))], exported.subject.tokenizer)
    expected = view.on_device()(pixels).x[0]
    assert (processor(grey, return_tensors="pt")["pixel_values"][0] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("side", [224, 252, 288])
def test_resizing_as_torchvision_does_is_within_what_an_export_may_differ_by(side: int) -> None:
    """It calls the same kernel of torch. At 252 and 288 some pixel of these samples is two levels off."""
    view = ImageView(size=side)
    for pixels in random_samples(Views(view, None, None)).values["image"]:
        resized = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        theirs = torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear", antialias=True)[0].permute(
            1, 2, 0
        )
        levels = (theirs.int() - torch.from_numpy(np.array(resized)).int()).abs().max()
        assert 0 < levels / 127.5 <= PROCESSED["default_pixel_values"]


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let an export have these folders alone."""
    monkeypatch.setattr(pretrain.exports.folders, "FOLDERS", {name: FOLDERS[name] for name in names})


def forget(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], modality: str, part: str) -> None:
    """Let an export leave out the tensors with ``part`` in their names."""
    pairs = table[modality]

    def others(encoder: Encoder, model: Any) -> Iterator[Pair]:
        every = list(pairs(encoder, model))
        kept = [pair for pair in every if part not in pair.name]
        assert len(kept) < len(every)
        return iter(kept)

    monkeypatch.setitem(table, modality, others)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("image", part) for part in ("positions", "prefix", "embed", "blocks.1.attention.qkv.bias.v", "fc2.weight")),
        *(
            ("text", part)
            for part in ("positions", "tokenizers.text.norm", "blocks.0.attention.norm", "heads.text.dense")
        ),
        *(("audio", part) for part in ("positions", "prefix.1", "embed.bias", "blocks.1.attention.out", "norm.weight")),
        *(("embed_image", f"heads.image.projection.{part}") for part in ("weight", "bias")),
        *(("embed_text", f"heads.text.{part}") for part in ("dense.bias", "projection.weight")),
        *(("embed_audio", f"heads.audio.{part}") for part in ("norm.bias", "projection.bias")),
    ],
)
def test_an_export_with_a_forgotten_copy_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported, name: str, part: str
) -> None:
    modality = name.removeprefix("embed_")
    forget(monkeypatch, PAIRS if name == modality else EMBED_PAIRS, modality, part)
    monkeypatch.setattr(type(VIEWS), "used", {modality: VIEWS.used[modality]})
    only(monkeypatch, modality, name)
    with pytest.raises(ExportError, match=f"saved {name} model differs by"):
        write(exported.subject, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("text/masked_lm", "masked_language.dense.bias"),
        ("text/masked_lm", "masked_language.norm.weight"),
        ("text/masked_lm", "masked_language.bias"),
        ("image_text", "contrastive.log_scale.image_text"),
    ],
)
def test_what_objectives_learned_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported, name: str, tensor: str
) -> None:
    only(monkeypatch, "image", "text", name)
    built = FOLDERS[name].build

    def wrong(given: Subject) -> Any:
        other = {**given.objectives, tensor: given.objectives[tensor] + 0.01}
        return built(dataclasses.replace(given, objectives=other))

    changed = {**pretrain.exports.folders.FOLDERS, name: FOLDERS[name]._replace(build=wrong)}
    monkeypatch.setattr(pretrain.exports.folders, "FOLDERS", changed)
    monkeypatch.setattr(type(VIEWS), "used", {key: VIEWS.used[key] for key in ("image", "text")})
    with pytest.raises(ExportError, match=f"saved {name} model differs by"):
        write(exported.subject, tmp_path)


def test_a_failed_export_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported
) -> None:
    out = tmp_path / "out"
    only(monkeypatch, "image", "text", "audio")
    write(exported.subject, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    forget(monkeypatch, PAIRS, "audio", "qkv")
    with pytest.raises(ExportError):
        write(subject(seed=1), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    made = subject()
    with torch.no_grad():
        made.encoder.get_parameter("norm.all.bias")[0] = torch.nan
    with pytest.raises(ExportError, match="nan"):
        write(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_are_missing_in_the_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported
) -> None:
    only(monkeypatch, "image", "text", "audio")
    folder = write(exported.subject, tmp_path)["image"]
    tensors = load_file(folder / "model.safetensors")
    dropped = sorted(tensors)[-1]
    del tensors[dropped]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="missing_keys"):
        verify(exported.subject, tmp_path, folders_of(exported.subject), samples(), fresh=False)


@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_a_processor_that_makes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported, modality: str
) -> None:
    only(monkeypatch, "image", "text", "audio")
    write(exported.subject, tmp_path)
    path, key, value = {
        "image": ("preprocessor_config.json", "image_std", [0.6] * 3),
        "text": ("tokenizer_config.json", "model_max_length", 9),
        "audio": ("preprocessor_config.json", "mean", -4.0),
    }[modality]
    file = tmp_path / modality / path
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ExportError, match="the exported processors make other"):
        verify(exported.subject, tmp_path, folders_of(exported.subject), samples(), fresh=False)


def test_only_what_was_trained_is_exported(tmp_path: Path, exported: Exported) -> None:
    encoder, tokenizer = exported.subject.encoder, exported.subject.tokenizer
    contrastive = {key: value for key, value in exported.subject.objectives.items() if "contrastive" in key}
    assert list(export(encoder, tokenizer, tmp_path / "a", {}, fresh=False)) == ["image", "text", "audio", "joint"]
    card = (tmp_path / "a" / "README.md").read_text()
    assert "no `text/masked_lm/`: the run had no masked-language loss" in card
    assert "no `embed_audio/`: the run had no contrastive loss" in card
    assert "the pooler is as random as it began" in (tmp_path / "a" / "text" / "README.md").read_text()
    assert not (tmp_path / "a" / "text" / "modules.json").exists()
    joint = TriptychModel.from_pretrained(tmp_path / "a" / "joint")
    with pytest.raises(ValueError, match="trained without contrast"):
        joint.get_text_features(torch.tensor([[0, 5, 2]]))
    assert set(export(encoder, tokenizer, tmp_path / "b", contrastive, fresh=False)) == set(ALL) - {"text/masked_lm"}
    assert not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        (("image",), ["image"]),
        (("text",), ["text", "text/masked_lm"]),
        (("audio",), ["audio"]),
        (("image", "audio"), ["image", "audio", "embed_image", "embed_audio", "joint"]),
        (("text", "audio"), ["text", "audio", "text/masked_lm", "embed_text", "embed_audio", "joint"]),
    ],
)
def test_only_the_modalities_of_the_encoder_are_exported(
    tmp_path: Path, exported: Exported, used: tuple[str, ...], expected: list[str]
) -> None:
    views = dataclasses.replace(VIEWS, **{name: None for name in VIEWS.used if name not in used})
    torch.manual_seed(0)
    encoder = Encoder(MODEL, views, exported.subject.encoder.vocabulary)
    keep = "contrastive" if len(used) > 1 else "nothing"
    objectives = {
        name: value
        for name, value in exported.subject.objectives.items()
        if keep in name or ("text" in used and "language" in name)
    }
    assert list(export(encoder, exported.subject.tokenizer, tmp_path, objectives, fresh=False)) == expected
    tops = {name.partition("/")[0] for name in expected}
    assert {path.name for path in tmp_path.iterdir()} == tops | {"README.md", "export.json"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["embed_text", "image"], ["image", "embed_text"]),
        (["text/masked_lm"], ["text/masked_lm"]),
        (["image_text"], ["image_text"]),
        (["joint"], ["image", "text", "audio", "joint"]),
    ],
)
def test_only_the_folders_that_are_chosen_and_what_they_need_are_exported(
    tmp_path: Path, exported: Exported, names: list[str], expected: list[str]
) -> None:
    for _ in range(2):  # the second one takes the first one's place
        assert list(write(exported.subject, tmp_path / "out", names=names)) == expected
    found = {str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.rglob("config.json")}
    assert found - {"text/1_Pooling", "text/2_Dense", "text/3_Dense"} == set(expected)
    assert list(differences(tmp_path / "out")) == expected
    assert max(differences(tmp_path / "out").values()) < 1e-6


def test_the_processors_of_chosen_folders_are_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported
) -> None:
    def wrong(_: Subject, folder: Path) -> None:
        save_image_processor(exported.subject, folder)
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_std": [0.6] * 3}))

    changed = FOLDERS["embed_image"]._replace(processors=(wrong,))
    monkeypatch.setattr(pretrain.exports.folders, "FOLDERS", {**FOLDERS, "embed_image": changed})
    monkeypatch.setitem(pretrain.exports.folders.PROCESSORS, "image", wrong)
    with pytest.raises(ExportError, match="processors make other pixel_values"):
        write(exported.subject, tmp_path / "out", names=["embed_image"])


def test_a_folder_that_there_cannot_be_is_refused(tmp_path: Path, exported: Exported) -> None:
    made = exported.subject
    with pytest.raises(ExportError, match="there can be no image_text, since the run had no contrastive loss"):
        export(made.encoder, made.tokenizer, tmp_path / "out", {}, names=["text", "image_text"], fresh=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_an_export_is_a_start_that_exports_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modality: str
) -> None:
    only(monkeypatch, "image", "text", "audio")
    made = subject(model=dataclasses.replace(MODEL, sharing="none"))
    write(made, tmp_path / "first")
    other = tiny_encoder(made.tokenizer, seed=1, model=made.encoder.config)
    load_initial(other, {modality: str(tmp_path / "first" / modality)})
    write(dataclasses.replace(made, encoder=other), tmp_path / "second")
    first, second = (load_file(tmp_path / name / modality / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert {name for name, tensor in first.items() if not torch.equal(tensor, second[name])} == set()


def test_random_samples_have_every_modality_in_different_sizes() -> None:
    values = random_samples(VIEWS).values
    assert list(values) == ["image", "text", "audio"]
    assert len({each.shape for each in values["image"]}) == len({len(each.samples) for each in values["audio"]}) == 4


def tensors_of(out: Path, name: str) -> dict[str, Tensor]:
    return load_file(out / name / "model.safetensors")


def test_weights_in_bfloat16_are_the_rounded_ones(tmp_path: Path, exported: Exported) -> None:
    write(exported.subject, tmp_path, dtype=torch.bfloat16)
    assert max(differences(tmp_path).values()) < 1e-6  # from the encoder with rounded weights
    for name in ALL:
        stored, whole = tensors_of(tmp_path, name), tensors_of(exported.out, name)
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert all(torch.equal(tensor, whole[key].bfloat16()) for key, tensor in stored.items())
    assert exported.subject.encoder.get_parameter("norm.all.bias").dtype == torch.float32
    assert "Saved in bfloat16" in (tmp_path / "README.md").read_text()
    for name in ALL:  # processors make float32
        model = next(
            line for line in (tmp_path / name / "README.md").read_text().splitlines() if line[:8] == "model = "
        )
        assert model.endswith(").float()")
        assert ".float()" not in (exported.out / name / "README.md").read_text()
