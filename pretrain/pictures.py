"""Pictures of what masked-region modelling sees and what it makes of it. Needs the extra ``plot``."""

import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from data.batch import Batch
from objectives.masked_region import patch_statistics
from objectives.masking import PatchSplit
from objectives.passes import JointPass
from objectives.pretraining import OBJECTIVES, Pretraining
from pretrain.model.encoder import Encoder
from pretrain.model.layers import gather_tokens

GREY = 0.5
ROWS = ("input", "masked", "reconstruction")


@torch.no_grad()
def draw_step(model: Pretraining, batch: Batch, seed: int, limit: int = 4) -> bytes | None:
    """What the model makes of a batch, as PNG; None where it hides no patches, or the batch has none.

    What it predicts of a teacher's states can't be drawn: of such a model only the inputs and masks are.

    Args:
        model: unwrapped; left in the mode in which it was.
        batch: as ``OnDevice`` gives it.
        seed: fixes which patches are hidden.
        limit: number of samples to draw, at most.
    """
    region: Any = dict(model.objectives.items()).get("masked_region")
    if region is None:
        return None
    joint_ones = [name for name in model.objectives if OBJECTIVES[name].reads == "joint"]
    # Compiled blocks would be compiled again for passes without gradients.
    with torch.compiler.set_stance("force_eager"):
        passes = model.passes(batch, seed, whole=False, objectives=joint_ones)
    hiding = [joint for joint in passes.joint if any(split.hidden.numel() for split in joint.splits.values())]
    if not hiding:
        return None
    joint = max(hiding, key=lambda joint: len(joint.splits))  # all kinds of patches, if any sample has them
    splits = {name: split for name, split in joint.splits.items() if split.hidden.numel()}
    predicted: dict[str, Tensor | None] = dict.fromkeys(splits)
    if model.config.masked_region.target == "pixel":
        predicted = {name: region.decoders[name](joint.states[name], split) for name, split in splits.items()}
    return draw(model.encoder, joint, predicted, limit)


def draw(encoder: Encoder, joint: JointPass, predicted: Mapping[str, Tensor | None], limit: int = 4) -> bytes:
    """Rows of pictures per modality as PNG: input, what the encoder saw of it, and the reconstruction if there is one.

    Args:
        encoder: that made the pass.
        joint: the pass.
        predicted: modality -> normalised values (n, P - K, patch_dim) of its hidden patches, in the split's order,
            or None. Mean and spread of each are taken from the input: the prediction says nothing of them.
        limit: number of samples to draw, at most.
    """
    columns = min(limit, *(len(joint.inputs[name].x) for name in predicted))
    rows = sum(len(ROWS) - (values is None) for values in predicted.values())
    figure = Figure(figsize=(2.2 * columns + 0.4, 2.2 * rows), dpi=120, layout="constrained")
    grid = iter(figure.subplots(rows, columns, squeeze=False))
    for name, values in predicted.items():
        x, split = (
            joint.inputs[name].x[:columns].float(),
            PatchSplit(*(index[:columns] for index in joint.splits[name])),
        )
        true = gather_tokens(encoder.patches(name, x), split.hidden)
        pictures = [x, replace_patches(encoder, name, x, split.hidden, torch.full_like(true, math.nan))]
        if values is not None:
            mean, deviation = patch_statistics(true)
            filled = values[:columns].float() * deviation + mean
            pictures.append(replace_patches(encoder, name, x, split.hidden, filled))
        for title, picture in zip(ROWS, pictures, strict=False):
            for column, axes in enumerate(next(grid)):
                _SHOW[name](axes, picture[column].cpu(), x[column].cpu())
                axes.set_xticks([])
                axes.set_yticks([])
                if column == 0:
                    axes.set_ylabel(f"{name}: {title}", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def replace_patches(encoder: Encoder, modality: str, x: Tensor, index: Tensor, patches: Tensor) -> Tensor:
    """Inputs (n, ...) with the patches at ``index`` (n, K) replaced by (n, K, patch_dim)."""
    numbered = torch.arange(x[0].numel(), device=x.device).view(1, *x.shape[1:])
    places = encoder.patches(modality, numbered)[0]  # (P, patch_dim), where in x each value of a patch stands
    return x.flatten(1).scatter(1, places[index].flatten(1), patches.flatten(1)).view_as(x)


def _show_image(axes: Axes, picture: Tensor, _: Tensor) -> None:
    """(3, H, W) of -1 .. 1."""
    axes.imshow((picture / 2 + 0.5).clamp(0, 1).nan_to_num(GREY).permute(1, 2, 0).numpy())


def _show_spectrogram(axes: Axes, picture: Tensor, whole: Tensor) -> None:
    """(frames, mels), low frequencies at the bottom, in the colours that the whole one would have."""
    colours = colormaps["magma"].with_extremes(bad=str(GREY))
    low, high = whole.min().item(), whole.max().item()
    axes.imshow(picture.T.numpy(), colours, vmin=low, vmax=high, origin="lower", aspect="auto")


_SHOW = {"image": _show_image, "audio": _show_spectrogram}
