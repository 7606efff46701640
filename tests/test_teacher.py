import copy
import dataclasses
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from data.batch import Batch
from objectives.contrastive import ContrastiveConfig
from objectives.masked_language import MaskedLanguageConfig
from objectives.masked_region import MaskedRegionConfig
from objectives.passes import Passes
from objectives.pretraining import KeepConfig, ObjectivesConfig, Pretraining
from objectives.teacher import Teacher, TeacherConfig
from tests.samples import MODEL, batch, encoder

TEACHER = TeacherConfig(momentum=0.9, layers=2, prototypes=11, centre_momentum=0.7)
PRESENCE = ["ita", "it", "a", "ita", "i", "ta"]
PREFIX = {"image": 1, "audio": 2}


def settings(target: str, **changes: Any) -> ObjectivesConfig:
    region = MaskedRegionConfig(target=target, decoder_width=16, decoder_heads=2, teacher=TEACHER)
    return ObjectivesConfig(
        joint_share=1.0,
        contrastive=ContrastiveConfig(weight=0),
        masked_language=MaskedLanguageConfig(weight=1),
        masked_region=dataclasses.replace(region, **changes),
        joint_keep=KeepConfig(0.5, 0.5),
    )


def pretraining(target: str, **changes: Any) -> Pretraining:
    """A model whose teacher has other weights than its student."""
    made = Pretraining(encoder(model=dataclasses.replace(MODEL, depth=3)), settings(target, **changes))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.objectives.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def region_of(model: Pretraining) -> Any:
    return model.objectives["masked_region"]


def passes_of(model: Pretraining, inputs: Batch, seed: int = 0) -> Passes:
    passes = model.passes(inputs, seed, False, list(model.objectives))
    region = region_of(model)
    return passes._replace(counts={name: torch.tensor(n) for name, n in region.counts(passes.joint).items()})


def step(model: Pretraining, optimizer: torch.optim.Optimizer, number: int, progress: float = 0.5) -> float:
    loss = model(batch(PRESENCE, seed=number), seed=number)
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    model.after_step(progress)
    value: float = loss.total.item()
    return value


# The average


@pytest.mark.parametrize(("progress", "momentum"), [(0.0, 0.9), (0.25, 0.9 + 0.1 * 0.1464466), (0.5, 0.95), (1.0, 1.0)])
def test_the_teacher_is_an_average_whose_momentum_rises_to_1(progress: float, momentum: float) -> None:
    model = encoder(seed=1)
    teacher = Teacher(encoder(seed=2), 0.9)
    before = copy.deepcopy(dict(teacher.module.named_parameters()))
    assert len(before) > 30
    teacher.follow(model, progress)
    for name, parameter in teacher.module.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * model.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)
        assert torch.equal(parameter, before[name]) == (progress == 1)


@pytest.mark.parametrize("target", ["latent", "kl"])
def test_a_teacher_begins_as_the_student_and_never_learns(target: str) -> None:
    student = encoder()
    model = Pretraining(student, settings(target)).train()
    teacher = region_of(model).target.teacher
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, teacher.module.get_parameter(name))
        assert parameter.requires_grad
        assert parameter.data_ptr() != teacher.module.get_parameter(name).data_ptr()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    teachers = [part for part in model.modules() if isinstance(part, Teacher)]
    assert len(teachers) == (2 if target == "kl" else 1)
    frozen = {p.data_ptr() for part in teachers for p in part.parameters()}
    assert not frozen & {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    assert not any(module.training for part in teachers for module in part.module.modules())
    before = copy.deepcopy(teacher.module.state_dict())
    model(batch(PRESENCE), seed=0).total.backward()
    optimizer.step()
    assert all(p.grad is None for part in teachers for p in part.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    model.after_step(0.5)
    for name, parameter in student.named_parameters():  # 0.9 at the start is 0.95 half-way
        expected = 0.95 * before[name] + 0.05 * parameter
        torch.testing.assert_close(teacher.module.get_parameter(name), expected, rtol=0, atol=1e-6)


def test_without_need_there_is_no_teacher() -> None:
    model = pretraining("pixel")
    assert not any(isinstance(part, Teacher) for part in model.modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.after_step(0.5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("target", ["pixel", "latent", "kl"])
def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped(target: str) -> None:
    def begin() -> tuple[Pretraining, torch.optim.Optimizer]:
        model = pretraining(target)
        return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)

    model, optimizer = begin()
    whole = [step(model, optimizer, number, number / 6) for number in range(6)]
    first, optimizer = begin()
    parts = [step(first, optimizer, number, number / 6) for number in range(3)]
    again, optimizer = begin()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.encoder.load_state_dict(first.encoder.state_dict())
    again.objectives.load_state_dict(first.objectives.state_dict())
    parts += [step(again, optimizer, number, number / 6) for number in range(3, 6)]
    assert parts == whole
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


# Latent targets


def naive_targets(teacher: Any, inputs: dict[str, Any], last: int) -> dict[str, Tensor]:
    """States of all patches of whole, clean inputs; the blocks' outcomes are looked at from outside."""
    states: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *given: states.append(given[2])) for block in teacher.blocks]
    outcome = teacher.trunk({name: teacher.tokens(name, each) for name, each in inputs.items()})
    lengths = {name: each.shape[1] for name, each in outcome.items()}
    for handle in handles:
        handle.remove()
    total = torch.zeros_like(states[0])
    for state in states[-last:]:
        centred = state - state.mean(dim=-1, keepdim=True)
        total = total + centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() / last
    found, start = {}, 0
    for name, length in lengths.items():
        if name in PREFIX:
            found[name] = total[:, start + PREFIX[name] : start + length]
        start += length
    return found


@pytest.mark.parametrize("last", [1, 2, 3])
def test_latent_losses_are_smooth_l1_to_the_teachers_states_of_clean_inputs(last: int) -> None:
    model = pretraining("latent", teacher=dataclasses.replace(TEACHER, layers=last))
    region = region_of(model)
    passes = passes_of(model, batch(PRESENCE))
    errors: dict[str, list[Tensor]] = {"image": [], "audio": []}
    for joint in passes.joint:
        wanted = naive_targets(region.target.teacher.module, joint.inputs, last)
        for name, split in joint.splits.items():
            assert wanted[name].shape[1] == split.visible.shape[1] + split.hidden.shape[1]
            predicted = region.decoders[name](joint.states[name], split)
            for i, patches in enumerate(split.hidden.tolist()):
                for j, patch in enumerate(patches):
                    off = (predicted[i, j] - wanted[name][i, patch]).abs()
                    errors[name].append(torch.where(off < 1, off.square() / 2, off - 0.5).mean())
    terms = region(passes)
    assert set(terms) == {"masked_image", "masked_audio"}
    for name, each in errors.items():
        torch.testing.assert_close(terms[f"masked_{name}"], torch.stack(each).mean(), rtol=1e-4, atol=1e-5)


def test_the_teacher_sees_other_modalities_and_no_mask() -> None:
    model = pretraining("latent")
    region = region_of(model)
    (joint,) = passes_of(model, batch(["ita"] * 3)).joint
    wanted = region.target.wanted(model.encoder, joint)
    (other,) = passes_of(model, batch(["ita"] * 3), seed=1).joint
    assert not torch.equal(joint.splits["image"].hidden, other.splits["image"].hidden)
    for name, each in region.target.wanted(model.encoder, other).items():
        torch.testing.assert_close(each, wanted[name], rtol=0, atol=1e-5)
    alone = region.target.wanted(
        model.encoder, joint._replace(inputs={"image": joint.inputs["image"]}, splits={"image": joint.splits["image"]})
    )
    assert (alone["image"] - wanted["image"]).abs().max() > 1e-2
    assert not any(each.requires_grad for each in wanted.values())


def test_more_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"objectives\.masked_region\.teacher\.layers=2: model\.depth is only 1"):
        Pretraining(encoder(model=dataclasses.replace(MODEL, depth=1)), settings("latent"))
    Pretraining(encoder(model=dataclasses.replace(MODEL, depth=1)), settings("pixel"))


# Prototypes


def cosines(states: Tensor, prototypes: Tensor) -> Tensor:
    """One by one, (n, D) and (count, D) -> (n, count)."""
    return torch.stack([torch.stack([(s @ p) / (s.norm() * p.norm()) for p in prototypes]) for s in states])


def assignments(model: Pretraining, name: str) -> tuple[Tensor, Tensor]:
    """The teacher's similarities and the student's predictions (n, count) at all hidden patches of a batch."""
    region = region_of(model)
    similarities, predictions = [], []
    for joint in passes_of(model, batch(PRESENCE)).joint:
        if name in joint.splits:
            split = joint.splits[name]
            wanted = naive_targets(region.target.teacher.module, joint.inputs, TEACHER.layers)[name]
            predicted = region.decoders[name](joint.states[name], split)
            for i, patches in enumerate(split.hidden.tolist()):
                similarities.append(cosines(wanted[i, patches], region.target.teacher_prototypes.module[name]))
                predictions.append(cosines(predicted[i], region.target.prototypes[name]))
    return torch.cat(similarities), torch.cat(predictions)


def test_kl_losses_are_the_divergence_from_the_teachers_centred_assignments() -> None:
    model = pretraining("kl")
    target = region_of(model).target
    with torch.no_grad():
        target.centres.copy_(0.2 * torch.randn(2, 11, generator=torch.Generator().manual_seed(3)))
    terms = region_of(model)(passes_of(model, batch(PRESENCE)))
    for number, name in enumerate(("image", "audio")):
        similarities, predictions = assignments(model, name)
        teacher = ((similarities - target.centres[number]) / 0.04).softmax(dim=1)
        student = (predictions / 0.1).softmax(dim=1)
        divergence = (teacher * (teacher / student).clamp(min=1e-30).log()).sum(dim=1).mean()
        torch.testing.assert_close(terms[f"masked_{name}"], divergence, rtol=1e-3, atol=1e-4)
    gradients = torch.autograd.grad(
        terms["masked_image"], [target.prototypes["image"], *model.encoder.parameters()], allow_unused=True
    )
    assert sum(each is not None and bool(each.any()) for each in gradients) > 20


def test_centres_and_prototypes_are_running_means() -> None:
    model = pretraining("kl")
    target = region_of(model).target
    with torch.no_grad():
        target.centres.fill_(0.5)
    expected = []
    for name in ("image", "audio"):
        similarities, _ = assignments(model, name)
        expected.append(0.7 * 0.5 + 0.3 * similarities.mean(dim=0))
    prototypes = {name: each.clone() for name, each in target.teacher_prototypes.module.items()}
    model(batch(PRESENCE), seed=0)
    assert (target.centres == 0.5).all()  # until the step is made
    model.after_step(0.0)
    torch.testing.assert_close(target.centres, torch.stack(expected), rtol=0, atol=1e-5)
    for name, before in prototypes.items():
        mean = 0.9 * before + 0.1 * target.prototypes[name]
        torch.testing.assert_close(target.teacher_prototypes.module[name].data, mean.data, rtol=0, atol=1e-6)
    centres = target.centres.clone()
    model.after_step(0.0)  # nothing was seen since
    assert torch.equal(target.centres, centres)
    model(batch(["it", "i"]), seed=0)
    model.after_step(0.0)
    assert not torch.equal(target.centres[0], centres[0])
    assert torch.equal(target.centres[1], centres[1])
    model.eval()(batch(PRESENCE), seed=0)  # what is only evaluated does not count
    assert target.sums is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_move_centres(bad: float) -> None:
    """Neither for good nor for this step: samples beside it count."""
    fine, spoilt = batch(["ita"] * 4).split(2)
    expected = pretraining("kl")
    expected(fine, seed=0)
    expected.after_step(0.0)
    model = pretraining("kl")
    target = region_of(model).target
    with torch.no_grad():
        spoilt.fields["image"].x[:, 0, 0, 0] = bad
    model(fine, seed=0)
    model(spoilt, seed=0)
    model.after_step(0.0)
    assert target.centres.any()
    assert torch.equal(target.centres, region_of(expected).target.centres)
    centres = target.centres.clone()
    model(spoilt, seed=0)
    model.after_step(0.0)
    assert torch.equal(target.centres, centres)


def centre_of_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=40)
    )
    model = pretraining("kl")
    torch.save(centre_after(model, [PRESENCE_OF[rank]]), f"{folder}/{rank}.pt")
    dist.barrier()  # none is gone while another one still talks to it
    dist.destroy_process_group()


# The first rank has no audio, the last one nothing at all.
PRESENCE_OF = [["it", "i", "i"], ["ita"] * 4, [""]]


def centre_after(model: Pretraining, batches: Sequence[list[str]]) -> Tensor:
    for presence in batches:
        model(batch(presence), seed=0)
    model.after_step(1.0)
    centres: Tensor = region_of(model).target.centres
    return centres


def test_centres_are_those_of_the_patches_of_all_ranks(tmp_path: Path) -> None:
    spawn(centre_of_rank, args=(3, str(tmp_path)), nprocs=3)  # type: ignore[no-untyped-call]
    expected = centre_after(pretraining("kl"), PRESENCE_OF[:2])
    assert expected.abs().min() > 0
    for rank in range(3):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=0, atol=1e-6)


def test_centring_keeps_assignments_from_collapsing() -> None:
    """All of the teacher's states are nearest to one prototype; with centres they spread."""

    def used(momentum: float) -> float:
        model = pretraining("kl", teacher=dataclasses.replace(TEACHER, centre_momentum=momentum))
        target = region_of(model).target
        with torch.no_grad():
            mean = torch.cat(
                [
                    target.wanted(model.encoder, joint)["image"].flatten(0, 1).mean(dim=0, keepdim=True)
                    for joint in passes_of(model, batch(["i"] * 4)).joint
                ]
            )
            target.teacher_prototypes.module["image"].mul_(0.1)[0] = 5 * mean[0]
            for _ in range(30):
                model(batch(["i"] * 4), seed=0)
                model.after_step(1.0)
            similarities, _ = assignments(model, "image")
            shares = ((similarities - target.centres[0]) / 0.04).softmax(dim=1).mean(dim=0)
        return math.exp(-float((shares * shares.log()).sum()))  # how many are in use

    assert used(0.7) > 1.5 * used(1.0)


# Which patches are predicted, precision


@pytest.mark.parametrize(("share", "image", "audio"), [(1.0, 8, 4), (0.5, 4, 2), (0.3, 2, 1), (0.01, 1, 1)])
@pytest.mark.parametrize("target", ["pixel", "latent", "kl"])
def test_a_share_of_the_hidden_patches_is_predicted(target: str, share: float, image: int, audio: int) -> None:
    model = pretraining(target, decode=share)
    asked: dict[str, list[tuple[int, int]]] = {"image": [], "audio": []}
    for name, seen in asked.items():
        region_of(model).decoders[name].register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append((given[1].visible.shape[1], given[1].hidden.shape[1]))
        )
    terms = model(batch(PRESENCE), seed=0).terms
    assert set(asked["image"]) == {(8, image)}
    assert set(asked["audio"]) == {(4, audio)}
    whole = pretraining(target)(batch(PRESENCE), seed=0).terms
    for name in ("masked_image", "masked_audio"):
        assert (terms[name] == whole[name]) == (share == 1)


@pytest.mark.parametrize("target", ["latent", "kl"])
def test_losses_in_bf16_are_near_those_in_fp32(target: str) -> None:
    model = pretraining(target)
    exact = model(batch(PRESENCE), seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch(PRESENCE), seed=0)
    rough.total.backward()
    for name in ("masked_image", "masked_audio"):
        assert rough.terms[name].dtype == torch.float32
        torch.testing.assert_close(rough.terms[name], exact.terms[name], rtol=0.1, atol=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.after_step(0.5)
    assert all(value.dtype in (torch.float32, torch.int64) for value in model.state_dict().values())


@pytest.mark.parametrize("target", ["latent", "kl"])
def test_a_few_steps_lower_the_loss(target: str) -> None:
    torch.manual_seed(0)
    model = Pretraining(encoder(), settings(target))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(batch(["ita"] * 6), seed=0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        model.after_step(0.5)
        losses.append({name: term.item() for name, term in loss.terms.items()})
    for name in ("masked_image", "masked_audio"):
        assert losses[-1][name] < 0.7 * losses[0][name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedRegionConfig(target="pixels"), r"region\.target=pixels: allowed are pixel, latent, kl"),
        (lambda: MaskedRegionConfig(decode=0.0), r"region\.decode=0\.0: allowed is above 0 and at most 1"),
        (lambda: MaskedRegionConfig(decode=1.1), r"region\.decode=1\.1: allowed is above 0 and at most 1"),
        (lambda: TeacherConfig(momentum=1.1), r"region\.teacher\.momentum=1\.1: allowed is 0 to 1"),
        (lambda: TeacherConfig(centre_momentum=-1.0), r"region\.teacher\.centre_momentum=-1\.0: allowed is 0 to 1"),
        (lambda: TeacherConfig(layers=0), r"region\.teacher\.layers=0: allowed is 1 or more"),
        (lambda: TeacherConfig(prototypes=1), r"region\.teacher\.prototypes=1: allowed is 2 or more"),
        (lambda: TeacherConfig(temperature=0.0), r"region\.teacher\.temperature=0\.0: allowed is above 0"),
        (lambda: TeacherConfig(student_temperature=math.nan), r"teacher\.student_temperature=nan: allowed is above 0"),
    ],
)
def test_settings_out_of_bounds_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
