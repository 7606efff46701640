"""The whole encoder with code of its own, for those who trust it: ``auto_map`` names ``modeling_triptych.py``."""

import shutil
from pathlib import Path

import torch

from data.transforms import AudioView, ImageView, TextView
from pretrain.exports import modeling_triptych
from pretrain.exports.modeling_triptych import TriptychConfig, TriptychModel
from pretrain.exports.subject import Subject
from pretrain.model.layers import LAYER_NORM_EPS

CODE = Path(modeling_triptych.__file__)


def joint_model(subject: Subject) -> TriptychModel:
    """TriptychModel, with weights under the names that they have here."""
    encoder, pairs = subject.encoder, subject.pairs
    biases = {pair: bias for pair in pairs if (bias := subject.bias(pair)) is not None}
    shape, views = encoder.config, encoder.views
    image, text, audio = views.image or ImageView(), views.text or TextView(), views.audio or AudioView()
    config = TriptychConfig(
        modalities=subject.modalities,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=int(shape.width * shape.mlp_ratio),
        layer_norm_eps=LAYER_NORM_EPS,
        projection_dim=shape.embed_dim,
        sharing=shape.sharing,
        pairs=pairs,
        sigmoid=bool(biases),
        image_size=image.size,
        image_patch=shape.image_patch,
        vocab_size=encoder.vocabulary.size,
        max_tokens=text.max_tokens,
        pad_token_id=encoder.vocabulary.pad_id,
        audio_frames=audio.frames,
        audio_mels=audio.mels,
        audio_patch=shape.audio_patch,
    )
    config.auto_map = {"AutoConfig": f"{CODE.stem}.TriptychConfig", "AutoModel": f"{CODE.stem}.TriptychModel"}
    model = TriptychModel(config)
    scales = {f"log_scale.{pair}": subject.log_scale(pair) for pair in pairs}
    with torch.no_grad():
        model.load_state_dict({**encoder.state_dict(), **scales, **{f"bias.{pair}": b for pair, b in biases.items()}})
    return model


def save_code(_: Subject, folder: Path) -> None:
    """The file that ``auto_map`` names."""
    shutil.copyfile(CODE, folder / CODE.name)
