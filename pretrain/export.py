"""The encoder's streams as stock `transformers` models: ViTModel, RobertaPreLayerNormModel, ASTModel.

The stock class is built from a config and filled, then saves itself, so that the files are what its own release
writes and reads. Each export is loaded back and compared before it gets its final name.

    python pretrain/export.py runs/digits/checkpoints/last exported
"""

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    AutoModel,
    PreTrainedTokenizerBase,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.utils.logging import disable_progress_bar

from data.batch import Field
from data.errors import UserError
from pretrain.checkpoint import load_encoder
from pretrain.model.encoder import Encoder
from pretrain.model.layers import LAYER_NORM_EPS
from pretrain.model.tokenizers import PatchTokenizer
from pretrain.stock import PAIRS

TOLERANCE = 1e-5


class ExportError(UserError):
    """An export that does not give the encoder's features."""


def export(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, out: Path) -> dict[str, Path]:
    """Write one folder per modality, each verified, replacing earlier exports.

    Args:
        encoder: on the CPU.
        tokenizer: saved beside the text model.
        out: gets ``image/``, ``text/`` and ``audio/``, as far as the encoder has them.

    Returns:
        modality -> folder.

    Raises:
        ExportError: a folder holds anything but an earlier export, or a saved model differs from the encoder by more
            than 1e-5; nothing of it remains.
    """
    encoder = encoder.eval()
    folders = {}
    for modality in encoder.views.used:
        partial, final = out / f".{modality}.partial", out / modality
        check_replaceable(final)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            EXPORTS[modality](encoder, tokenizer, partial)
            verify(encoder, modality, partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        folders[modality] = final
    return folders


def check_replaceable(folder: Path) -> None:
    """Refuse to replace what is no export.

    Raises:
        ExportError: the folder has files, but no model among them.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not {"config.json", "model.safetensors"} <= names:
        raise ExportError(f"{folder} holds files that are no export: choose another folder")


def export_image(encoder: Encoder, _: PreTrainedTokenizerBase, folder: Path) -> None:
    """ViTModel, whose linear pooler is an identity: ``pooler_output`` is the class token."""
    view, config = encoder.views.image, encoder.config
    side = view.size if view is not None else 0
    model: Any = ViTModel(
        ViTConfig(
            **_common(encoder),
            image_size=side,
            patch_size=config.image_patch,
            num_channels=3,
            pooler_act="linear",
            pooler_output_size=config.width,
        )
    )
    fill(model, encoder, "image")
    with torch.no_grad():
        model.pooler.dense.weight.copy_(torch.eye(config.width))
        model.pooler.dense.bias.zero_()
    model.save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": side, "width": side}, do_convert_rgb=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def export_audio(encoder: Encoder, _: PreTrainedTokenizerBase, folder: Path) -> None:
    """ASTModel, whose ``pooler_output`` is the mean of its two prefix tokens."""
    view, config = encoder.views.audio, encoder.config
    model: Any = ASTModel(
        ASTConfig(
            **_common(encoder),
            patch_size=config.audio_patch,
            frequency_stride=config.audio_patch,
            time_stride=config.audio_patch,
            max_length=view.frames if view is not None else 0,
            num_mel_bins=view.mels if view is not None else 0,
        )
    )
    fill(model, encoder, "audio")
    model.save_pretrained(folder)
    if view is not None:
        ASTFeatureExtractor(
            num_mel_bins=view.mels, max_length=view.frames, mean=view.mean, std=view.std
        ).save_pretrained(folder)


def export_text(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """RobertaPreLayerNormModel; its pooler is ours, ``tanh(dense(first token))``."""
    source = _part(encoder, "tokenizers.text")
    positions = source.positions.num_embeddings
    model: Any = RobertaPreLayerNormModel(
        RobertaPreLayerNormConfig(
            **_common(encoder),
            vocab_size=encoder.vocabulary.size,
            max_position_embeddings=positions,
            type_vocab_size=1,
            pad_token_id=encoder.vocabulary.pad_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
    )
    fill(model, encoder, "text")
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight.zero_()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, positions - encoder.vocabulary.pad_id - 1)


def fill(model: Any, encoder: Encoder, modality: str) -> None:
    """Copy the encoder's numbers into a stock model."""
    with torch.no_grad():
        for pair in PAIRS[modality](encoder, model):
            pair.stock.copy_(pair.ours.view_as(pair.stock))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, max_length: int) -> None:
    """Save under the class name that every release of `transformers` knows; 5.x writes one of its own."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_length
    tokenizer.backend_tokenizer.no_padding()  # left by the last call, and saved with it
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


EXPORTS: dict[str, Callable[[Encoder, PreTrainedTokenizerBase, Path], None]] = {
    "image": export_image,
    "text": export_text,
    "audio": export_audio,
}


def verify(encoder: Encoder, modality: str, folder: Path) -> None:
    """Load an export back and compare its features with the encoder's on random input.

    Raises:
        ExportError: missing or left-over tensors, or features that differ by more than 1e-5.
    """
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    problems = {
        name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]
    }
    if problems:
        raise ExportError(f"{folder}: the saved {modality} model does not load whole: {problems}")
    # In float64 a difference is a mistake, however deep the model; in float32 it may be rounding.
    model, encoder = model.double(), copy.deepcopy(encoder).double()
    field, inputs = _random_input(encoder, modality, model.main_input_name)
    with torch.inference_mode():
        states = encoder.encode(modality, field)
        features = encoder.pool(modality, states)
        outputs = model(**inputs)
    pairs = {"last_hidden_state": states, "pooler_output": features}
    for name, expected in pairs.items():
        difference = (outputs[name] - expected).abs().max().item()
        if not difference <= TOLERANCE:  # NaN is no match either
            raise ExportError(f"{folder}: {name} of the saved {modality} model differs by {difference:.1e}")


def _random_input(encoder: Encoder, modality: str, input_name: str) -> tuple[Field, dict[str, Tensor]]:
    """Two random inputs, as a Field and as keyword arguments of the stock model."""
    generator = torch.Generator().manual_seed(0)
    rows, tokenizer = torch.arange(2), _part(encoder, f"tokenizers.{modality}")
    if isinstance(tokenizer, PatchTokenizer):
        x = torch.rand((2, *tokenizer.input_shape), generator=generator, dtype=torch.float64) * 2 - 1
        return Field(x, rows), {input_name: x}
    ids = torch.randint(encoder.vocabulary.size, (2, tokenizer.max_tokens), generator=generator)
    # No padding within: the stock class would take its positions from the ids, not from the mask.
    ids = ids.masked_fill(ids == encoder.vocabulary.pad_id, encoder.vocabulary.mask_id)
    return Field(ids, rows), {input_name: ids, "attention_mask": torch.ones_like(ids)}


def _common(encoder: Encoder) -> dict[str, Any]:
    config = encoder.config
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
    }


def _part(encoder: Encoder, name: str) -> Any:
    return encoder.get_submodule(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    parser = argparse.ArgumentParser(description="Export a checkpoint's encoder to transformers models.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, such as runs/digits/checkpoints/last")
    parser.add_argument("out", type=Path, help="folder for image/, text/ and audio/")
    arguments = parser.parse_args(argv)
    disable_progress_bar()
    try:
        folders = export(*load_encoder(arguments.checkpoint), arguments.out)
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for modality, folder in folders.items():
        print(f"{modality:6} {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
