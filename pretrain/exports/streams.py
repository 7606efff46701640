"""The streams as stock classes: ViTModel, RobertaPreLayerNormModel, ASTModel, and the same with heads.

The stock class is built from a config and filled, then saves itself, so that the files are what its own release
writes and reads.
"""

import copy
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ASTModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormForSequenceClassification,
    RobertaPreLayerNormModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from data.transforms import AudioView, ImageView
from pretrain.exports.subject import Subject
from pretrain.model.encoder import Encoder
from pretrain.model.layers import LAYER_NORM_EPS
from pretrain.stock import EMBED_PAIRS, PAIRS, Pair, masked_language_pairs


def image_model(subject: Subject) -> Any:
    """ViTModel, whose linear pooler is an identity: ``pooler_output`` is the class token."""
    model: Any = ViTModel(image_config(subject.encoder))
    fill(PAIRS["image"](subject.encoder, model))
    with torch.no_grad():
        model.pooler.dense.weight.copy_(torch.eye(subject.encoder.config.width))
        model.pooler.dense.bias.zero_()
    return model


def text_model(subject: Subject) -> Any:
    """RobertaPreLayerNormModel; its pooler is ours, ``tanh(dense(first token))``."""
    model: Any = RobertaPreLayerNormModel(text_config(subject))
    fill(PAIRS["text"](subject.encoder, model))
    forget_token_types(model)
    return model


def audio_model(subject: Subject) -> Any:
    """ASTModel, whose ``pooler_output`` is the mean of its two prefix tokens."""
    model: Any = ASTModel(audio_config(subject.encoder))
    fill(PAIRS["audio"](subject.encoder, model))
    return model


def masked_lm_model(subject: Subject) -> Any:
    """RobertaPreLayerNormForMaskedLM. It has no pooler."""
    model: Any = RobertaPreLayerNormForMaskedLM(text_config(subject))
    fill(masked_language_pairs(subject.encoder, subject.objectives, model))
    forget_token_types(model.roberta_prelayernorm)
    return model


def embed_image_model(subject: Subject) -> Any:
    """ViTForImageClassification, whose logits are the embedding."""
    model: Any = ViTForImageClassification(image_config(subject.encoder, labels=True))
    fill(EMBED_PAIRS["image"](subject.encoder, model))
    return model


def embed_text_model(subject: Subject) -> Any:
    """RobertaPreLayerNormForSequenceClassification, whose logits are the embedding."""
    model: Any = RobertaPreLayerNormForSequenceClassification(text_config(subject, labels=True))
    fill(EMBED_PAIRS["text"](subject.encoder, model))
    forget_token_types(model.roberta_prelayernorm)
    with torch.no_grad():
        model.classifier.out_proj.bias.zero_()  # ours has none
    return model


def embed_audio_model(subject: Subject) -> Any:
    """ASTForAudioClassification, whose logits are the embedding."""
    model: Any = ASTForAudioClassification(audio_config(subject.encoder, labels=True))
    fill(EMBED_PAIRS["audio"](subject.encoder, model))
    return model


def image_config(encoder: Encoder, labels: bool = False) -> ViTConfig:
    """Of the image stream; ``labels``: as many outputs as the embedding is wide."""
    view = encoder.views.image or ImageView()
    return ViTConfig(
        **_common(encoder, labels),
        image_size=view.size,
        patch_size=encoder.config.image_patch,
        num_channels=3,
        pooler_act="linear",
        pooler_output_size=encoder.config.width,
    )


def text_config(subject: Subject, labels: bool = False) -> RobertaPreLayerNormConfig:
    """Of the text stream, likewise."""
    encoder, tokenizer = subject.encoder, subject.tokenizer
    positions: Any = encoder.get_submodule("tokenizers.text.positions")
    return RobertaPreLayerNormConfig(
        **_common(encoder, labels),
        vocab_size=encoder.vocabulary.size,
        max_position_embeddings=positions.num_embeddings,
        type_vocab_size=1,
        pad_token_id=encoder.vocabulary.pad_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )


def audio_config(encoder: Encoder, labels: bool = False) -> ASTConfig:
    """Of the audio stream, likewise."""
    view, patch = encoder.views.audio or AudioView(), encoder.config.audio_patch
    return ASTConfig(
        **_common(encoder, labels),
        patch_size=patch,
        frequency_stride=patch,
        time_stride=patch,
        max_length=view.frames,
        num_mel_bins=view.mels,
    )


def fill(pairs: Iterable[Pair]) -> None:
    """Copy the encoder's numbers into a stock model."""
    with torch.no_grad():
        for pair in pairs:
            pair.stock.copy_(pair.ours.view_as(pair.stock))


def forget_token_types(model: Any) -> None:
    """RoBERTa adds an embedding of the type of each token; we have none."""
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight.zero_()


def save_image_processor(subject: Subject, folder: Path) -> None:
    """``preprocessor_config.json`` of the processor that makes of a picture what training saw of it."""
    side = (subject.encoder.views.image or ImageView()).size
    ViTImageProcessorPil(
        size={"height": side, "width": side}, do_convert_rgb=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def save_feature_extractor(subject: Subject, folder: Path) -> None:
    """``preprocessor_config.json`` of the extractor whose log-mel is the device transform's."""
    view = subject.encoder.views.audio or AudioView()
    with warnings.catch_warnings():
        # As in our own log-mel: with many bins, low filters are narrower than a bin of the transform.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        extractor = ASTFeatureExtractor(num_mel_bins=view.mels, max_length=view.frames, mean=view.mean, std=view.std)
    extractor.save_pretrained(folder)


def save_tokenizer(subject: Subject, folder: Path) -> None:
    """Save under the class name that every release of `transformers` knows; 5.x writes one of its own."""
    tokenizer = copy.deepcopy(subject.tokenizer)
    positions: Any = subject.encoder.get_submodule("tokenizers.text.positions")
    tokenizer.model_max_length = positions.num_embeddings - subject.encoder.vocabulary.pad_id - 1
    tokenizer.backend_tokenizer.no_padding()  # left by the last call, and saved with it
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    words = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"] or {}
    if "add_prefix_space" in words:  # 4.x takes it from here, false where it is not said, and makes other ids
        config["add_prefix_space"] = words["add_prefix_space"]
    path.write_text(json.dumps(config, indent=2) + "\n")


def _common(encoder: Encoder, labels: bool) -> dict[str, Any]:
    config = encoder.config
    outputs = {"num_labels": config.embed_dim} if labels else {}
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        **outputs,
    }
