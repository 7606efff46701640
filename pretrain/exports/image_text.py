"""Image and text as one VisionTextDualEncoderModel, a CLIP of our own weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from pretrain.exports.streams import image_model, text_model
from pretrain.exports.subject import Subject
from pretrain.model.encoder import Encoder
from pretrain.model.layers import weights_of


def image_text_model(subject: Subject) -> Any:
    """VisionTextDualEncoderModel with the learned scale.

    Its visual projection has no bias, and ours has one, which therefore goes into the ViT's pooler: here its
    ``pooler_output`` is not the class token, and only what is projected from it counts.
    """
    encoder, pair = subject.encoder, "image_text"
    image, text = image_model(subject), text_model(subject)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        image.config,
        text.config,
        projection_dim=encoder.config.embed_dim,
        logit_scale_init_value=subject.log_scale(pair).item(),
    )
    if (bias := subject.bias(pair)) is not None:  # the stock class knows of none; for whoever wants probabilities
        config.logit_bias = bias.item()
    model: Any = VisionTextDualEncoderModel(config, vision_model=image, text_model=text)
    pooler, pooler_bias, projection = with_bias_in_pooler(encoder)
    with torch.no_grad():
        image.pooler.dense.weight.copy_(pooler)
        image.pooler.dense.bias.copy_(pooler_bias)
        model.visual_projection.weight.copy_(projection)
        model.text_projection.weight.copy_(encoder.get_parameter("heads.text.projection.weight"))
        model.logit_scale.copy_(subject.log_scale(pair))
    return model


def with_bias_in_pooler(encoder: Encoder) -> tuple[Tensor, Tensor, Tensor]:
    """Our Linear(class token) as a linear pooler (D, D) with bias (D,), and a projection (E, D) without.

    Where E <= D the pooler is our projection above rows of zeros. Else it has no room for it, but the class token,
    x = g * z + b behind LayerNorm, lies on a plane: z sums to 0, so that the product of n = 1 / g and x is always that
    of n and b. The pooler turns n into the first axis and sets that coordinate, which tells nothing, to 1; the
    projection turns back, and its first column adds what is constant.
    """
    head = encoder.get_submodule("heads.image.projection")
    weight, bias = (getattr(head, name).detach().double() for name in ("weight", "bias"))
    outputs, width = weight.shape
    pooler, pooler_bias = torch.zeros(width, width).double(), torch.zeros(width).double()
    if outputs <= width:
        pooler[:outputs], pooler_bias[:outputs] = weight, bias
        return pooler, pooler_bias, torch.eye(outputs, width)
    norm = weights_of(encoder.norm, "image")
    gain, shift = (getattr(norm, name).detach().double() for name in ("weight", "bias"))
    least = gain.abs().min()
    normal = least / gain if least > 0 else (gain == 0).double()  # in the limit, gains of 0 decide alone
    normal /= normal.norm()
    # Householder's reflection between the normal and the first axis.
    mirror = normal.clone()
    mirror[0] += 1.0 if normal[0] >= 0 else -1.0  # never the difference of two that are nearly equal
    turn = torch.eye(width).double() - 2 * torch.outer(mirror, mirror) / mirror.dot(mirror)
    projection = weight @ turn
    projection[:, 0] = bias + (weight @ normal) * normal.dot(shift)
    pooler[1:], pooler_bias[0] = turn[1:], 1
    return pooler, pooler_bias, projection
