import dataclasses
import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import pretrain.pictures
from objectives.masked_language import MaskedLanguageConfig
from objectives.masked_region import MaskedRegionConfig, normalise_patches
from objectives.passes import JointPass
from objectives.pretraining import KeepConfig, ObjectivesConfig, Pretraining
from objectives.teacher import TeacherConfig
from pretrain.model.layers import gather_tokens
from pretrain.pictures import draw, draw_step, replace_patches
from tests.samples import batch, encoder

REGION = MaskedRegionConfig(decoder_width=16, decoder_heads=2, teacher=TeacherConfig(layers=1))
CONFIG = ObjectivesConfig(masked_region=REGION, joint_keep=KeepConfig(0.5, 0.5), joint_share=1.0)


def joint_pass(presence: list[str]) -> tuple[Pretraining, JointPass]:
    model = Pretraining(encoder(), CONFIG)
    (joint,) = model.passes(batch(presence), 0, False, ["masked_region"]).joint
    return model, joint


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is drawn, in order."""
    pictures: list[Tensor] = []
    for name, show in pretrain.pictures._SHOW.items():

        def keep(axes: Any, picture: Tensor, whole: Tensor, show: Any = show) -> None:
            pictures.append(picture)
            show(axes, picture, whole)

        monkeypatch.setitem(pretrain.pictures._SHOW, name, keep)
    return pictures


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_replaced_patches_are_those_that_are_cut_out_again(modality: str) -> None:
    model, joint = joint_pass(["ia"] * 3)
    x, split = joint.inputs[modality].x, joint.splits[modality]
    before = model.encoder.patches(modality, x)
    values = torch.randn(gather_tokens(before, split.hidden).shape)
    after = model.encoder.patches(modality, replace_patches(model.encoder, modality, x, split.hidden, values))
    assert torch.equal(gather_tokens(after, split.hidden), values)
    assert torch.equal(gather_tokens(after, split.visible), gather_tokens(before, split.visible))


def test_rows_are_input_what_was_seen_and_a_reconstruction(shown: list[Tensor]) -> None:
    model, joint = joint_pass(["ia"] * 3)
    perfect = {
        name: normalise_patches(gather_tokens(model.encoder.patches(name, joint.inputs[name].x), split.hidden))
        for name, split in joint.splits.items()
    }
    picture = Image.open(io.BytesIO(draw(model.encoder, joint, perfect, limit=2)))
    assert picture.height > picture.width > 200
    assert len(shown) == 2 * 3 * 2
    for i, name in enumerate(("image", "audio")):
        for sample in range(2):
            x = joint.inputs[name].x[sample]
            whole, masked, reconstruction = shown[6 * i + sample : 6 * (i + 1) : 2]
            assert torch.equal(whole, x)
            torch.testing.assert_close(reconstruction, x, rtol=1e-4, atol=1e-4)
            assert masked.isnan().float().mean() == 0.5
            assert torch.equal(masked[~masked.isnan()], x[~masked.isnan()])


def test_a_step_draws_what_the_decoders_predict(shown: list[Tensor]) -> None:
    model = Pretraining(encoder(), CONFIG).train()
    inputs = batch(["t", "i", "ita", "it", "ita", "ita"])
    assert draw_step(model, inputs, seed=0, limit=4) is not None
    assert len(shown) == 2 * 3 * 3  # of the three samples that have both
    assert torch.equal(shown[0], inputs.fields["image"].x[1])
    masked, reconstruction = shown[3], shown[6]
    assert reconstruction.isfinite().all()
    assert torch.equal(reconstruction[~masked.isnan()], shown[0][~masked.isnan()])
    assert not torch.allclose(reconstruction[masked.isnan()], shown[0][masked.isnan()], atol=0.1)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_picture_costs_no_pass_that_it_does_not_show_and_no_compilation() -> None:
    model = Pretraining(encoder(), CONFIG)
    compiled: list[object] = []
    embedded: list[object] = []

    def backend(graph: nn.Module, _: object) -> Any:
        compiled.append(graph)
        return graph.forward

    for block in model.encoder.blocks:
        block.compile(backend=backend)
    for head in model.encoder.heads.values():
        head.register_forward_hook(lambda *_: embedded.append(None))
    assert draw_step(model, batch(["ita"] * 2), seed=0) is not None
    assert not compiled
    assert not embedded
    model(batch(["ita"] * 2), seed=0)
    assert compiled
    assert embedded


@pytest.mark.parametrize("target", ["latent", "kl"])
def test_of_a_teachers_targets_inputs_and_masks_are_drawn(shown: list[Tensor], target: str) -> None:
    region = dataclasses.replace(REGION, target=target)
    inputs = batch(["ita"] * 2)
    assert draw_step(Pretraining(encoder(), dataclasses.replace(CONFIG, masked_region=region)), inputs, seed=0)
    assert len(shown) == 2 * 2 * 2
    for i, name in enumerate(("image", "audio")):
        for sample in range(2):
            x = inputs.fields[name].x[sample]
            whole, masked = shown[4 * i + sample : 4 * (i + 1) : 2]
            assert torch.equal(whole, x)
            assert masked.isnan().float().mean() == 0.5
            assert torch.equal(masked[~masked.isnan()], x[~masked.isnan()])


def test_where_nothing_is_hidden_there_is_no_picture() -> None:
    model = Pretraining(encoder(), dataclasses.replace(CONFIG, masked_region=dataclasses.replace(REGION, weight=0.0)))
    assert draw_step(model, batch(["ita"] * 2), seed=0) is None
    language = MaskedLanguageConfig(weight=1)
    model = Pretraining(encoder(), dataclasses.replace(CONFIG, masked_language=language))
    assert draw_step(model, batch(["t"] * 2), seed=0) is None
    whole = dataclasses.replace(CONFIG, joint_keep=KeepConfig(1.0, 1.0))
    assert draw_step(Pretraining(encoder(), whole), batch(["ita"] * 2), seed=0) is None
