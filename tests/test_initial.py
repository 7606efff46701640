"""Starting from stock models: the streams then compute what the stock models compute."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    ASTConfig,
    ASTModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from data.batch import Field
from data.transforms import AudioView, ImageView, Views
from pretrain.initial import InitialError, load_initial, resize_grid
from pretrain.model.encoder import Encoder
from tests.samples import MODEL, VIEWS, VOCABULARY, encoder, images, spectrograms, texts

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-6,
}
OWN = dataclasses.replace(MODEL, sharing="none")


def stock(modality: str, **other: Any) -> Any:
    torch.manual_seed(1)
    made: Any
    if modality == "image":
        made = ViTModel(ViTConfig(**{**SIZES, "image_size": 16, "patch_size": 4, **other}))
    elif modality == "audio":
        shape = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}
        made = ASTModel(ASTConfig(**{**SIZES, **shape, **other}))
    else:
        shape = {"vocab_size": VOCABULARY.size, "max_position_embeddings": 100, "pad_token_id": VOCABULARY.pad_id}
        made = RobertaPreLayerNormModel(RobertaPreLayerNormConfig(**{**SIZES, **shape, **other}))
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made.eval()


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def states(model: Any, modality: str) -> tuple[Tensor, Field, Tensor]:
    """States of a stock model, the same input for us, and the pooler's output."""
    if modality == "text":
        ids, valid = texts([7, 7])
        out = model(input_ids=ids)
        return out.last_hidden_state, Field(ids, torch.arange(2), valid), out.pooler_output
    x = {"image": images, "audio": spectrograms}[modality](2)
    out = model(x)
    return out.last_hidden_state, Field(x, torch.arange(2)), out.pooler_output


@pytest.mark.parametrize("sharing", ["all", "none"])
@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_a_stream_that_starts_from_a_stock_model_gives_its_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], modality: str, sharing: str
) -> None:
    ours, theirs = encoder(model=dataclasses.replace(MODEL, sharing=sharing)), stock(modality)
    load_initial(ours, {modality: saved(theirs, tmp_path)})
    expected, field, pooled = states(theirs, modality)
    got = ours.encode(modality, field)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    if modality != "image":  # ViT's pooler is of no use to us
        torch.testing.assert_close(ours.pool(modality, got), pooled, rtol=0, atol=1e-5)
    said = capsys.readouterr().out
    assert f"{modality} from {tmp_path}: loaded " in said
    loaded, _, of = said.split("loaded ")[1].split()[0].partition("/")
    assert loaded == of


def test_each_modality_starts_from_its_own(tmp_path: Path) -> None:
    ours = encoder(model=OWN)
    theirs = {modality: stock(modality) for modality in ("image", "text", "audio")}
    load_initial(ours, {modality: saved(model, tmp_path / modality) for modality, model in theirs.items()})
    for modality, model in theirs.items():
        expected, field, _ = states(model, modality)
        torch.testing.assert_close(ours.encode(modality, field), expected, rtol=0, atol=1e-5)


def test_a_model_with_a_head_gives_its_trunk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier: Any = ViTForImageClassification(ViTConfig(**{**SIZES, "image_size": 16, "patch_size": 4})).eval()
    ours, x = encoder(), images(2)
    load_initial(ours, {"image": saved(classifier, tmp_path)})
    expected = classifier.vit(x).last_hidden_state
    torch.testing.assert_close(ours.encode("image", Field(x, torch.arange(2))), expected, rtol=0, atol=1e-5)


def test_positions_of_another_image_size_are_interpolated(tmp_path: Path) -> None:
    theirs = stock("image")
    larger = encoder(views=Views(ImageView(size=24), VIEWS.text, VIEWS.audio))
    load_initial(larger, {"image": saved(theirs, tmp_path)})
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = theirs(x, interpolate_pos_encoding=True).last_hidden_state
    got = larger.encode("image", Field(x, torch.arange(2)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    tokenizer: Any = larger.tokenizers["image"]
    assert torch.equal(tokenizer.positions[0], theirs.embeddings.position_embeddings[0, 0])


def test_positions_of_shorter_sound_are_cut_and_of_longer_sound_stretched(tmp_path: Path) -> None:
    theirs = stock("audio")
    name = saved(theirs, tmp_path)
    given = theirs.embeddings.position_embeddings[0, 2:].view(2, 4, -1)
    for frames in (16, 32, 64):
        ours = encoder(views=Views(VIEWS.image, VIEWS.text, AudioView(frames=frames, mels=16)))
        load_initial(ours, {"audio": name})
        tokenizer: Any = ours.tokenizers["audio"]
        positions = tokenizer.positions[2:].view(2, frames // 8, -1)
        if frames <= 32:
            assert torch.equal(positions, given[:, : frames // 8])
        else:
            torch.testing.assert_close(positions, resize_grid(given, (2, 8)))


def test_positions_of_overlapping_patches_are_read_off_where_ours_begin(tmp_path: Path) -> None:
    # Their patches of 8 begin every 5 frames and every 3 mels; positions say where. Ours that would begin beyond their
    # last ones, at frame 20 and mel 6, get these.
    theirs = stock("audio", max_length=32, num_mel_bins=16, time_stride=5, frequency_stride=3)
    with torch.no_grad():
        grid = theirs.embeddings.position_embeddings[0, 2:].view(3, 5, -1)
        grid[..., 0] = 3.0 * torch.arange(3)[:, None]
        grid[..., 1:] = 5.0 * torch.arange(5)[None, :, None]
    ours = encoder(views=Views(VIEWS.image, VIEWS.text, AudioView(frames=32, mels=16)))
    load_initial(ours, {"audio": saved(theirs, tmp_path)})
    tokenizer: Any = ours.tokenizers["audio"]
    positions = tokenizer.positions[2:].view(2, 4, -1)
    torch.testing.assert_close(positions[..., 0], torch.tensor([0.0, 6.0])[:, None].expand(2, 4))
    torch.testing.assert_close(positions[..., 1:], torch.tensor([0.0, 8, 16, 20])[None, :, None].expand(2, 4, 31))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_files_in_half_precision_are_read(tmp_path: Path, modality: str, dtype: torch.dtype) -> None:
    views = Views(ImageView(size=24), VIEWS.text, AudioView(frames=64, mels=16))  # positions are interpolated
    found = []
    for name, kind in (("half", dtype), ("whole", torch.float32)):
        ours = encoder(views=views)
        load_initial(ours, {modality: saved(stock(modality).to(dtype).to(kind), tmp_path / name)})
        found.append(ours.state_dict())
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())


def test_positions_of_images_that_are_no_squares_are_interpolated(tmp_path: Path) -> None:
    theirs = stock("image", image_size=[8, 16])
    ours = encoder()
    load_initial(ours, {"image": saved(theirs, tmp_path)})
    tokenizer: Any = ours.tokenizers["image"]
    given = theirs.embeddings.position_embeddings[0, 1:].view(2, 4, -1)
    torch.testing.assert_close(tokenizer.positions[1:].view(4, 4, -1), resize_grid(given, (4, 4)))


def test_a_stream_may_be_shorter_than_the_stock_text_but_not_longer(tmp_path: Path) -> None:
    name = saved(stock("text", max_position_embeddings=8), tmp_path)
    with pytest.raises(InitialError, match=r"init_from\.text=.*positions for 6 tokens, data\.views\.text\.max_tokens"):
        load_initial(encoder(), {"text": name})


@pytest.mark.parametrize(
    ("modality", "other", "message"),
    [
        ("image", {"hidden_size": 64}, "hidden_size is 64 there, and model.width is 32 here"),
        ("image", {"num_hidden_layers": 3}, "num_hidden_layers is 3 there, and model.depth is 2 here"),
        ("image", {"patch_size": 8}, "patch_size is 8 there, and model.image_patch is 4 here"),
        ("audio", {"num_attention_heads": 2}, "num_attention_heads is 2 there, and model.heads is 4 here"),
        ("text", {"vocab_size": 50}, "vocab_size is 50 there"),
        ("text", {"intermediate_size": 128}, "intermediate_size is 128 there"),
        ("text", {"layer_norm_eps": 1e-3}, "layer_norm_eps is 0.001 there, and 1e-06 here; allowed is up to 1e-05"),
        ("image", {"qkv_bias": False}, "qkv_bias is False there, and that of our attention is True here"),
    ],
)
def test_other_sizes_are_named(tmp_path: Path, modality: str, other: dict[str, Any], message: str) -> None:
    with pytest.raises(InitialError, match=message):
        load_initial(encoder(), {modality: saved(stock(modality, **other), tmp_path)})


def test_weights_that_the_file_lacks_are_named_and_nothing_is_copied(tmp_path: Path) -> None:
    name = saved(stock("image"), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = next(key for key in tensors if "fc1.weight" in key or "intermediate.dense.weight" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, path, metadata={"format": "pt"})
    ours = encoder()
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    with pytest.raises(
        InitialError, match=r"(?s)(\d+)/(\d+) tensors fit:\n  blocks\.0\.feed_forward\.fc1\.weight: not in"
    ):
        load_initial(ours, {"image": name})
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())


def test_a_text_model_without_a_pooler_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = stock("text").config
    name = saved(RobertaPreLayerNormForMaskedLM(config), tmp_path / "masked")
    with pytest.raises(
        InitialError, match=r"(?s)heads\.text\.dense\.weight: not in the file.*saved without its pooler"
    ):
        load_initial(encoder(), {"text": name})
    load_initial(encoder(), {"text": saved(RobertaPreLayerNormModel.from_pretrained(name), tmp_path / "pooled")})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    name = saved(stock("image"), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:100], b"", b"\xff" + whole[1:], whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(InitialError, match=rf"init_from\.image={tmp_path}: "):
            load_initial(encoder(), {"image": name})
    path.write_bytes(whole)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"image_size": 16', '"image_size": 24'))
    with pytest.raises(InitialError, match=rf"init_from\.image={tmp_path}: "):
        load_initial(encoder(), {"image": name})


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    image = saved(stock("image"), tmp_path / "image")
    ours: Encoder = encoder()
    for given, message in (
        ({"video": image}, r"init_from\.video: allowed are image, text, audio"),
        ({"image": image, "text": image}, r"set model\.sharing=none"),
        ({"text": image}, r"init_from\.text=.*: a model of type vit; roberta-prelayernorm is needed"),
        ({"image": str(tmp_path / "nowhere")}, r"init_from\.image=.*nowhere"),
    ):
        with pytest.raises(InitialError, match=message):
            load_initial(ours, given)
