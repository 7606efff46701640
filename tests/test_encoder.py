import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.batch import Field
from data.errors import UserError
from data.transforms import AudioView, ImageView, TextView, Views
from pretrain.model.encoder import SCHEMA, Encoder
from pretrain.model.layers import attention, gather_tokens
from pretrain.model.tokenizers import ModelConfig
from tests.samples import MODEL, VIEWS, VOCABULARY, encoder, images, spectrograms, texts


def field(modality: str, n: int, seed: int = 0) -> Field:
    if modality == "text":
        ids, valid = texts([4 + i for i in range(n)], seed)
        return Field(ids, torch.arange(n), valid)
    return Field({"image": images, "audio": spectrograms}[modality](n, seed), torch.arange(n))


def padded(text: Field, by: int) -> Field:
    assert text.valid is not None
    return Field(F.pad(text.x, (0, by), value=VOCABULARY.pad_id), text.rows, F.pad(text.valid, (0, by)))


def every_order(n: int, patches: int, seed: int = 0) -> Tensor:
    return torch.rand(n, patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)


def test_padding_changes_no_text_features() -> None:
    model, text = encoder(), field("text", 4)
    features, embeddings = model("text", text)
    more_features, more_embeddings = model("text", padded(text, 4))
    torch.testing.assert_close(more_features, features, rtol=0, atol=1e-6)
    torch.testing.assert_close(more_embeddings, embeddings, rtol=0, atol=1e-6)
    for i in range(4):  # each alone, without any padding
        alone, _ = model("text", Field(text.x[i : i + 1, : 4 + i], torch.arange(1)))
        torch.testing.assert_close(alone, features[i : i + 1], rtol=0, atol=1e-6)


def test_the_ids_of_padding_change_nothing() -> None:
    model, text = encoder(), field("text", 4)
    assert text.valid is not None
    other = text._replace(x=text.x.masked_fill(~text.valid, 7))
    torch.testing.assert_close(model("text", other)[0], model("text", text)[0], rtol=0, atol=1e-6)


def test_padding_changes_nothing_in_a_joint_pass() -> None:
    model = encoder()
    inputs = {name: field(name, 3) for name in ("image", "text", "audio")}
    states = model.trunk({name: model.tokens(name, each) for name, each in inputs.items()})
    inputs["text"] = padded(inputs["text"], 5)
    more = model.trunk({name: model.tokens(name, each) for name, each in inputs.items()})
    for name in ("image", "audio"):
        torch.testing.assert_close(more[name], states[name], rtol=0, atol=1e-6)
    valid = inputs["text"].valid
    assert valid is not None
    torch.testing.assert_close(more["text"][valid], states["text"][valid[:, :-5]], rtol=0, atol=1e-6)


def test_text_positions_count_from_behind_the_padding_id() -> None:
    model, text = encoder(), field("text", 3)
    tokenizer: Any = model.tokenizers["text"]
    for ids, length in zip(text.x, (4, 5, 6), strict=True):
        positions = torch.arange(length) + VOCABULARY.pad_id + 1
        expected = tokenizer.norm(tokenizer.embed.weight[ids[:length]] + tokenizer.positions.weight[positions])
        got = model.tokens("text", text).x[ids.eq(text.x).all(dim=1)][0, :length]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    longest, valid = texts([12])
    assert model.tokens("text", Field(longest, torch.arange(1), valid)).x.shape == (1, 12, 32)


def test_kept_tokens_are_those_of_the_whole_text() -> None:
    model, inputs = encoder(), field("text", 3)
    valid = torch.arange(inputs.x.shape[1]) < torch.tensor([[6], [5], [3]])
    inputs = inputs._replace(valid=valid)
    keep = torch.tensor([[0, 2, 4, 5], [0, 1, 3, 4], [0, 1, 2, 5]])
    whole, kept = model.tokens("text", inputs), model.tokens("text", inputs, keep)
    assert whole.valid is not None
    assert kept.valid is not None
    assert torch.equal(kept.valid, torch.tensor([[True] * 4, [True] * 4, [True] * 3 + [False]]))
    for row in range(3):
        assert torch.equal(kept.x[row], whole.x[row, keep[row]])


@pytest.mark.parametrize(("modality", "patches"), [("image", 16), ("audio", 8)])
def test_all_patches_in_any_order_equal_the_whole(modality: str, patches: int) -> None:
    model, inputs = encoder(), field(modality, 3)
    features, _ = model(modality, inputs)
    states = model.encode(modality, inputs, every_order(3, patches))
    torch.testing.assert_close(model.pool(modality, states), features, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("modality", "patches"), [("image", 16), ("audio", 8)])
def test_dropped_patches_have_no_influence(modality: str, patches: int) -> None:
    model, inputs = encoder(), field(modality, 3)
    x = inputs.x.requires_grad_()
    keep = every_order(3, patches)[:, : patches // 2]
    states = model.encode(modality, inputs._replace(x=x), keep)
    assert states.shape[1] == {"image": 1, "audio": 2}[modality] + patches // 2
    torch.autograd.backward(model.pool(modality, states).square().sum())
    assert x.grad is not None
    seen = model.patches(modality, x.grad).abs().amax(dim=-1) > 0
    assert torch.equal(seen, torch.zeros(3, patches, dtype=torch.bool).scatter(1, keep, True))


def test_kept_patches_are_each_samples_own() -> None:
    x = torch.arange(2 * 4 * 3).view(2, 4, 3)
    kept = gather_tokens(x, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(kept, torch.stack([x[0, [3, 0]], x[1, [1, 1]]]))


def test_the_linear_patch_embedding_equals_a_convolution() -> None:
    model, inputs = encoder(), field("image", 2)
    tokenizer: Any = model.tokenizers["image"]
    kernel = tokenizer.embed.weight.view(32, 3, 4, 4)
    convolved = F.conv2d(inputs.x, kernel, tokenizer.embed.bias, stride=4).flatten(2).transpose(1, 2)
    tokens = model.tokens("image", inputs)
    assert tokens.valid is None
    torch.testing.assert_close(tokens.x[:, 1:], convolved + tokenizer.positions[1:], rtol=0, atol=1e-5)
    first = (tokenizer.prefix[0] + tokenizer.positions[0]).expand(2, -1)
    torch.testing.assert_close(tokens.x[:, 0], first, rtol=0, atol=1e-6)


def test_audio_patches_run_over_time_first_and_low_frequencies_come_first() -> None:
    model = encoder()
    x = torch.arange(32 * 16, dtype=torch.float32).view(1, 32, 16)  # frames, mels
    got = model.patches("audio", x)[0]
    expected = [
        [x[0, 8 * column + frame, 8 * row + mel] for mel in range(8) for frame in range(8)]
        for row in range(2)
        for column in range(4)
    ]
    assert torch.equal(got, torch.tensor(expected))


def test_image_patches_run_row_by_row() -> None:
    x = images(1)
    expected = [x[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] for row in range(4) for column in range(4)]
    assert torch.equal(encoder().patches("image", x)[0], torch.stack(expected).flatten(1))


def qkv(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [(2 * torch.randn(3, 4, 9, 8, generator=generator)).to(dtype).requires_grad_() for _ in range(3)]
    return tensors, torch.arange(9) < torch.tensor([9, 5, 1])[:, None]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """One query at a time, in float64, over the valid keys only."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for i in range(len(q)):
        allowed = torch.ones(k.shape[2], dtype=torch.bool) if valid is None else valid[i]
        for head in range(q.shape[1]):
            for position in range(q.shape[2]):
                scores = k[i, head, allowed] @ q[i, head, position] / math.sqrt(q.shape[-1])
                out[i, head, position] = scores.softmax(dim=0) @ v[i, head, allowed]
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_attention_equals_the_definition(dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    (q, k, v), lengths = qkv(dtype)
    valid = lengths if masked else None
    got = attention(q, k, v, valid)
    assert got.dtype == dtype
    expected = naive_attention(q, k, v, valid)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((got.float() * weights).sum(), (q, k, v))
    references = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient.float(), reference.float(), rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_bf16_attention_on_the_cpu_equals_the_fused_kernel(masked: bool) -> None:
    (q, k, v), lengths = qkv(torch.bfloat16)
    mask = lengths[:, None, None, :] if masked else None
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    got = attention(q, k, v, lengths if masked else None)
    torch.testing.assert_close(got.float(), fused.float(), rtol=0, atol=6e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tokens", "kept_quadratic"),
    [(torch.bfloat16, 1024, True), (torch.bfloat16, 1025, False), (torch.float32, 1024, False)],
)
def test_only_short_inputs_in_bf16_keep_their_attention_weights(
    dtype: torch.dtype, tokens: int, kept_quadratic: bool, masked: bool
) -> None:
    kept: list[int] = []
    q, k, v = (torch.randn(1, 1, tokens, 8, dtype=dtype, requires_grad=True) for _ in range(3))

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(q, k, v, torch.arange(tokens)[None] < 900 if masked else None)
    assert (max(kept) >= tokens**2) == kept_quadratic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_attends_to_invalid_tokens(dtype: torch.dtype) -> None:
    (q, k, v), valid = qkv(dtype)
    other_k, other_v = (torch.where(valid[:, None, :, None], x, torch.full_like(x, 99)) for x in (k, v))
    assert torch.equal(attention(q, k, v, valid), attention(q, other_k, other_v, valid))


def test_bf16_features_are_near_those_in_fp32() -> None:
    model = encoder()
    for name in VIEWS.used:
        inputs = field(name, 3)
        exact, _ = model(name, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough, _ = model(name, inputs)
        assert F.cosine_similarity(rough.float(), exact).min() > 0.999


def test_a_block_is_pre_norm_with_residual_paths() -> None:
    block: Any = encoder().blocks[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = nn.TransformerEncoderLayer(
            32, 4, 64, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).eval()
        names = {
            "self_attn.in_proj_weight": block.attention["all"].qkv.weight,
            "self_attn.in_proj_bias": block.attention["all"].qkv.bias,
            "self_attn.out_proj.weight": block.attention["all"].out.weight,
            "self_attn.out_proj.bias": block.attention["all"].out.bias,
            **{f"{a}.{part}": block.get_parameter(f"{b}.{part}") for a, b in PARTS for part in ("weight", "bias")},
        }
        stock.load_state_dict(names)
        valid = torch.arange(5) < torch.tensor([5, 3])[:, None]
        torch.testing.assert_close(block(x), stock(x), rtol=0, atol=1e-5)
        padded_states = stock(x, src_key_padding_mask=~valid)[1, :3]
        torch.testing.assert_close(block(x, valid)[1, :3], padded_states, rtol=0, atol=1e-5)


PARTS = (
    ("linear1", "feed_forward.all.fc1"),
    ("linear2", "feed_forward.all.fc2"),
    ("norm1", "attention.all.norm"),
    ("norm2", "feed_forward.all.norm"),
)


@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_a_joint_pass_of_one_modality_is_the_unimodal_pass(modality: str) -> None:
    model, inputs = encoder(), field(modality, 3)
    joint = model.trunk({modality: model.tokens(modality, inputs)})
    assert list(joint) == [modality]
    features = model.pool(modality, joint[modality])
    got_features, got_embeddings = model(modality, inputs)
    torch.testing.assert_close(got_features, features, rtol=0, atol=1e-6)
    torch.testing.assert_close(got_embeddings, model.project(modality, features), rtol=0, atol=1e-6)
    assert features.shape == (3, 32)
    assert got_embeddings.shape == (3, 16)


@pytest.mark.parametrize("sharing", ["all", "none"])
@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_states_that_pooling_does_not_read_are_not_made_and_not_missed(modality: str, sharing: str) -> None:
    model = encoder(model=dataclasses.replace(MODEL, sharing=sharing)).double()
    inputs = field(modality, 3)
    inputs = inputs if modality == "text" else inputs._replace(x=inputs.x.double())
    keep = None if modality == "text" else every_order(3, 8)[:, :5]

    def gradients(features: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        torch.autograd.backward((features * torch.linspace(-1, 1, 32, dtype=torch.float64)).sum())
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = model.pool(modality, model.encode(modality, inputs, keep))
    expected = gradients(whole)
    for model.recompute in (False, True):
        features = model.features(modality, inputs, keep)
        torch.testing.assert_close(features, whole, rtol=1e-12, atol=1e-12)
        got = gradients(features)
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    made: list[int] = []
    with torch.no_grad():
        hooks = [
            part.register_forward_hook(lambda _, __, out: made.append(out.shape[1]))
            for name, part in model.blocks.named_modules()
            if name.endswith("fc1")
        ]
        model.features(modality, inputs, keep)
    for hook in hooks:
        hook.remove()
    assert made[-1] == {"image": 1, "text": 1, "audio": 2}[modality]
    assert all(each > 2 for each in made[:-1])


def test_the_first_states_alone_can_be_had_of_one_stream_only() -> None:
    model = encoder()
    streams = {name: model.tokens(name, field(name, 2)) for name in ("image", "audio")}
    with pytest.raises(ValueError, match="of one stream"):
        model.trunk(streams, first=1)


def test_a_joint_pass_is_one_sequence_in_any_order() -> None:
    model = encoder()
    inputs = {name: field(name, 3) for name in ("image", "text", "audio")}
    forwards = model.trunk({name: model.tokens(name, each) for name, each in inputs.items()})
    backwards = model.trunk({name: model.tokens(name, inputs[name]) for name in reversed(inputs)})
    assert {name: states.shape[1] for name, states in forwards.items()} == {"image": 17, "text": 6, "audio": 10}
    for name, states in forwards.items():
        torch.testing.assert_close(backwards[name], states, rtol=0, atol=1e-5)


def test_in_a_joint_pass_each_modality_sees_the_others_and_no_other_sample() -> None:
    model = encoder()
    inputs = {"image": field("image", 2), "text": field("text", 2), "audio": field("audio", 2)}
    for name in ("image", "audio"):
        inputs[name] = inputs[name]._replace(x=inputs[name].x.clone().requires_grad_())
    states = model.trunk({name: model.tokens(name, each) for name, each in inputs.items()})
    for name in ("image", "text", "audio"):
        gradients = torch.autograd.grad(
            states[name][0].square().sum(), [inputs["image"].x, inputs["audio"].x], retain_graph=True
        )
        for gradient in gradients:
            assert gradient[0].abs().sum() > 0
            assert not gradient[1].any()


@pytest.mark.parametrize("sharing", ["ffn", "none"])
def test_weights_of_their_own_that_are_equal_are_the_shared_ones(sharing: str) -> None:
    shared, own = encoder(), encoder(model=dataclasses.replace(MODEL, sharing=sharing))
    state = shared.state_dict()
    own.load_state_dict(
        {
            name: state[re.sub(r"\.(image|text|audio)\.(?=norm|qkv|out|fc|weight|bias)", ".all.", name)]
            if "blocks" in name or name.startswith("norm")
            else state[name]
            for name in own.state_dict()
        }
    )
    inputs = {name: field(name, 3) for name in ("image", "text", "audio")}
    expected = shared.trunk({name: shared.tokens(name, each) for name, each in inputs.items()})
    got = own.trunk({name: own.tokens(name, each) for name, each in inputs.items()})
    for name, states in expected.items():
        torch.testing.assert_close(got[name], states, rtol=0, atol=1e-5)
        torch.testing.assert_close(own(name, inputs[name])[1], shared(name, inputs[name])[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sharing", ["ffn", "none"])
def test_weights_of_their_own_are_their_own(sharing: str) -> None:
    model = encoder(model=dataclasses.replace(MODEL, sharing=sharing))
    inputs = {name: field(name, 3) for name in ("image", "text", "audio")}
    before = {name: model(name, each)[1] for name, each in inputs.items()}
    joint = model.trunk({name: model.tokens(name, each) for name, each in inputs.items()})
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            if ".audio." in name:
                parameter.mul_(1.5)
    for name, each in inputs.items():
        assert torch.equal(model(name, each)[1], before[name]) == (name != "audio")
    # All attend to all, so that in a joint pass it shows everywhere.
    after = model.trunk({name: model.tokens(name, each) for name, each in inputs.items()})
    assert not any(torch.equal(after[name], joint[name]) for name in inputs)


@pytest.mark.parametrize("sharing", ["all", "none"])
def test_recomputed_activations_change_no_gradient_and_keep_less(sharing: str) -> None:
    def run(recompute: bool) -> tuple[list[Tensor], int]:
        model, kept = encoder(model=dataclasses.replace(MODEL, sharing=sharing)), 0
        model.recompute = recompute

        def keep(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        inputs = {name: field(name, 3) for name in ("image", "text", "audio")}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            states = model.trunk({name: model.tokens(name, each) for name, each in inputs.items()})
        sum(each.square().sum() for each in states.values()).backward()  # type: ignore[union-attr]
        return [p.grad for p in model.blocks.parameters() if p.grad is not None], kept

    (expected, kept), (got, kept_less) = run(False), run(True)
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert kept_less < kept / 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__path__[0],
    reason="torch compiles neither without a C++ compiler nor from a path with a space",
)
def test_compiled_blocks_give_the_same_and_are_saved_alike(tmp_path: Path) -> None:
    plain, compiled = encoder(), encoder()
    compiled.compile_blocks()
    for name in ("image", "text"):
        torch.testing.assert_close(compiled(name, field(name, 3)), plain(name, field(name, 3)), rtol=0, atol=1e-5)
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_features_and_embeddings_are_those_that_stock_classes_read() -> None:
    model = encoder()
    heads: Any = model.heads
    image, text, audio = (model.encode(name, field(name, 2)) for name in ("image", "text", "audio"))
    torch.testing.assert_close(model.pool("image", image), image[:, 0])
    torch.testing.assert_close(model.pool("text", text), heads["text"].dense(text[:, 0]).tanh())
    torch.testing.assert_close(model.pool("audio", audio), audio[:, :2].mean(dim=1))
    norm = heads["audio"].norm
    normed = F.layer_norm(model.pool("audio", audio), (32,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(model.project("audio", model.pool("audio", audio)), heads["audio"].projection(normed))
    assert heads["text"].projection.bias is None


def test_linear_layers_are_xavier_uniform_and_the_rest_as_stated() -> None:
    torch.manual_seed(0)
    model = Encoder(dataclasses.replace(MODEL, width=64, embed_dim=32), VIEWS, VOCABULARY)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 2 * 4 + 2 + 3 + 1
    for name, linear in linears.items():
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.95 * bound < linear.weight.abs().max() <= bound, name
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        if linear.bias is not None:
            assert not linear.bias.any(), name
    small = {name: p for name, p in model.named_parameters() if "tokenizers" in name and p.ndim == 2}
    small = {name: p for name, p in small.items() if name.rpartition(".")[0] not in linears}
    assert len(small) == 6  # prefixes and positions of image and audio; embeddings and positions of text
    for name, parameter in small.items():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name


def test_no_two_weights_are_alike() -> None:
    torch.manual_seed(0)
    model = Encoder(MODEL, VIEWS, VOCABULARY)
    linears = [module.weight.flatten()[:8] for module in model.modules() if isinstance(module, nn.Linear)]
    assert len({tuple(weight.tolist()) for weight in linears}) == len(linears)


@pytest.mark.parametrize(
    "views", [VIEWS, Views(VIEWS.image, None, VIEWS.audio), Views(None, VIEWS.text, None)], ids=["ita", "ia", "t"]
)
def test_a_saved_encoder_gives_the_same_outputs(tmp_path: Path, views: Views) -> None:
    model = encoder(views)
    model.save(tmp_path)
    random = torch.random.get_rng_state()
    loaded = Encoder.load(tmp_path).eval()
    torch.random.set_rng_state(random)
    assert (loaded.config, loaded.views, loaded.vocabulary) == (model.config, model.views, model.vocabulary)
    for name in views.used:
        for got, expected in zip(loaded(name, field(name, 3)), model(name, field(name, 3)), strict=True):
            assert torch.equal(got, expected)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    encoder().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for schema in (0, SCHEMA + 1, None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "schema": schema}))
        with pytest.raises(ValueError, match=rf"config\.json: schema {schema}; this version reads {SCHEMA}"):
            Encoder.load(tmp_path)


WORDS = {"size": 300, "pad_id": 1, "mask_id": 4, "special_ids": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"width": "wide"}},
        {"views": 3},
        {"vocabulary": {}},
        {"vocabulary": {**WORDS, "size": "x"}},
        {"vocabulary": {**WORDS, "pad_id": None}},
        {"vocabulary": {**WORDS, "special_ids": ["a"]}},
    ],
)
def test_a_damaged_configuration_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    encoder().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/config\.json is damaged: "):
        Encoder.load(tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    encoder().save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    broken = {
        "norm.all.weight": {name: tensor for name, tensor in tensors.items() if name != "norm.all.weight"},
        "extra": {**tensors, "extra": torch.zeros(1)},
        "heads.image.projection.bias": {**tensors, "heads.image.projection.bias": torch.zeros(3)},
    }
    for name, state in broken.items():
        save_file(state, path)
        with pytest.raises(ValueError, match=rf"(?s)model\.safetensors does not fit its config\.json.*{name}"):
            Encoder.load(tmp_path)


@pytest.mark.parametrize(
    ("views", "model", "message"),
    [
        ({"image": ImageView(size=18)}, {}, r"model\.image_patch=4: it must divide data\.views\.image\.size=18"),
        ({"audio": AudioView(36, 16)}, {}, r"model\.audio_patch=8: it must divide data\.views\.audio\.frames=36"),
        ({"audio": AudioView(32, 20)}, {}, r"model\.audio_patch=8: it must divide data\.views\.audio\.mels=20"),
        ({}, {"image_patch": 5}, r"model\.image_patch=5: it must divide data\.views\.image\.size=16"),
    ],
)
def test_patches_that_do_not_fit_name_their_keys(views: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(dataclasses.replace(MODEL, **model), dataclasses.replace(VIEWS, **views), VOCABULARY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, r"model\.width=0: allowed is 1 or more"),
        ({"depth": 0}, r"model\.depth=0: allowed"),
        ({"embed_dim": 0}, r"model\.embed_dim=0: allowed"),
        ({"image_patch": 0}, r"model\.image_patch=0: allowed"),
        ({"width": 32, "heads": 5}, r"model\.heads=5: it must divide model\.width=32"),
        ({"sharing": "some"}, r"model\.sharing=some: allowed"),
        ({"mlp_ratio": 0.0}, r"model\.mlp_ratio=0\.0: allowed"),
    ],
)
def test_settings_out_of_bounds_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


def test_an_encoder_has_parts_for_its_views_alone() -> None:
    model = encoder(Views(None, TextView(max_tokens=12), None))
    assert not any("image" in name or "audio" in name for name, _ in model.named_parameters())
