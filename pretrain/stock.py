"""Which tensor of a stock `transformers` class is which of the encoder's: to export, and to start from one.

ViTModel, ASTModel and RobertaPreLayerNormModel compute what our image, audio and text streams compute; with the heads
for classification they compute our embeddings, and RobertaPreLayerNormForMaskedLM what our language-model head does.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pretrain.model.encoder import Encoder
from pretrain.model.layers import Block, weights_of

POSITIONS = "tokenizers.{}.positions"


class Pair(NamedTuple):
    """The same numbers here and there.

    Attributes:
        name: of the encoder's tensor, or the part of it.
        stock: tensor of the stock model.
        ours: tensor of the encoder, with as many elements, but for positions of inputs of another size.
    """

    name: str
    stock: Tensor
    ours: Tensor


def image_pairs(encoder: Encoder, model: Any) -> Iterator[Pair]:
    """ViTModel, without its pooler."""
    yield from _patch_pairs(encoder, "image", model.embeddings, [model.embeddings.cls_token])
    yield from _vit_pairs(encoder, "image", model)


def audio_pairs(encoder: Encoder, model: Any) -> Iterator[Pair]:
    """ASTModel."""
    prefix = [model.embeddings.cls_token, model.embeddings.distillation_token]
    yield from _patch_pairs(encoder, "audio", model.embeddings, prefix)
    yield from _vit_pairs(encoder, "audio", model)


def text_pairs(encoder: Encoder, model: Any) -> Iterator[Pair]:
    """RobertaPreLayerNormModel, without the embedding of token types; its pooler is ours."""
    yield from text_states_pairs(encoder, model)
    yield from _module("heads.text.dense", model.pooler.dense, encoder.get_submodule("heads.text.dense"))


def text_states_pairs(encoder: Encoder, model: Any) -> Iterator[Pair]:
    """RobertaPreLayerNormModel without its pooler."""
    tokenizer, embeddings = encoder.get_submodule("tokenizers.text"), model.embeddings
    yield Pair("tokenizers.text.embed.weight", embeddings.word_embeddings.weight, _get(tokenizer, "embed.weight"))
    yield Pair(POSITIONS.format("text"), embeddings.position_embeddings.weight, _get(tokenizer, "positions.weight"))
    yield from _module("tokenizers.text.norm", embeddings.LayerNorm, tokenizer.get_submodule("norm"))
    for number, (layer, ours) in enumerate(zip(model.encoder.layer, _blocks(encoder, "text"), strict=True)):
        stock = layer.attention.self
        yield from _block(
            f"blocks.{number}",
            ours,
            [stock.query, stock.key, stock.value],
            {
                "attention.out": layer.attention.output.dense,
                "attention.norm": layer.attention.LayerNorm,
                "feed_forward.norm": layer.intermediate.LayerNorm,
                "feed_forward.fc1": layer.intermediate.dense,
                "feed_forward.fc2": layer.output.dense,
            },
        )
    yield from _module("norm", model.LayerNorm, weights_of(encoder.norm, "text"))


PAIRS: dict[str, Callable[[Encoder, Any], Iterator[Pair]]] = {
    "image": image_pairs,
    "text": text_pairs,
    "audio": audio_pairs,
}


def embed_image_pairs(encoder: Encoder, model: Any) -> Iterator[Pair]:
    """ViTForImageClassification, whose logits are our embedding."""
    yield from image_pairs(encoder, model.vit)
    yield from _module("heads.image.projection", model.classifier, encoder.get_submodule("heads.image.projection"))


def embed_text_pairs(encoder: Encoder, model: Any) -> Iterator[Pair]:
    """RobertaPreLayerNormForSequenceClassification, likewise; the bias of its last layer, which ours lacks, is left."""
    yield from text_states_pairs(encoder, model.roberta_prelayernorm)
    yield from _module("heads.text.dense", model.classifier.dense, encoder.get_submodule("heads.text.dense"))
    projection = encoder.get_parameter("heads.text.projection.weight")
    yield Pair("heads.text.projection.weight", model.classifier.out_proj.weight, projection)


def embed_audio_pairs(encoder: Encoder, model: Any) -> Iterator[Pair]:
    """ASTForAudioClassification, likewise."""
    yield from audio_pairs(encoder, model.audio_spectrogram_transformer)
    yield from _module("heads.audio.norm", model.classifier.layernorm, encoder.get_submodule("heads.audio.norm"))
    yield from _module(
        "heads.audio.projection", model.classifier.dense, encoder.get_submodule("heads.audio.projection")
    )


EMBED_PAIRS: dict[str, Callable[[Encoder, Any], Iterator[Pair]]] = {
    "image": embed_image_pairs,
    "text": embed_text_pairs,
    "audio": embed_audio_pairs,
}


def masked_language_pairs(encoder: Encoder, objectives: Mapping[str, Tensor], model: Any) -> Iterator[Pair]:
    """RobertaPreLayerNormForMaskedLM, whose output matrix is the embedding, as ours is."""
    yield from text_states_pairs(encoder, model.roberta_prelayernorm)
    head = model.lm_head
    for ours, stock in (
        ("dense.weight", head.dense.weight),
        ("dense.bias", head.dense.bias),
        ("norm.weight", head.layer_norm.weight),
        ("norm.bias", head.layer_norm.bias),
        ("bias", head.bias),
    ):
        yield Pair(f"masked_language.{ours}", stock, objectives[f"masked_language.{ours}"])


def _patch_pairs(encoder: Encoder, modality: str, embeddings: Any, prefix: list[Tensor]) -> Iterator[Pair]:
    """Our linear patch embedding is the stock convolution with its kernel laid out flat."""
    name, tokenizer = f"tokenizers.{modality}", encoder.get_submodule(f"tokenizers.{modality}")
    yield from _module(f"{name}.embed", embeddings.patch_embeddings.projection, tokenizer.get_submodule("embed"))
    yield Pair(POSITIONS.format(modality), embeddings.position_embeddings[0], _get(tokenizer, "positions"))
    for number, token in enumerate(prefix):
        yield Pair(f"{name}.prefix.{number}", token, _get(tokenizer, "prefix")[number])


def _vit_pairs(encoder: Encoder, modality: str, model: Any) -> Iterator[Pair]:
    """ViT and AST name the parts of their layers alike."""
    for number, (layer, ours) in enumerate(zip(model.layers, _blocks(encoder, modality), strict=True)):
        stock = layer.attention
        yield from _block(
            f"blocks.{number}",
            ours,
            [stock.q_proj, stock.k_proj, stock.v_proj],
            {
                "attention.out": stock.o_proj,
                "attention.norm": layer.layernorm_before,
                "feed_forward.norm": layer.layernorm_after,
                "feed_forward.fc1": layer.mlp.fc1,
                "feed_forward.fc2": layer.mlp.fc2,
            },
        )
    yield from _module("norm", model.layernorm, weights_of(encoder.norm, modality))


def _blocks(encoder: Encoder, modality: str) -> list[dict[str, Any]]:
    """Attention and feed-forward weights that a modality uses, layer by layer."""
    return [
        {name: weights_of(getattr(block, name), modality) for name in ("attention", "feed_forward")}
        for block in encoder.blocks
        if isinstance(block, Block)
    ]


def _block(name: str, ours: dict[str, Any], projections: list[Any], others: dict[str, Any]) -> Iterator[Pair]:
    """One matrix for queries, keys and values here, three there."""
    for part in ("weight", "bias"):
        thirds = getattr(ours["attention"].qkv, part).chunk(3)
        for letter, projection, third in zip("qkv", projections, thirds, strict=True):
            yield Pair(f"{name}.attention.qkv.{part}.{letter}", getattr(projection, part), third)
    for path, stock in others.items():
        group, _, leaf = path.partition(".")
        yield from _module(f"{name}.{path}", stock, getattr(ours[group], leaf))


def _module(name: str, stock: Any, ours: Any) -> Iterator[Pair]:
    """Weight and bias."""
    for part in ("weight", "bias"):
        yield Pair(f"{name}.{part}", getattr(stock, part), getattr(ours, part))


def _get(module: Any, path: str) -> Tensor:
    tensor: Tensor = module.get_parameter(path)
    return tensor
