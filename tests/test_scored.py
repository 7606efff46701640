"""What can be scored: each kind gives the numbers that its own code gives, or is refused with a reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    AutoModel,
    BertConfig,
    BertModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from data.batch import Field
from data.decode import Waveform
from data.transforms import make_field
from eval.encoders import Pretrained, Raw, load_scored
from eval.scored import EncoderError, Scored
from eval.stock import Pixels, Spectrogram, Stock, Stream
from pretrain.export import export
from pretrain.model.encoder import Encoder
from tests.exported import learned
from tests.tiny import tiny_encoder, tiny_tokenizer

MEAN, STD = [0.48, 0.45, 0.4], [0.22, 0.3, 0.27]
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
TEXTS = ["a low tone", "high", "one middle tone, played on an organ"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def text_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    return {**SMALL, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "pad_token_id": 1}


def vision_processor() -> Any:
    return ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD)


def crops() -> Any:
    return CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD
    )


def save(folder: Path, model: Any, *parts: Any) -> str:
    """A model's folder; every parameter is random, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for part in (model, *parts):
        part.save_pretrained(folder)
    return str(folder)


def clip(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    config = CLIPConfig(text_config=text_config(tokenizer), vision_config=VISION, projection_dim=8)
    return save(folder, CLIPModel(config), tokenizer, crops())


def siglip(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    config = SiglipConfig(text_config={**text_config(tokenizer), "projection_size": 16}, vision_config=VISION)
    return save(folder, SiglipModel(config), tokenizer, vision_processor())


def dual(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    model: Any = VisionTextDualEncoderModel(
        vision_model=ViTModel(ViTConfig(**VISION)), text_model=BertModel(BertConfig(**text_config(tokenizer)))
    )
    return save(folder, model, tokenizer, vision_processor())


def vit(folder: Path, _: PreTrainedTokenizerBase) -> str:
    return save(folder, ViTModel(ViTConfig(**VISION, hidden_dropout_prob=0.5)), vision_processor())


def bert(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    return save(folder, BertModel(BertConfig(**text_config(tokenizer))), tokenizer)


def ast(folder: Path, _: PreTrainedTokenizerBase) -> str:
    config = ASTConfig(
        **SMALL, max_length=40, num_mel_bins=32, patch_size=8, time_stride=6, frequency_stride=6
    )  # they overlap
    return save(folder, ASTModel(config), ASTFeatureExtractor(num_mel_bins=32, max_length=40, mean=-3.0, std=2.5))


def wav2vec2(folder: Path, _: PreTrainedTokenizerBase) -> str:
    config = Wav2Vec2Config(
        **SMALL,
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(5, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return save(folder, Wav2Vec2Model(config), Wav2Vec2FeatureExtractor())


def whisper(folder: Path, _: PreTrainedTokenizerBase) -> str:
    config = WhisperConfig(
        vocab_size=20, d_model=16, num_mel_bins=8, max_source_positions=50, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    return save(folder, WhisperModel(config), WhisperFeatureExtractor(feature_size=8, chunk_length=1))


def clap(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    audio = {
        "spec_size": 32, "num_mel_bins": 8, "patch_size": 2, "patch_stride": [2, 2], "window_size": 4,
        "hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
        "num_hidden_layers": 2, "enable_fusion": True,
    }  # fmt: skip
    config = ClapConfig(audio_config=audio, text_config=text_config(tokenizer), projection_dim=8)
    extractor = ClapFeatureExtractor(feature_size=8, max_length_s=1, hop_length=480, truncation="fusion")
    return save(folder, ClapModel(config), tokenizer, extractor)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def sounds() -> list[Any]:
    return [np.random.default_rng(i).integers(-5000, 5000, 6000 + 1000 * i).astype(np.int16) for i in range(3)]


def field_of(scored: Scored, modality: str) -> Field:
    """What the loader and the device make of the picture, the texts or the sounds."""
    values: dict[str, list[Any]] = {
        "image": [np.array(picture())] * 2,
        "text": TEXTS,
        "audio": [Waveform(sound, 16000) for sound in sounds()],
    }
    view = scored.views.used[modality]
    tokenizer: Any = scored.tokenizer
    field = make_field(view, values[modality], tokenizer)
    return field if modality in scored.listens else view.on_device()(field)


def own_inputs(name: str, modality: str, model: Any) -> dict[str, Tensor]:
    """By the model's own processors."""
    if modality == "image":
        made = transformers.AutoImageProcessor.from_pretrained(name)([picture()] * 2, return_tensors="pt")
    elif modality == "text":
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if isinstance(model, SiglipModel):
            ids = tokenizer(TEXTS, padding="max_length", max_length=20, return_tensors="pt")["input_ids"]
            return {"input_ids": ids}
        made = tokenizer(TEXTS, padding=True, return_tensors="pt")
        made.pop("token_type_ids", None)
    else:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(name)
        given = [sound.astype(np.float32) / 32768 for sound in sounds()]
        made = extractor(given, sampling_rate=16000, return_tensors="pt")
    return dict(made)


@pytest.mark.parametrize("make", [clip, siglip, dual])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_dual_encoders_give_their_own_embeddings(
    make: Callable[..., str], modality: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    scored = load_scored(make(tmp_path, tokenizer))
    assert scored.modalities == ("image", "text")
    model: Any = AutoModel.from_pretrained(tmp_path).eval()
    inputs = own_inputs(str(tmp_path), modality, model)
    with torch.inference_mode():
        expected = getattr(model, f"get_{modality}_features")(**inputs).pooler_output
        part = {"image": model.vision_model, "text": model.text_model}[modality](**inputs).pooler_output
    found = scored.encode(modality, field_of(scored, modality))
    assert found.embeddings is not None
    assert (found.embeddings - expected).abs().max() < 1e-5
    assert (found.features[-1, "default"] - part).abs().max() < 1e-5
    embedded = scored.embed(modality, field_of(scored, modality))
    assert embedded is not None
    assert torch.equal(embedded, found.embeddings)


@pytest.mark.parametrize(("make", "modality"), [(vit, "image"), (bert, "text"), (ast, "audio")])
def test_layers_and_poolings_are_those_of_the_model(
    make: Callable[..., str], modality: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    scored = load_scored(make(tmp_path, tokenizer))
    model = AutoModel.from_pretrained(tmp_path).eval()
    inputs = own_inputs(str(tmp_path), modality, model)
    with torch.inference_mode():
        outputs = model(**inputs, output_hidden_states=True)
    prefix = {"image": 1, "text": 0, "audio": 2}[modality]
    mask = inputs.get("attention_mask", torch.ones(outputs.last_hidden_state.shape[:2], dtype=torch.int64)).clone()
    mask[:, :prefix] = 0
    assert outputs.last_hidden_state.shape[1] == {"image": 5, "text": mask.shape[1], "audio": 2 + 5 * 6}[modality]
    field = field_of(scored, modality)
    found = scored.encode(modality, field, (0, 1, 2, -1), ("cls", "mean"))
    assert found.embeddings is None
    for layer, states in {**dict(enumerate(outputs.hidden_states[:2])), 2: outputs.last_hidden_state}.items():
        assert (found.features[layer, "cls"] - states[:, 0]).abs().max() < 1e-5
        for i in range(len(states)):
            mean = states[i][mask[i].bool()].mean(0)
            assert (found.features[layer, "mean"][i] - mean).abs().max() < 1e-5
    assert torch.equal(found.features[-1, "mean"], found.features[2, "mean"])
    assert (scored.encode(modality, field).features[-1, "default"] - outputs.pooler_output).abs().max() < 1e-5


@pytest.mark.parametrize(("make", "frames"), [(wav2vec2, None), (whisper, 50)])
def test_sounds_go_through_the_models_own_extractor(
    make: Callable[..., str], frames: int | None, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    scored = load_scored(make(tmp_path, tokenizer))
    assert scored.modalities == ("audio",)
    model: Any = AutoModel.from_pretrained(tmp_path).eval()
    model = model if frames is None else model.get_encoder()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    found = scored.encode("audio", field_of(scored, "audio"))
    for i, sound in enumerate(sounds()):  # one by one: none is padded by another
        inputs = extractor(sound.astype(np.float32) / 32768, sampling_rate=16000, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state
        assert frames is None or states.shape[1] == frames
        assert (found.features[-1, "default"][i] - states.mean(1)[0]).abs().max() < 1e-5


def test_clap_hears_the_same_each_time(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    scored = load_scored(clap(tmp_path, tokenizer))
    assert scored.modalities == ("text", "audio")
    field = field_of(scored, "audio")
    first = scored.encode("audio", field)
    assert first.embeddings is not None
    assert first.embeddings.shape == (3, 8)
    np.random.seed(3)  # noqa: NPY002 (its extractor draws from it)
    for _ in range(3):
        again = scored.encode("audio", field).embeddings
        assert again is not None
        assert torch.equal(again, first.embeddings)
    alone = scored.encode("audio", field.select(torch.tensor([1]))).embeddings
    assert alone is not None
    assert (alone[0] - first.embeddings[1]).abs().max() < 1e-5
    text = scored.embed("text", field_of(scored, "text"))
    assert text is not None
    assert text.shape == (3, 8)


@pytest.mark.parametrize(
    "settings",
    [{}, {"image_mean": MEAN, "image_std": STD}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}],
)
def test_pixels_are_those_of_the_image_processor(settings: dict[str, Any], tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, **settings)
    processor.save_pretrained(tmp_path)
    reader = Pixels(str(tmp_path))
    field = make_field(reader.view, [np.array(picture())], None)  # type: ignore[arg-type]
    found = reader.inputs(reader.view.on_device()(field))["pixel_values"]
    assert (found - processor([picture()], return_tensors="pt")["pixel_values"]).abs().max() < 1e-5


@pytest.mark.parametrize("normalized", [True, False])
def test_spectrograms_are_those_of_the_extractor(normalized: bool) -> None:
    extractor = ASTFeatureExtractor(num_mel_bins=32, max_length=40, mean=-3.0, std=2.5, do_normalize=normalized)
    reader = Spectrogram(extractor)
    field = make_field(reader.view, [Waveform(sound, 16000) for sound in sounds()], None)  # type: ignore[arg-type]
    found = reader.inputs(reader.view.on_device()(field))["input_values"]
    expected = extractor([s.astype(np.float32) / 32768 for s in sounds()], sampling_rate=16000, return_tensors="pt")
    assert (found - expected["input_values"]).abs().max() < 1e-3  # theirs is in float32
    assert (found - expected["input_values"]).abs().mean() < 1e-5


def test_a_convolutional_network_has_maps_for_tokens_and_no_class_token(tmp_path: Path) -> None:
    save(
        tmp_path,
        ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], patch_size=2)),
        vision_processor(),
    )
    scored = load_scored(str(tmp_path))
    field = field_of(scored, "image")
    model = AutoModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        outputs = model(**own_inputs(str(tmp_path), "image", model), output_hidden_states=True)
    found = scored.encode("image", field, (1, -1), ("mean",)).features
    assert (found[1, "mean"] - outputs.hidden_states[1].mean((2, 3))).abs().max() < 1e-5
    assert (scored.encode("image", field).features[-1, "default"] - outputs.pooler_output).abs().max() < 1e-5
    with pytest.raises(EncoderError, match="has no class token; allowed poolings are default and mean"):
        scored.encode("image", field, (-1,), ("cls",))


def test_a_masked_autoencoder_sees_all_patches(tmp_path: Path) -> None:
    save(tmp_path, ViTMAEModel(ViTMAEConfig(**VISION, mask_ratio=0.75)), vision_processor())
    scored = load_scored(str(tmp_path))
    field = field_of(scored, "image")
    a, b = (scored.encode("image", field, (-1,), ("cls", "mean")).features for _ in range(2))
    assert all((a[key] - b[key]).abs().max() < 1e-5 for key in a)


def test_our_layers_and_poolings(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = tiny_encoder(tokenizer)
    scored = Pretrained("tiny", encoder, tokenizer)
    for modality, prefix in (("image", 1), ("text", 0), ("audio", 2)):
        field = field_of(scored, modality)
        with torch.inference_mode():
            x, valid = encoder.tokens(modality, field)
            states = [x, *(x := block(x, valid, {modality: x.shape[1]}) for block in encoder.blocks)]
            states[-1] = encoder.encode(modality, field)
            features, embeddings = encoder(modality, field)
        found = scored.encode(modality, field, (0, 1, 2), ("cls", "mean"))
        for layer, expected in enumerate(states):
            assert (found.features[layer, "cls"] - expected[:, 0]).abs().max() < 1e-5
            for i in range(len(expected)):
                chosen = expected[i, prefix:] if valid is None else expected[i][valid[i]]
                assert (found.features[layer, "mean"][i] - chosen.mean(0)).abs().max() < 1e-5
        for layers, poolings in (((-1,), ("default",)), ((-1, 2), ("mean", "default"))):
            both = scored.encode(modality, field, layers, poolings)
            assert all((both.features[layer, "default"] - features).abs().max() < 1e-5 for layer in layers)
            assert both.embeddings is not None
            assert (both.embeddings - embeddings).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("layers", "poolings", "words"),
    [
        ((3,), ("cls",), "has no layer 3; allowed is 0 to 2, or -3 to -1"),
        ((-4,), ("mean",), "has no layer -4"),
        ((1,), ("default",), "pooling=default is that of the last layer; of layer 1 cls and mean"),
        ((-1,), ("max",), "pooling=max: allowed are default, cls, mean"),
    ],
)
def test_layers_and_poolings_that_are_not_there(
    layers: tuple[int], poolings: tuple[str], words: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for scored in (Pretrained("tiny", tiny_encoder(tokenizer), tokenizer), load_scored(vit(tmp_path, tokenizer))):
        with pytest.raises(EncoderError, match=words):
            scored.encode("image", field_of(scored, "image"), layers, poolings)
    with pytest.raises(EncoderError, match="reads no audio; allowed are image"):
        scored.encode("audio", field_of(scored, "image"))


@pytest.fixture(scope="module")
def encoders(tokenizer: PreTrainedTokenizerBase) -> dict[int, Encoder]:
    """By the number of their checkpoint."""
    return {number: tiny_encoder(tokenizer, seed=number) for number in (1, 2)}


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, encoders: dict[int, Encoder], tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A run's folder with two checkpoints, and an export in it. Only read by tests."""
    folder = tmp_path_factory.mktemp("run")
    for number, encoder in encoders.items():
        place = folder / "checkpoints" / f"step-0000000{number}" / "encoder"
        place.mkdir(parents=True)
        encoder.save(place)
        tokenizer.save_pretrained(place / "tokenizer")
    export(encoders[2], tokenizer, folder / "export", learned(encoders[2]), fresh=False)
    return folder


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("", 2),
        ("checkpoints/step-00000001", 1),
        ("checkpoints/step-00000001/encoder", 1),
        ("export", 2),
        ("export/image", 2),
        ("export/text", 2),
        ("export/audio", 2),
    ],
)
def test_runs_checkpoints_and_exports(
    run: Path,
    place: str,
    number: int,
    encoders: dict[int, Encoder],
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scored = load_scored(str(run / place))
    printed = capsys.readouterr().out
    assert str(run / place) in printed
    counts = [line.partition("loaded ")[2].split()[0].split("/") for line in printed.splitlines()]
    assert all(int(here) == int(there) > 20 for here, there in counts)
    part = place.removeprefix("export/")
    assert scored.modalities == ((part,) if part in ("image", "text", "audio") else ("image", "text", "audio"))
    ours = Pretrained("ours", encoders[number], tokenizer)
    for modality in scored.modalities:
        found = scored.encode(modality, field_of(scored, modality), (-1,), ("default", "cls", "mean"))
        expected = ours.encode(modality, field_of(ours, modality), (-1,), ("default", "cls", "mean"))
        for key, features in expected.features.items():
            assert (found.features[key] - features).abs().max() < 1e-4
        if place.startswith("export/"):
            assert found.embeddings is None
        else:
            assert found.embeddings is not None
            assert expected.embeddings is not None
            assert (found.embeddings - expected.embeddings).abs().max() < 1e-4
    if place == "export":  # all that it is made of is random, too, and is not the same
        twin = scored.random()
        field = field_of(scored, "image")
        one, other = (each.embed("image", field) for each in (scored, twin))
        assert one is not None
        assert other is not None
        assert one.shape == other.shape
        assert (one - other).abs().max() > 0.01


def test_last_comes_before_the_newest(
    run: Path, tmp_path: Path, encoders: dict[int, Encoder], tokenizer: PreTrainedTokenizerBase
) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "last").symlink_to("step-00000001")
    expected = Pretrained("", encoders[1], tokenizer).fingerprint
    assert load_scored(str(tmp_path)).fingerprint == expected
    assert load_scored(str(tmp_path / "checkpoints" / "last")).fingerprint == expected


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_missing_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    name = vit(tmp_path / "vit", tokenizer)
    total = len(AutoModel.from_pretrained(name).state_dict())
    change_weights(Path(name), lambda weights: weights.pop("layernorm.bias"))
    with pytest.raises(EncoderError, match=rf"vit: loaded {total - 1}/{total} tensors:\n  layernorm.bias: missing"):
        load_scored(name)
    shutil.copytree(run / "checkpoints" / "step-00000001", tmp_path / "step")
    change_weights(tmp_path / "step" / "encoder", lambda weights: weights.pop("norm.all.bias"))
    with pytest.raises(EncoderError, match=r'Missing key\(s\) in state_dict: "norm.all.bias"'):
        load_scored(str(tmp_path / "step"))


def test_weights_of_another_shape_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    name = vit(tmp_path, tokenizer)
    change_weights(tmp_path, lambda weights: weights.update({"layernorm.bias": torch.zeros(7)}))
    with pytest.raises(EncoderError, match=r"layernorm.bias: \(7,\) there, \(16,\) needed"):
        load_scored(name)


def test_a_pooler_that_was_never_saved_is_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    name = vit(tmp_path, tokenizer)
    change_weights(tmp_path, lambda w: [w.pop(key) for key in list(w) if key.startswith("pooler.")])
    scored = load_scored(name)
    assert "has no pooler" in capsys.readouterr().out
    for each in (scored, scored.random()):
        found = each.encode("image", field_of(each, "image"), (-1,), ("default", "cls")).features
        assert torch.equal(found[-1, "default"], found[-1, "cls"])


def test_pickled_weights_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    name = vit(tmp_path, tokenizer)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="a model in safetensors can't be loaded"):
        load_scored(name)


def test_code_beside_a_model_is_not_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    vit(tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(EncoderError, match="trust_remote_code"):
        load_scored(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["truncated", "no weights", "no processor", "no json"])
def test_damaged_models_are_refused(damage: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    vit(tmp_path, tokenizer)
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no processor":
        (tmp_path / "preprocessor_config.json").unlink()
    else:
        (tmp_path / "config.json").write_text("{")
    with pytest.raises(EncoderError, match=str(tmp_path)):
        load_scored(str(tmp_path))


@pytest.mark.parametrize("prefix", ["", "random:", "raw:"])
def test_what_is_nothing_is_refused(prefix: str, tmp_path: Path) -> None:
    for name in (str(tmp_path), str(tmp_path / "nothing"), "runs/digits/nothing"):
        with pytest.raises(EncoderError, match=f"{name}: neither a run"):
            load_scored(f"{prefix}{name}")


@pytest.mark.parametrize("make", [vit, clip, bert])
def test_random_weights_are_always_the_same_and_disturb_nothing(
    make: Callable[..., str], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    name = make(tmp_path, tokenizer)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    scored, a = load_scored(name), load_scored(f"random:{name}")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    b = scored.random()
    assert a.name == b.name == f"random:{name}"
    assert a.fingerprint == b.fingerprint != scored.fingerprint
    assert a.reading == scored.reading
    modality = scored.modalities[0]
    field = field_of(scored, modality)
    one, other, trained = (each.encode(modality, field).features[-1, "default"] for each in (a, b, scored))
    assert torch.equal(one, other)
    assert one.shape == trained.shape
    assert (one - trained).abs().max() > 0.01


def test_raw_inputs(run: Path) -> None:
    raw = load_scored(f"raw:{run}")
    assert isinstance(raw, Raw)
    field = field_of(raw, "image")
    assert torch.equal(raw.encode("image", field).features[-1, "default"], field.x.flatten(1))
    assert raw.embed("image", field) is None
    with pytest.raises(EncoderError, match="inputs have no weights"):
        load_scored(f"random:raw:{run}")
    bytes_alone = load_scored("raw:")
    counts = bytes_alone.encode("text", field_of(bytes_alone, "text")).features[-1, "default"]
    assert counts.sum(1).tolist() == [len(text) + 3 for text in TEXTS]  # a space before, and both ends


def test_evaluation_mode_without_gradients_whatever_was_before(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    scored = load_scored(vit(tmp_path, tokenizer))
    assert isinstance(scored, Stock)
    field = field_of(scored, "image")
    expected = scored.encode("image", field).features[-1, "default"]
    scored.streams["image"].model.train()  # it has dropout
    found = scored.encode("image", field).features[-1, "default"]
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_half_precision_files_are_computed_in_float32(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    name = vit(tmp_path, tokenizer)
    AutoModel.from_pretrained(name).to(torch.bfloat16).save_pretrained(name)
    scored = load_scored(name)
    assert isinstance(scored, Stock)
    assert {p.dtype for p in scored.streams["image"].model.parameters()} == {torch.float32}


def test_fingerprints_tell_apart_all_that_features_depend_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    name = vit(tmp_path, tokenizer)
    prints = {"before": load_scored(name).fingerprint}
    assert load_scored(name).fingerprint == prints["before"]
    vision_processor().save_pretrained(tmp_path)
    assert load_scored(name).fingerprint == prints["before"]
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    prints["normalisation"] = load_scored(name).fingerprint
    change_weights(tmp_path, lambda weights: weights["layernorm.bias"][:1].add_(1e-6))
    prints["weights"] = load_scored(name).fingerprint
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    prints["config"] = load_scored(name).fingerprint
    assert len(set(prints.values())) == len(prints)


def test_the_tokenizer_is_part_of_the_fingerprint_and_its_last_call_is_not(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = tiny_encoder(tokenizer)
    before = Pretrained("a", encoder, tokenizer).fingerprint
    tokenizer(["a b c"], padding=True, truncation=True, max_length=4)
    assert Pretrained("b", encoder, tokenizer).fingerprint == before
    other = tiny_tokenizer()
    other.add_tokens(["organ"])
    assert Pretrained("a", encoder, other).fingerprint != before


def test_models_that_read_neither_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = transformers.TimeSeriesTransformerConfig(
        prediction_length=4, encoder_layers=1, decoder_layers=1, d_model=8
    )
    name = save(tmp_path, transformers.TimeSeriesTransformerModel(config))
    with pytest.raises(EncoderError, match="TimeSeriesTransformerModel reads past_values; models of pixel_values"):
        load_scored(name)


@pytest.mark.parametrize("make", [bert, clip])
def test_a_tokenizer_that_is_missing_is_no_tokenizer_of_special_tokens(
    make: Callable[..., str], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    name = make(tmp_path, tokenizer)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(EncoderError, match=r"its tokenizer has no words: tokenizer\.json"):
        load_scored(name)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "x"), ("patch_size", 0)])
def test_a_config_that_makes_no_model_is_named(
    key: str, value: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    name = vit(tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(EncoderError, match=f"{tmp_path}: a model in safetensors can't be loaded"):
        load_scored(name)


def test_an_image_processor_without_numbers_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    name = vit(tmp_path, tokenizer)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": "x"}))
    with pytest.raises(EncoderError, match="its image processor's mean or standard deviation"):
        load_scored(name)


def test_an_export_with_the_wrong_model_in_a_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    vit(tmp_path / "audio", tokenizer)
    with pytest.raises(EncoderError, match="a model that reads image; one of audio is needed"):
        load_scored(str(tmp_path))


def test_positions_of_roberta_begin_behind_the_padding(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = transformers.RobertaConfig(**text_config(tokenizer))
    scored = load_scored(save(tmp_path, transformers.RobertaModel(config), tokenizer))
    assert scored.views.text is not None
    assert scored.views.text.max_tokens == 18
    text: Any = scored.tokenizer
    long = make_field(scored.views.text, ["one low tone " * 20], text)
    assert scored.encode("text", long).features[-1, "default"].isfinite().all()


def test_streams_that_share_a_model_share_it_on_the_device_and_at_random(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    scored = load_scored(clip(tmp_path, tokenizer))
    for each in (scored, scored.random()):
        assert isinstance(each, Stock)
        streams: list[Stream] = list(each.streams.values())
        assert streams[0].model is streams[1].model
