"""Micro-batches: their gradients are those of the whole batch, with all of its negatives."""

import dataclasses
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import Batch, Field
from objectives.contrastive import ContrastiveConfig
from objectives.masked_language import MaskedLanguageConfig
from objectives.masked_region import MaskedRegionConfig
from objectives.pretraining import KeepConfig, ObjectivesConfig, Pretraining
from pretrain.engine import go_backward, step_seed
from tests.samples import batch, encoder

PRESENCE = ["ita", "it", "ta", "i", "ita", "it", "ia", "ita", "t", "ita", "ita", "ia"]
PARTS = 3


def config(loss: str = "info_nce", cached: bool = True, masked: float = 0.0) -> ObjectivesConfig:
    return ObjectivesConfig(
        contrastive=ContrastiveConfig(weight=0.7, loss=loss, cached=cached),
        masked_language=MaskedLanguageConfig(weight=masked),
        masked_region=MaskedRegionConfig(weight=masked),
        keep=KeepConfig(image=0.5, audio=0.5),
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


def whole_batch(model: Pretraining, parts: list[Batch], seeds: list[int], size: int, groups: Tensor | None) -> Tensor:
    """The loss of all embeddings together, each micro-batch seen as its seed says."""
    fields: dict[str, Field] = {}
    for number, (part, seed) in enumerate(zip(parts, seeds, strict=True)):
        for name, each in model.passes(part, seed, False, ["contrastive"]).embeddings.items():
            moved = each._replace(rows=each.rows + number * size)
            if name in fields:
                moved = Field(torch.cat([fields[name].x, moved.x]), torch.cat([fields[name].rows, moved.rows]))
            fields[name] = moved
    objective: Any = model.objectives["contrastive"]
    terms = objective.terms(fields, groups)
    total: Tensor = 0.7 * torch.stack(list(terms.values())).sum()
    return total


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_micro_batches_are_contrasted_as_one_batch(loss: str, grouped: bool) -> None:
    given = inputs(grouped)
    parts, seeds = given.split(PARTS), [step_seed(5, part) for part in range(PARTS)]
    one = model_of(config(loss))
    expected_loss = whole_batch(one, parts, seeds, given.size // PARTS, given.groups)
    expected_loss.backward()  # type: ignore[no-untyped-call]
    expected = gradients(one)

    model = model_of(config(loss))
    found = go_backward(Accelerator(cpu=True), model, parts, 5, False, 0.0)
    torch.testing.assert_close(found.total, expected_loss.detach())
    got = gradients(model)
    assert any("log_scale" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-8, atol=1e-10)
    assert not any(got[name].any() for name in set(got) - set(expected))


def test_without_the_cache_each_micro_batch_has_its_own_negatives() -> None:
    given = inputs(False)
    parts = given.split(PARTS)
    model, other = model_of(config(cached=False, masked=1.0)), model_of(config(cached=False, masked=1.0))
    found = go_backward(Accelerator(cpu=True), model, parts, 5, False, 0.0)
    losses = [other(part, step_seed(5, number)) for number, part in enumerate(parts)]
    total = torch.stack([loss.total for loss in losses]).mean()
    total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.total, total.detach())
    expected = gradients(other)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10)


def test_masked_losses_of_micro_batches_are_averaged_beside_the_cache() -> None:
    given = inputs(False)
    parts = given.split(PARTS)
    model, alone = model_of(config(masked=1.0)), model_of(dataclasses.replace(config(masked=1.0)))
    found = go_backward(Accelerator(cpu=True), model, parts, 5, False, 0.0)
    losses = [alone(part, step_seed(5, number)) for number, part in enumerate(parts)]
    for name in ("masked_language", "masked_image", "masked_audio"):
        expected = torch.stack([loss.terms[name].detach() for loss in losses if name in loss.terms]).mean()
        torch.testing.assert_close(found.terms[name], expected)


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
