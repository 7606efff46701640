import dataclasses
import importlib
import itertools
import re
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as dynamo

from data.batch import Batch, Field
from data.draws import fork
from objectives.contrastive import ContrastiveConfig
from objectives.masked_language import MaskedLanguage, MaskedLanguageConfig
from objectives.masked_region import MaskedRegion, MaskedRegionConfig, normalise_patches
from objectives.masking import PatchSplit, mask_tokens, split_patches
from objectives.passes import JointPass, Passes
from objectives.pretraining import (
    OBJECTIVES,
    KeepConfig,
    Loss,
    MaskConfig,
    ObjectivesConfig,
    Pretraining,
    UnimodalKeepConfig,
    group_by_presence,
    joint_rows,
    trunk_gradients,
)
from pretrain.model.tokenizers import ModelConfig
from tests.samples import MODEL, VOCABULARY, batch, encoder, images, texts

REGION = MaskedRegionConfig(decoder_width=16, decoder_heads=2)
CONFIG = ObjectivesConfig(masked_region=REGION, joint_keep=KeepConfig(0.5, 0.5), joint_share=1.0)
TERMS = {"image_text", "image_audio", "text_audio", "masked_language", "masked_image", "masked_audio"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pretraining(config: ObjectivesConfig = CONFIG, seed: int = 0, model: ModelConfig = MODEL) -> Pretraining:
    trunk = encoder(model=model, seed=seed)
    torch.manual_seed(seed)
    made = Pretraining(trunk, config)
    with torch.no_grad():
        for parameter in made.objectives.parameters():
            if parameter.ndim > 0:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def config(**weights: float) -> ObjectivesConfig:
    """Only the objectives that are named, with their weights."""
    return dataclasses.replace(
        CONFIG,
        contrastive=ContrastiveConfig(weight=weights.get("contrastive", 0)),
        masked_language=MaskedLanguageConfig(weight=weights.get("masked_language", 0)),
        masked_region=dataclasses.replace(REGION, weight=weights.get("masked_region", 0)),
    )


def passes_of(model: Pretraining, inputs: Batch, seed: int = 0, whole: bool = False) -> tuple[Passes, Loss]:
    """What the objectives read in a step, and the step's outcome."""
    seen: list[Passes] = []
    objective = next(iter(model.objectives.values()))
    handle = objective.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    loss = model(inputs, seed=seed, whole=whole)
    handle.remove()
    return seen[0], loss


# Masking


def draws(rate: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, corrupted ids and choice of 1,000 texts of up to 250 ids, special tokens and padding among them."""
    ids, _ = texts([2 + i % 249 for i in range(1000)], seed)
    ids[:, 3:6] = torch.where(ids[:, 3:6] != 1, torch.tensor([3, 4, 2]), 1)
    masked = mask_tokens(ids, fork(torch.arange(1000), f"{seed}"), ordinary(), VOCABULARY.mask_id, rate)
    return ids, masked.ids, masked.chosen


def ordinary() -> Tensor:
    return torch.tensor([i not in VOCABULARY.special_ids for i in range(VOCABULARY.size)])


@pytest.mark.parametrize("rate", [0.15, 0.5, 1.0])
def test_masks_have_berts_shares(rate: float) -> None:
    ids, corrupted, chosen = draws(rate)
    maskable = ordinary()[ids]
    assert maskable.sum() > 100_000
    share = chosen.sum() / maskable.sum()
    assert share == pytest.approx(rate, abs=0.01)
    became_mask = (corrupted == VOCABULARY.mask_id)[chosen].float().mean().item()
    unchanged = (corrupted == ids)[chosen].float().mean().item()
    random_equal = 0.1 / 35  # a random replacement may be the token itself
    assert became_mask == pytest.approx(0.8, abs=0.015)
    assert unchanged == pytest.approx(0.1 + random_equal, abs=0.012)
    assert torch.equal(corrupted[~chosen], ids[~chosen])


def test_special_tokens_and_padding_are_never_chosen_nor_drawn() -> None:
    ids, corrupted, chosen = draws(1.0)
    special = ~ordinary()[ids]
    assert special.sum() > 10_000
    assert not chosen[special].any()
    assert chosen[~special].all()
    replaced = corrupted[chosen & (corrupted != VOCABULARY.mask_id) & (corrupted != ids)]
    counts = torch.bincount(replaced, minlength=VOCABULARY.size)
    assert not counts[~ordinary()].any()
    expected = counts.sum() / 35
    assert (counts[ordinary()] - expected).abs().max() < 6 * expected.sqrt()  # every ordinary token, equally often


def test_what_is_masked_of_a_text_depends_on_its_seed_alone() -> None:
    ids, corrupted, chosen = draws(0.3)
    seeds = fork(torch.arange(1000), "0")
    few = mask_tokens(F.pad(ids[40:43], (0, 7), value=1), seeds[40:43], ordinary(), 4, 0.3)  # other padding, too
    assert torch.equal(few.ids[:, :-7], corrupted[40:43])
    assert torch.equal(few.chosen[:, :-7], chosen[40:43])
    assert not torch.equal(mask_tokens(ids, seeds + 1, ordinary(), 4, 0.3).chosen, chosen)


@pytest.mark.parametrize(
    ("patches", "keep", "kept"), [(16, 0.5, 8), (16, 0.25, 4), (10, 0.26, 3), (9, 0.01, 1), (7, 1.0, 7), (1, 0.2, 1)]
)
def test_a_split_is_disjoint_and_complete(patches: int, keep: float, kept: int) -> None:
    visible, hidden = split_patches(torch.arange(50), (1, patches), keep)
    assert visible.shape == (50, kept)
    assert hidden.shape == (50, patches - kept)
    assert torch.equal(torch.cat([visible, hidden], dim=1).sort(dim=1).values, torch.arange(patches).expand(50, -1))


def test_splits_are_uniform_and_independent() -> None:
    visible, _ = split_patches(torch.arange(20_000), (2, 4), 0.25)
    pairs = torch.zeros(8, 8)
    pairs.index_put_((visible[:, 0], visible[:, 1]), torch.ones(20_000), accumulate=True)
    expected = 20_000 / 56
    assert not pairs.diagonal().any()
    assert (pairs[~torch.eye(8, dtype=torch.bool)] - expected).abs().max() < 5 * expected**0.5


# Masked language


def language_passes(chosen: Tensor, seed: int = 0) -> Passes:
    """Two joint passes with random states, of 3 and of 2 texts."""
    model, joint = encoder(), []
    for n, part in ((3, chosen[:3]), (2, chosen[3:])):
        ids, valid = texts([6] * n, seed + n)
        states = randn(n, 6, 32, seed=seed + n).requires_grad_()
        joint.append(JointPass({"text": Field(ids, torch.arange(n), valid)}, {"text": states}, {}, part))
    joint.append(JointPass({"image": Field(images(1), torch.arange(1))}, {"image": randn(1, 17, 32)}, {}, None))
    return Passes(model, {}, joint, counts={"masked_language": chosen.sum().clamp(min=1)})


def language_head(model: Any) -> MaskedLanguage:
    head = MaskedLanguage(MaskedLanguageConfig(), model)
    with torch.no_grad():
        head.bias.copy_(randn(VOCABULARY.size, seed=9))
        head.norm.weight.copy_(randn(32, seed=8))
    return head


def test_the_language_loss_is_the_cross_entropy_of_the_chosen_alone() -> None:
    chosen = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    passes = language_passes(chosen)
    head = language_head(passes.encoder)
    embedding = passes.encoder.get_parameter("tokenizers.text.embed.weight").double()
    losses = []
    for joint, part in zip(passes.joint, (chosen[:3], chosen[3:]), strict=False):
        for i, position in part.nonzero().tolist():
            state = head.norm(F.gelu(head.dense(joint.states["text"][i, position]))).double()
            logits = torch.stack([(state * row).sum() for row in embedding]) + head.bias.double()
            target = int(joint.inputs["text"].x[i, position])
            losses.append(torch.log(logits.exp().sum()) - logits[target])
    assert len(losses) == int(chosen.sum()) > 5
    (loss,) = head(passes).values()
    torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    torch.autograd.backward(loss)
    for joint, part in zip(passes.joint, (chosen[:3], chosen[3:]), strict=False):
        gradient = joint.states["text"].grad
        assert gradient is not None
        assert torch.equal(gradient.abs().amax(dim=-1) > 0, part)


def test_nothing_chosen_is_a_loss_of_0_with_gradients_of_0() -> None:
    passes = language_passes(torch.zeros(5, 6, dtype=torch.bool))
    head = language_head(passes.encoder)
    loss = head(passes)["masked_language"]
    assert loss == 0
    torch.autograd.backward(loss)
    assert all(p.grad is None or not p.grad.any() for p in (*head.parameters(), *passes.encoder.parameters()))


def test_without_text_there_is_no_language_term() -> None:
    passes = language_passes(torch.zeros(5, 6, dtype=torch.bool))
    assert language_head(passes.encoder)(passes._replace(joint=passes.joint[2:])) == {}


def test_the_embedding_learns_as_input_and_as_output() -> None:
    model = pretraining(config(masked_language=1))
    inputs = batch(["t", "it", "ta", "ita"])
    passes, loss = passes_of(model, inputs)
    weight = model.encoder.get_parameter("tokenizers.text.embed.weight")
    (both,) = torch.autograd.grad(loss.total, weight, retain_graph=True)
    detached = [joint._replace(states={n: s.detach() for n, s in joint.states.items()}) for joint in passes.joint]
    (output,) = torch.autograd.grad(
        model.objectives["masked_language"](passes._replace(joint=detached))["masked_language"], weight
    )
    as_input = (both - output).abs().amax(dim=1) > 1e-7
    assert (output.abs().amax(dim=1) > 0).all()  # every token of the vocabulary is a candidate
    assert as_input[VOCABULARY.mask_id]
    assert as_input[0]
    assert not as_input[3]  # <unk> is in no text
    assert 3 < as_input.sum() < VOCABULARY.size


# Masked region


def naive_target(modality: str, x: Tensor, patch: int) -> Tensor:
    """Patch number ``patch`` of one input, normalised; cut out without the encoder's help."""
    if modality == "image":
        row, column = divmod(patch, 4)
        values = x[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
    else:
        row, column = divmod(patch, 4)
        values = x[8 * column : 8 * column + 8, 8 * row : 8 * row + 8].T.flatten()
    values = values.double()
    mean = values.sum() / len(values)
    variance = (values - mean).square().sum() / (len(values) - 1)
    return (values - mean) / (variance + 1e-6).sqrt()


def test_the_region_losses_are_the_mean_error_of_hidden_patches() -> None:
    model = pretraining(config(masked_region=1))
    passes, loss = passes_of(model, batch(["i", "ita", "a", "it", "ita", "i"]))
    assert set(loss.terms) == {"masked_image", "masked_audio"}
    region: Any = model.objectives["masked_region"]
    for modality in ("image", "audio"):
        errors = []
        for joint in passes.joint:
            if modality not in joint.splits:
                continue
            split = joint.splits[modality]
            predicted = region.decoders[modality](joint.states[modality], split)
            for i in range(len(split.hidden)):
                for j, patch in enumerate(split.hidden[i].tolist()):
                    target = naive_target(modality, joint.inputs[modality].x[i], patch)
                    errors.append((predicted[i, j].double() - target).square().mean())
        assert len(errors) == {"image": 5 * 8, "audio": 3 * 4}[modality]
        term = loss.terms[f"masked_{modality}"].double()
        torch.testing.assert_close(term, torch.stack(errors).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_targets_are_the_hidden_patches_alone(modality: str) -> None:
    model = pretraining(config(masked_region=1))
    passes, loss = passes_of(model, batch(["ita", "ita", "ita"]))
    (joint,) = passes.joint
    x, split = joint.inputs[modality].x, joint.splits[modality]
    hidden = torch.zeros(model.encoder.patches(modality, x).shape[:2], dtype=torch.bool).scatter(1, split.hidden, True)
    # Which values of x lie in hidden patches: perturb one kind of them, with the encoder's states as they were.
    size = 4 if modality == "image" else 8
    grid = hidden.view(3, *((4, 4) if modality == "image" else (2, 4)))
    inside = grid.repeat_interleave(size, 1).repeat_interleave(size, 2)
    inside = inside[:, None].expand_as(x) if modality == "image" else inside.transpose(1, 2)
    other = randn(*x.shape, seed=5)
    for where, changes in ((~inside, False), (inside, True)):
        changed = {**joint.inputs, modality: joint.inputs[modality]._replace(x=torch.where(where, other, x))}
        terms = model.objectives["masked_region"](passes._replace(joint=[joint._replace(inputs=changed)]))
        assert (terms[f"masked_{modality}"] != loss.terms[f"masked_{modality}"]) == changes


def test_a_decoder_knows_where_patches_lie() -> None:
    decoder: Any = MaskedRegion(REGION, encoder()).decoders["image"]
    states = randn(2, 9, 32)
    split = split_patches(torch.arange(2), (4, 4), 0.5)
    predicted = decoder(states, split)
    assert predicted.shape == (2, 8, 48)
    order = torch.tensor([3, 0, 1, 2, 7, 6, 5, 4])
    moved = decoder(
        torch.cat([states[:, :1], states[:, 1:][:, order]], dim=1), split._replace(visible=split.visible[:, order])
    )
    torch.testing.assert_close(moved, predicted, rtol=0, atol=1e-5)
    moved = decoder(states, split._replace(hidden=split.hidden[:, order]))
    torch.testing.assert_close(moved, predicted[:, order], rtol=0, atol=1e-5)
    elsewhere = decoder(states, PatchSplit(split.visible[:, order], split.hidden))
    assert (elsewhere - predicted).abs().max() > 1e-3
    assert (predicted[:, 0] - predicted[:, 1]).abs().max() > 1e-3
    silent = decoder(torch.cat([0 * states[:, :1], states[:, 1:]], dim=1), split)
    assert (silent - predicted).abs().max() > 1e-3  # the prefix token is read, too


def test_nothing_hidden_is_no_term() -> None:
    whole = dataclasses.replace(config(masked_region=1), joint_keep=KeepConfig(1.0, 0.2))
    assert set(pretraining(whole)(batch(["ita", "it"]), seed=0).terms) == {"masked_audio"}


def test_patches_are_normalised_one_by_one() -> None:
    patches = 5 * randn(2, 3, 50) + 7
    got = normalise_patches(patches)
    torch.testing.assert_close(got.mean(dim=-1), torch.zeros(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(got.var(dim=-1), torch.ones(2, 3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalise_patches(3 * patches - 1), got, rtol=0, atol=1e-4)


def test_constant_patches_have_a_finite_loss_and_gradient() -> None:
    constant = torch.full((1, 2, 48), 0.3, requires_grad=True)
    got = normalise_patches(constant)
    torch.testing.assert_close(got, torch.zeros(1, 2, 48), rtol=0, atol=1e-3)
    inputs = batch(["ita", "ita"])
    black = {
        name: each._replace(x=torch.full_like(each.x, -1.0)) if name != "text" else each
        for name, each in inputs.fields.items()
    }
    model = pretraining()
    loss = model(inputs._replace(fields=black), seed=0)
    torch.autograd.backward(loss.total)
    assert all(term.isfinite() for term in loss.terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# All together


FULL = ["ita"] * 6


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    weights = {"contrastive": 0.7, "masked_language": 0.3, "masked_region": 2.0}
    loss = pretraining(config(**weights))(batch(FULL), seed=0)
    assert set(loss.terms) == TERMS
    pairs = ("image_text", "image_audio", "text_audio")
    weight = {**dict.fromkeys(pairs, 0.7), "masked_language": 0.3, "masked_image": 2.0, "masked_audio": 2.0}
    expected = sum(weight[name] * term for name, term in loss.terms.items())
    torch.testing.assert_close(loss.total, expected)
    assert all(term.ndim == 0 for term in (loss.total, *loss.terms.values()))


def test_weights_go_in_a_straight_line_to_their_ends() -> None:
    language = MaskedLanguageConfig(weight=0.5, weight_end=2.5)
    region = dataclasses.replace(REGION, weight=1.0, weight_end=0.0)
    model = pretraining(dataclasses.replace(config(contrastive=0.7), masked_language=language, masked_region=region))
    for progress, weights in ((0.0, (0.7, 0.5, 1.0)), (0.25, (0.7, 1.0, 0.75)), (1.0, (0.7, 2.5, 0.0))):
        loss = model(batch(FULL), seed=0, progress=progress)
        kinds = {"masked_language": weights[1], "masked_image": weights[2], "masked_audio": weights[2]}
        expected = {name: kinds.get(name, weights[0]) for name in TERMS}
        assert dict(loss.weights) == {name: weight for name, weight in expected.items() if weight > 0}
        assert loss.terms.keys() == loss.weights.keys()
        torch.testing.assert_close(loss.total, sum(expected[name] * term for name, term in loss.terms.items()))


def test_an_objective_costs_no_pass_while_its_weight_is_0() -> None:
    region = dataclasses.replace(REGION, weight=0.0, weight_end=1.0)
    model = pretraining(dataclasses.replace(config(contrastive=1), masked_region=region))
    text = int(batch(FULL).fields["text"].x.shape[1])
    unimodal = [(6, 9), (6, text), (6, 4)]
    assert lengths(model, batch(FULL), progress=0.0) == unimodal
    assert lengths(model, batch(FULL), progress=0.1) == [*unimodal, (6, 1 + 8 + text + 2 + 4)]
    model(batch(FULL), seed=0).total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("weights", "joint"),
    [
        ({"masked_language": 1.0}, [("text",), ("image", "text")]),
        ({"masked_region": 1.0}, [("image",), ("image", "audio"), ("image", "text")]),
    ],
)
def test_samples_from_which_nobody_learns_take_no_joint_pass(
    weights: dict[str, float], joint: list[tuple[str, ...]]
) -> None:
    model = pretraining(config(**weights))
    made = model.joint_inputs(batch(["i", "t", "ia", "it", "ia"]), 0, list(weights))
    assert sorted(tuple(each.inputs) for each in made) == sorted(joint)
    # Nor do they where an objective that would learn has weight 0 by now.
    both = pretraining(config(masked_language=1, masked_region=1))
    assert len(both.joint_inputs(batch(["i", "t"]), 0, list(weights))) == 1
    nothing = model(batch({"masked_language": ["i", "ia"], "masked_region": ["t", "t"]}[next(iter(weights))]), seed=0)
    assert not nothing.terms
    nothing.total.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_text_is_whole_while_nobody_predicts_it() -> None:
    language = MaskedLanguageConfig(weight=0.0, weight_end=1.0)
    model = pretraining(dataclasses.replace(config(masked_region=1), masked_language=language))
    for objectives, hidden in ((["masked_region"], False), (["masked_region", "masked_language"], True)):
        (joint,) = model.passes(batch(FULL), 0, False, objectives).joint
        assert (joint.chosen is not None) == hidden


def test_masks_of_the_joint_pass_are_of_the_kind_asked_for() -> None:
    masks = dataclasses.replace(CONFIG, joint_mask=MaskConfig(image="block", audio="frequency"))
    embeddings, joint = {}, {}
    for name, settings in (("plain", CONFIG), ("masks", masks)):
        passes, _ = passes_of(pretraining(settings), batch(["ita"] * 50))
        embeddings[name], joint[name] = passes.embeddings, passes.joint[0]
    split = joint["masks"].splits["audio"]
    assert all(set(row) in ({0, 1, 2, 3}, {4, 5, 6, 7}) for row in split.hidden.tolist())  # one of two rows
    rows, columns = joint["masks"].splits["image"].hidden // 4, joint["masks"].splits["image"].hidden % 4
    sizes = (rows.amax(1) - rows.amin(1) + 1) * (columns.amax(1) - columns.amin(1) + 1)
    assert sizes.max() <= 12  # eight patches and the rest of a line
    for name, each in embeddings["plain"].items():  # the unimodal pass hides at random
        assert torch.equal(each.x, embeddings["masks"][name].x)


def test_whole_words_are_hidden_in_the_joint_pass() -> None:
    language = MaskedLanguageConfig(weight=1, whole_words=True, rate_paired=0.5)
    settings = dataclasses.replace(config(masked_language=1), masked_language=language)
    continues = torch.arange(VOCABULARY.size) > 20
    model = Pretraining(encoder(), settings, continues)
    passes, _ = passes_of(model, batch(["it"] * 100))
    (joint,) = passes.joint
    ids, chosen = joint.inputs["text"].x, joint.chosen
    assert chosen is not None
    inside = continues[ids[:, 2:]]  # the token before is an ordinary one, too
    assert inside.sum() > 50
    assert torch.equal(chosen[:, 2:][inside], chosen[:, 1:-1][inside])
    assert not torch.equal(chosen[:, 2:], chosen[:, 1:-1])
    assert "continues" not in model.state_dict()
    with pytest.raises(ValueError, match="whole_words=true: needs to know which ids continue a word"):
        Pretraining(encoder(), settings)


def test_gradients_on_the_trunk_and_their_cosines() -> None:
    model = pretraining(config(contrastive=0.7, masked_language=0.3, masked_region=2))
    trunk = list(model.encoder.blocks.parameters())
    loss = model(batch(FULL), seed=0)
    found = trunk_gradients(loss, trunk)
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.total.backward()  # the graph is still there, and only now there are gradients
    together = torch.cat([parameter.grad.flatten() for parameter in trunk if parameter.grad is not None])

    weight = {"masked_language": 0.3, "masked_image": 2.0, "masked_audio": 2.0}
    pulls = {}
    for name in TERMS:
        term = model(batch(FULL), seed=0).terms[name]
        parts = torch.autograd.grad(term, trunk, allow_unused=True)
        whole = [torch.zeros_like(p) if part is None else part for part, p in zip(parts, trunk, strict=True)]
        pulls[name] = weight.get(name, 0.7) * torch.cat([part.flatten() for part in whole])
    torch.testing.assert_close(torch.stack(list(pulls.values())).sum(dim=0), together, rtol=1e-3, atol=1e-5)
    expected = {f"trunk_norm/{name}": pull.norm().item() for name, pull in pulls.items()}
    for one, other in itertools.combinations(loss.terms, 2):
        cosine = (pulls[one] @ pulls[other] / (pulls[one].norm() * pulls[other].norm())).item()
        expected[f"trunk_cosine/{one}/{other}"] = cosine
    assert len(expected) == 6 + 15
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert min(expected.values()) < -1e-3


def test_a_term_that_does_not_reach_the_trunk_pulls_with_0() -> None:
    model = pretraining(config(masked_language=1, masked_region=1))
    found = trunk_gradients(model(batch(["t"]), seed=0), model.encoder.blocks.parameters())
    assert found.keys() == {"trunk_norm/masked_language"}
    bias = model.objectives["masked_language"].get_parameter("bias").square().sum()
    loss = Loss(bias, {"one": bias, "other": bias}, {"one": 1.0, "other": 2.0})
    found = trunk_gradients(loss, model.encoder.blocks.parameters())
    assert found == {"trunk_norm/one": 0, "trunk_norm/other": 0, "trunk_cosine/one/other": 0}


def test_the_objective_that_the_docs_add_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    docs = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", docs, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith(("from", "import"))]) <= 30
    (tmp_path / "uniformity.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    written = importlib.import_module("uniformity")
    for line in ('"uniformity": Uniformity,', "uniformity: UniformityConfig = field(default_factory=UniformityConfig)"):
        assert f"`{line}`" in docs

    others = vars(config(masked_language=1))
    monkeypatch.setitem(OBJECTIVES, "uniformity", written.Uniformity)
    new_field = ("uniformity", Any, dataclasses.field(default_factory=written.UniformityConfig))
    make: Any = dataclasses.make_dataclass("Extended", [new_field], bases=(ObjectivesConfig,))
    settings = make(**others, uniformity=written.UniformityConfig(weight=0.5))
    model = pretraining(settings)
    loss = model(batch(["ita", "it", "ta"]), seed=0)
    names = {"uniformity_image", "uniformity_text", "uniformity_audio"}
    assert set(loss.terms) == names | {"masked_language"}
    expected = loss.terms["masked_language"] + sum(0.5 * loss.terms[name] for name in names)
    torch.testing.assert_close(loss.total, expected)
    before = loss.terms["uniformity_text"].item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        model(batch(["ita", "it", "ta"]), seed=0).total.backward()
        optimizer.step()
    assert model(batch(["ita", "it", "ta"]), seed=0).terms["uniformity_text"].item() < before - 0.1
    with pytest.raises(ValueError, match=r"objectives\.uniformity\.weight=-1: allowed is 0 or more"):
        make(uniformity=written.UniformityConfig(weight=-1))


def test_what_idles_depends_on_what_is_embedded_and_not_on_what_the_batch_has() -> None:
    """A rank that has sounds, but none in a pair, still gets gradients of zeros where the others' pairs have some."""
    model = pretraining(dataclasses.replace(config(contrastive=1), contrastive=ContrastiveConfig(cached=True)))
    parts = batch(["it", "ia", "ia", "it", "it", "a", "it", "it", "it"]).split(3)
    for part, together in zip(parts, model.together(parts, seed=0), strict=True):
        model.zero_grad()
        model(part, seed=0, together=together).total.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_weights_do_not_change_the_terms() -> None:
    light = pretraining(config(contrastive=0.1, masked_language=0.1, masked_region=0.1))(batch(FULL), seed=0).terms
    heavy = pretraining(config(contrastive=1, masked_language=5, masked_region=9))(batch(FULL), seed=0).terms
    for name in TERMS:
        torch.testing.assert_close(light[name], heavy[name])


@pytest.mark.parametrize("left_out", ["contrastive", "masked_language", "masked_region"])
def test_weight_0_removes_an_objective_with_its_parameters(left_out: str) -> None:
    names = {"contrastive", "masked_language", "masked_region"} - {left_out}
    model = pretraining(config(**dict.fromkeys(names, 1.0)))
    assert set(model.objectives) == names
    assert not any(left_out in name for name, _ in model.named_parameters())
    terms = set(model(batch(FULL), seed=0).terms)
    gone = {
        "contrastive": {"image_text", "image_audio", "text_audio"},
        "masked_language": {"masked_language"},
        "masked_region": {"masked_image", "masked_audio"},
    }
    assert terms == TERMS - gone[left_out]


def lengths(model: Pretraining, inputs: Batch, whole: bool = False, progress: float = 0.0) -> list[tuple[int, int]]:
    """(samples, tokens) of every pass through the trunk."""
    seen: list[tuple[int, int]] = []
    handle = model.encoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    model(inputs, seed=0, whole=whole, progress=progress)
    handle.remove()
    return seen


def test_passes_see_the_share_of_patches_asked_for() -> None:
    model = pretraining(
        dataclasses.replace(CONFIG, keep=UnimodalKeepConfig(0.75, 0.25), joint_keep=KeepConfig(0.5, 0.125))
    )
    text = int(batch(FULL).fields["text"].x.shape[1])
    assert lengths(model, batch(FULL)) == [(6, 1 + 12), (6, text), (6, 2 + 2), (6, 1 + 8 + text + 2 + 1)]
    whole = [(6, 1 + 16), (6, text), (6, 2 + 8), (6, 1 + 8 + text + 2 + 1)]
    assert lengths(model, batch(FULL), whole=True) == whole


def test_the_unimodal_pass_sees_part_of_long_texts_wherever_they_stand() -> None:
    keep = UnimodalKeepConfig(image=1.0, audio=1.0, text=0.5)  # of 12 tokens
    model = pretraining(dataclasses.replace(config(contrastive=1), keep=keep))
    inputs = batch(["ta"] * 6)
    text = inputs.fields["text"]
    assert text.valid is not None
    counts = text.valid.sum(1)
    assert counts.min() <= 6 < counts.max()
    assert lengths(model, inputs)[0] == (6, 6)
    assert lengths(model, inputs, whole=True)[0] == (6, int(counts.max()))

    embeddings = passes_of(model, inputs)[0].embeddings["text"].x
    short = counts <= 6  # nothing of them is left out, so they are as in the whole
    torch.testing.assert_close(embeddings[short], model.encoder("text", text)[1][short])
    assert not torch.isclose(embeddings[~short], model.encoder("text", text)[1][~short]).all(dim=1).any()
    # Alone, with no padding of others, a text loses the same tokens.
    seeds = torch.arange(6)
    for row in range(6):
        own = Field(text.x[row : row + 1, : int(counts[row])], torch.tensor([0]))
        sound = inputs.fields["audio"].select(torch.tensor([row]))._replace(rows=torch.tensor([0]))
        alone = Batch({"text": own, "audio": sound}, 1, ["0"], seeds=seeds[row : row + 1])
        torch.testing.assert_close(passes_of(model, alone)[0].embeddings["text"].x, embeddings[row : row + 1])


def test_objectives_that_are_off_cost_no_pass() -> None:
    text = int(batch(FULL).fields["text"].x.shape[1])
    assert lengths(pretraining(config(contrastive=1)), batch(FULL)) == [(6, 9), (6, text), (6, 4)]
    assert lengths(pretraining(config(masked_region=1)), batch(FULL)) == [(6, 1 + 8 + text + 2 + 4)]


def test_whole_inputs_give_the_embeddings_of_the_plain_encoder() -> None:
    model = pretraining(config(contrastive=1))
    inputs = batch(["ita", "ta", "ia", "it"])
    passes, _ = passes_of(model, inputs, whole=True)
    for name, each in inputs.fields.items():
        torch.testing.assert_close(passes.embeddings[name].x, model.encoder(name, each)[1])
        assert torch.equal(passes.embeddings[name].rows, each.rows)


@pytest.mark.parametrize("alone", [1.0, 0.5])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.25])
def test_the_joint_pass_takes_its_share_of_the_rows(share: float, alone: float) -> None:
    model = pretraining(dataclasses.replace(CONFIG, joint_share=share, joint_share_alone=alone))
    inputs = batch(["ita", "it", "a", "ita", "t", "i", "ta", "ita"])
    passes, _ = passes_of(model, inputs)
    taken = {int(row) for joint in passes.joint for each in joint.inputs.values() for row in each.rows}
    single = {2, 4, 5}
    rows = {row for row in joint_rows(0, 8, share, 0).tolist() if row not in single}
    assert taken == rows | {row for row in joint_rows(0, 8, alone, 0).tolist() if row in single}
    assert abs(len(set(joint_rows(0, 8, share, 0).tolist())) - 8 * share) < 1


def test_samples_of_one_modality_are_not_made_ready_for_a_contrast() -> None:
    model = pretraining(config(contrastive=1))
    inputs = batch(["ita", "it", "a", "ita", "t", "i", "ta", "ita"])
    passes, _ = passes_of(model, inputs, whole=True)
    for name, rows in {"image": [0, 1, 3, 7], "text": [0, 1, 3, 6, 7], "audio": [0, 3, 6, 7]}.items():
        own = [inputs.fields[name].rows.tolist().index(row) for row in rows]
        assert passes.embeddings[name].rows.tolist() == rows
        torch.testing.assert_close(passes.embeddings[name].x, model.encoder(name, inputs.fields[name])[1][own])
    assert passes_of(model, batch(["i", "t", "a"]))[0].embeddings == {}
    loss = model(batch(["i", "t", "a"]), seed=0)
    assert loss.total == 0
    loss.total.backward()


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.3, 0.125, 0.01])
def test_one_row_of_each_stretch_takes_the_joint_pass_whoever_has_it(share: float) -> None:
    whole = joint_rows(0, 1200, share, 5)
    assert torch.equal(whole, torch.unique(whole))
    assert abs(len(whole) - 1200 * share) <= 1
    if share in (1.0, 0.5, 0.125, 0.01):
        assert torch.equal(whole.mul(share).long(), torch.arange(int(1200 * share)))  # one of each 1 / share
    for size in (40, 7):
        parts = [joint_rows(first, min(size, 1200 - first), share, 5) + first for first in range(0, 1200, size)]
        assert torch.equal(torch.cat(parts), whole)
    if 0.1 < share < 1:
        assert not torch.equal(joint_rows(0, 1200, share, 6), whole)
        often = torch.zeros(40)
        for seed in range(2000):
            often[joint_rows(0, 40, share, seed)] += 1
        assert (often / 2000 - share).abs().max() < 0.05  # more than four standard deviations


def test_the_same_seed_gives_the_same_loss_and_another_seed_another() -> None:
    model, inputs = pretraining(), batch(FULL)
    torch.manual_seed(1)
    one = model(inputs, seed=3)
    torch.manual_seed(2)
    two, other = model(inputs, seed=3), model(inputs, seed=4)
    assert torch.equal(one.total, two.total)
    assert all(one.terms[name] != other.terms[name] for name in TERMS)


def test_text_in_company_hides_more_tokens_than_text_alone() -> None:
    language = MaskedLanguageConfig(weight=1, rate=0.1, rate_paired=0.9)
    model = pretraining(dataclasses.replace(config(masked_language=1), masked_language=language))
    passes, _ = passes_of(model, batch(["t", "it"] * 100))
    shares = {}
    for joint in passes.joint:
        assert joint.chosen is not None
        shares[len(joint.inputs)] = joint.chosen.sum() / model.ordinary[joint.inputs["text"].x].sum()
    assert shares[1] == pytest.approx(0.1, abs=0.05)
    assert shares[2] == pytest.approx(0.9, abs=0.05)


def test_the_joint_pass_reads_corrupted_text_and_keeps_the_clean_one_as_target() -> None:
    model = pretraining(config(contrastive=1, masked_language=1))
    inputs = batch(["it"] * 60)
    read: list[Field] = []
    model.encoder.tokenizers["text"].register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    passes, _ = passes_of(model, inputs)
    (joint,) = passes.joint
    assert joint.chosen is not None
    clean = inputs.fields["text"].x
    assert torch.equal(joint.inputs["text"].x, clean)
    unimodal, corrupted = (each.x for each in read)
    assert torch.equal(unimodal, clean)
    assert torch.equal(corrupted[~joint.chosen], clean[~joint.chosen])
    assert (corrupted == VOCABULARY.mask_id)[joint.chosen].float().mean().item() == pytest.approx(0.8, abs=0.1)
    torch.testing.assert_close(passes.embeddings["text"].x, model.encoder("text", inputs.fields["text"])[1])


PATTERNS = ["", "i", "t", "a", "it", "ia", "ta", "ita"]


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_a_partition_by_what_rows_have(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    presence = [PATTERNS[i] for i in torch.randint(8, (12,), generator=generator).tolist()]
    inputs, rows = batch(presence, seed), torch.arange(12)[torch.rand(12, generator=generator) < (1 + seed) / 9]
    seen = []
    for group in group_by_presence(inputs, rows):
        names = "".join(name[0] for name in group)
        (members, *others) = [each.rows.tolist() for each in group.values()]
        assert all(other == members for other in others)
        assert members == sorted(members)
        assert all(presence[row] == names for row in members)
        seen += members
        for name, each in group.items():
            whole = inputs.fields[name]
            positions = [whole.rows.tolist().index(row) for row in members]
            assert torch.equal(each.x, whole.x[positions])
            if whole.valid is not None:
                assert each.valid is not None
                assert torch.equal(each.valid, whole.valid[positions])
    assert sorted(seen) == [row for row in rows.tolist() if presence[row]]
    assert len({tuple(group) for group in group_by_presence(inputs, rows)}) == len(group_by_presence(inputs, rows))


@pytest.mark.parametrize(
    ("presence", "terms"),
    [
        (["it"] * 4, {"image_text", "masked_language", "masked_image"}),
        (["a"] * 4, {"masked_audio"}),
        (["t"] * 4, {"masked_language"}),
        (["i", "t", "a", "ia", "ta", "ta"], TERMS - {"image_text", "image_audio"}),
        (["ita"], {"masked_language", "masked_image", "masked_audio"}),
    ],
    ids=["no audio", "audio", "text", "mixed", "one sample"],
)
def test_batches_that_lack_modalities_train_without_their_terms(presence: list[str], terms: set[str]) -> None:
    model = pretraining()
    loss = model(batch(presence), seed=0)
    assert set(loss.terms) == terms
    torch.autograd.backward(loss.total)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    absent = [name for name in ("image", "text", "audio") if not any(name[0] in each for each in presence)]
    for name in absent:
        for parameter in model.encoder.tokenizers[name].parameters():
            assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("presence", [["i", "t"], ["", ""]], ids=["no pair", "no modality"])
def test_a_batch_that_feeds_no_objective_is_a_step_of_zeros(presence: list[str]) -> None:
    model = pretraining(config(contrastive=1) if "i" in presence else CONFIG)
    loss = model(batch(presence), seed=0)
    assert loss.terms == {}
    assert loss.total == 0
    torch.autograd.backward(loss.total)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


SOME = [(3, True)]
ALL = [(size, learning) for size in (3, 5, 1) for learning in (True, False)]  # torch treats sizes of 1 apart


@pytest.mark.parametrize("cases", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_compiled_blocks_stay_compiled_whatever_a_batch_has(
    cases: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[object] = []

    def backend(graph: nn.Module, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch.compiler.reset()
    model = encoder(model=dataclasses.replace(MODEL, sharing="ffn"))
    model.compile_blocks()
    with dynamo.patch(fail_on_recompile_limit_hit=True):  # else it is a line in the log
        for size, learning in cases:
            for pattern in PATTERNS[1:]:
                fields = batch([pattern] * size).fields
                with torch.set_grad_enabled(learning):
                    model.trunk({name: model.tokens(name, each) for name, each in fields.items()})
                    if len(fields) == 1:
                        model.features(*next(iter(fields.items())))
    torch.compiler.reset()
    assert len(graphs) == 10 * len(cases)


def test_rows_that_have_nothing_change_nothing() -> None:
    model = pretraining(config(contrastive=1, masked_language=1))
    inputs = batch(["ita", "it", "ita"])
    one, other = model(inputs, seed=0), model(inputs._replace(size=5, keys=[*inputs.keys, "x", "y"]), seed=0)
    assert one.terms.keys() == other.terms.keys()
    torch.testing.assert_close(one.total, other.total)


def test_every_parameter_has_a_gradient() -> None:
    model = pretraining()
    model(batch(FULL), seed=0).total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("sharing", ["all", "ffn", "none"])
@pytest.mark.parametrize("presence", [["i"] * 4, ["t"] * 4, ["it", "t", "i", "it"], ["a", "a", "ta", "a"], [""] * 3])
def test_what_a_batch_lacks_gets_gradients_of_0(presence: list[str], sharing: str) -> None:
    model = pretraining(model=dataclasses.replace(MODEL, sharing=sharing))
    model(batch(presence), seed=0).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        for modality in ("image", "text", "audio"):
            if f".{modality}." in name and modality[0] not in "".join(presence):
                assert not parameter.grad.any()


def test_samples_of_another_text_length_do_not_change_the_losses() -> None:
    """Padding to a longer text in the batch changes neither the contrastive nor the masked-region losses."""
    model = pretraining(config(contrastive=1, masked_region=1))
    inputs = batch(FULL)
    text = inputs.fields["text"]
    assert text.valid is not None
    longer = Field(F.pad(text.x, (0, 3), value=VOCABULARY.pad_id), text.rows, F.pad(text.valid, (0, 3)))
    one = model(inputs, seed=0).terms
    other = model(inputs._replace(fields={**inputs.fields, "text": longer}), seed=0).terms
    for name, term in one.items():
        torch.testing.assert_close(other[name], term, rtol=1e-5, atol=1e-5)


def test_a_few_steps_on_one_batch_lower_every_term() -> None:
    torch.manual_seed(0)
    model = Pretraining(encoder(), CONFIG)
    inputs = batch(["ita"] * 6 + ["it", "t", "a"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    start = {name: term.item() for name, term in model(inputs, seed=0).terms.items()}
    for _ in range(60):
        optimizer.zero_grad()
        loss: Loss = model(inputs, seed=0)
        torch.autograd.backward(loss.total)
        optimizer.step()
    end = {name: term.item() for name, term in model(inputs, seed=0).terms.items()}
    assert set(end) == TERMS
    ratios = {name: end[name] / start[name] for name in TERMS}
    assert all(ratio < 0.8 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectivesConfig(keep=UnimodalKeepConfig(image=0.0)), r"objectives\.keep\.image=0\.0: allowed"),
        (lambda: ObjectivesConfig(joint_keep=KeepConfig(audio=1.1)), r"objectives\.joint_keep\.audio=1\.1: allowed"),
        (lambda: ObjectivesConfig(joint_mask=MaskConfig(image="time")), r"joint_mask\.image=time: .* random, block$"),
        (lambda: ObjectivesConfig(joint_mask=MaskConfig(audio="row")), r"joint_mask\.audio=row: .* time, frequency, "),
        (
            lambda: ObjectivesConfig(masked_language=MaskedLanguageConfig(weight_end=-0.5)),
            r"objectives\.masked_language\.weight_end=-0\.5: allowed is 0 or more, or null",
        ),
        (lambda: ObjectivesConfig(joint_share=0.0), r"objectives\.joint_share=0\.0: allowed"),
        (lambda: ObjectivesConfig(final_whole=-0.1), r"objectives\.final_whole=-0\.1: allowed"),
        (lambda: config(contrastive=-1), r"objectives\.contrastive\.weight=-1: allowed"),
        (config, "every objective has weight 0"),
        (lambda: ContrastiveConfig(temperature=0.005), r"objectives\.contrastive\.temperature=0\.005: allowed"),
        (lambda: MaskedLanguageConfig(rate=0.0), r"objectives\.masked_language\.rate=0\.0: allowed"),
        (lambda: MaskedLanguageConfig(rate_paired=1.5), r"objectives\.masked_language\.rate_paired=1\.5: allowed"),
        (lambda: MaskedRegionConfig(decoder_depth=0), r"objectives\.masked_region\.decoder_depth=0: allowed"),
        (lambda: MaskedRegionConfig(decoder_width=10), r"objectives\.masked_region\.decoder_heads=4: "),
    ],
)
def test_settings_out_of_bounds_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
