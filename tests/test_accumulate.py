"""Micro-batches: their gradients are those of the whole batch, with all of its negatives."""

import dataclasses
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.batch import Batch
from objectives.contrastive import ContrastiveConfig
from objectives.masked_language import MaskedLanguageConfig
from objectives.masked_region import MaskedRegionConfig
from objectives.passes import Passes
from objectives.pretraining import OBJECTIVES, Loss, ObjectivesConfig, Pretraining, UnimodalKeepConfig
from pretrain.engine import go_backward
from tests.samples import VIEWS, batch, encoder

PRESENCE = ["ita", "it", "ta", "i", "ita", "it", "ia", "ita", "t", "ita", "ita", "ia"]
PARTS = 3
TERMS = ("image_text", "image_audio", "text_audio", "masked_language", "masked_image", "masked_audio")


def config(loss: str = "info_nce", cached: bool = True, masked: float = 0.0) -> ObjectivesConfig:
    return ObjectivesConfig(
        contrastive=ContrastiveConfig(weight=0.7, loss=loss, cached=cached),
        masked_language=MaskedLanguageConfig(weight=masked),
        masked_region=MaskedRegionConfig(weight=masked),
        keep=UnimodalKeepConfig(image=0.5, audio=0.5, text=0.4),
        joint_share=0.5,
    )


def model_of(objectives: ObjectivesConfig) -> Pretraining:
    trunk = encoder()
    torch.manual_seed(0)
    return Pretraining(trunk, objectives).double()


def inputs(grouped: bool) -> Batch:
    made = batch(PRESENCE)
    fields = {name: f._replace(x=f.x.double()) if f.x.is_floating_point() else f for name, f in made.fields.items()}
    groups = torch.tensor([0, 1, 2, 0, 0, 3, 3, -1, -1, 1, 4, 2]) if grouped else None
    return made._replace(fields=fields, groups=groups)


def gradients(model: Pretraining) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole(objectives: ObjectivesConfig, given: Batch) -> tuple[Loss, dict[str, Tensor]]:
    model = model_of(objectives)
    loss: Loss = model(given, seed=5)
    torch.autograd.backward(loss.total)
    return loss, gradients(model)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_micro_batches_are_the_whole_batch(loss: str, grouped: bool) -> None:
    """All losses and all gradients: negatives, masks, and the numbers of what is predicted."""
    objectives, given = config(loss, masked=1.0), inputs(grouped)
    expected_loss, expected = whole(objectives, given)
    model = model_of(objectives)
    found = go_backward(Accelerator(cpu=True), model, given.split(PARTS), 5, False, 0.0)
    torch.testing.assert_close(found.total, expected_loss.total.detach())
    assert found.terms.keys() == expected_loss.terms.keys() == set(TERMS)
    for name, term in found.terms.items():
        torch.testing.assert_close(term, expected_loss.terms[name].detach())
    got = gradients(model)
    assert any("log_scale" in name for name in expected)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-8, atol=1e-10)


class Silent(nn.Module):
    """Reads the embeddings of all rows, and wants nothing of them."""

    reads = "embeddings"

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.names = ["silent"]

    @staticmethod
    def learns_from(_: Collection[str]) -> bool:
        return True

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        return {"silent": sum((0 * each.x.sum() for each in passes.embeddings.values()), torch.zeros(()))}


def test_the_cache_embeds_what_all_objectives_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a partner, too, where another objective wants them: gradients belong to the same rows."""
    given, settings = inputs(False), config()
    _, expected = whole(settings, given)
    monkeypatch.setitem(OBJECTIVES, "silent", Silent)
    new = ("silent", Any, dataclasses.field(default_factory=lambda: SimpleNamespace(weight=1.0, weight_end=None)))
    make: Any = dataclasses.make_dataclass("WithSilent", [new], bases=(ObjectivesConfig,))
    model = model_of(make(**vars(settings)))
    go_backward(Accelerator(cpu=True), model, given.split(PARTS), 5, False, 0.0)
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-8, atol=1e-10)


def test_without_the_cache_each_micro_batch_has_its_own_negatives() -> None:
    given = inputs(False)
    parts = given.split(PARTS)
    model, alone = model_of(config(cached=False)), model_of(config(cached=False))
    found = go_backward(Accelerator(cpu=True), model, parts, 5, False, 0.0)
    total = torch.stack([alone(part, seed=5).total for part in parts]).mean()
    torch.autograd.backward(total)
    torch.testing.assert_close(found.total, total.detach())
    expected, got = gradients(alone), gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10)
    masked, _ = whole(config(cached=False, masked=1.0), given)
    both = go_backward(Accelerator(cpu=True), model_of(config(cached=False, masked=1.0)), parts, 5, False, 0.0)
    for name, term in both.terms.items():
        reference = masked.terms if name.startswith("masked") else found.terms
        torch.testing.assert_close(term, reference[name].detach())


@pytest.mark.parametrize("parts", [1, PARTS])
def test_one_modality_trains_without_objectives_that_need_others(parts: int) -> None:
    """Alone and in micro-batches, and without a pass for what they would read."""
    settings = ObjectivesConfig(joint_share=1.0, masked_language=MaskedLanguageConfig(weight=1))
    model = Pretraining(encoder(views=dataclasses.replace(VIEWS, image=None, audio=None)), settings)
    assert set(model.objectives) == {"masked_language"}
    embedded: list[object] = []
    model.encoder.heads["text"].register_forward_hook(lambda *_: embedded.append(None))
    loss = go_backward(Accelerator(cpu=True), model, batch(["t"] * 6).split(parts), 5, False, 0.0)
    assert set(loss.terms) == {"masked_language"}
    assert not embedded
    assert all(p.grad is not None for p in model.parameters())


def test_a_batch_splits_into_its_rows() -> None:
    given = inputs(True)
    parts = given.split(PARTS)
    assert [part.size for part in parts] == [4, 4, 4]
    assert [key for part in parts for key in part.keys] == given.keys
    for name, field in given.fields.items():
        held = [
            (4 * number + int(row), part.fields[name].x[i])
            for number, part in enumerate(parts)
            if name in part.fields
            for i, row in enumerate(part.fields[name].rows)
        ]
        assert [row for row, _ in held] == field.rows.tolist()
        if name != "text":
            assert torch.equal(torch.stack([x for _, x in held]), field.x)
    assert given.split(1)[0] is given
    with pytest.raises(ValueError, match="5 parts of 12 rows"):
        given.split(5)
