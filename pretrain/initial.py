"""Start from trained models: per modality a stock `transformers` checkpoint, such as one of our exports.

LayerNorm's epsilon stays ours, 1e-6, which matters where the variance of states is as small. Stock ones are 1e-12 to
1e-5; models with a larger one are refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel

from data.errors import UserError
from data.manifest import check_folder
from pretrain.model.encoder import Encoder
from pretrain.model.layers import LAYER_NORM_EPS
from pretrain.stock import PAIRS, POSITIONS

# Modality -> ``model_type`` of the models that its stream can start from.
TYPES = {"image": "vit", "text": "roberta-prelayernorm", "audio": "audio-spectrogram-transformer"}
LARGEST_EPS = 1e-5  # of a LayerNorm
POOLER = "heads.text.dense."


class InitialError(UserError):
    """A model from which the encoder can't start; names it and what does not fit."""


def load_initial(encoder: Encoder, given: Mapping[str, str], say: Callable[[str], None] = print) -> None:
    """Copy the weights of stock models into an encoder, all or none.

    Positions are fitted to the encoder's sizes. Those of an image are interpolated: bicubic, to larger images as ViT
    does it, to smaller ones smoothed besides. Those of a spectrogram are read off where our patches begin, which do not
    overlap where AST's may, and cut where theirs has as many frames or more, else stretched. Those of text are cut.

    Args:
        encoder: random so far.
        given: modality -> folder or hub id of a ViTModel, RobertaPreLayerNormModel or ASTModel in safetensors.
        say: gets a line per modality, with the number of tensors.

    Raises:
        InitialError: another kind of model, other sizes, weights that are missing, or several modalities for one set
            of blocks.
        ManifestError: the folder is of an export, and damaged.
    """
    if unknown := set(given) - set(encoder.views.used):
        raise InitialError(f"init_from.{min(unknown)}: allowed are {', '.join(encoder.views.used)}")
    if len(given) > 1 and encoder.config.sharing != "none":
        raise InitialError(
            f"init_from names {', '.join(given)}, which would overwrite each other: with "
            f"model.sharing={encoder.config.sharing} they share blocks. Name one, or set model.sharing=none"
        )
    copies: list[tuple[Tensor, Tensor]] = []
    for modality, name in given.items():
        check_folder(Path(name))  # weights with a flipped bit would load without a word
        found = _copies(encoder, modality, name)
        say(f"initial   {modality} from {name}: loaded {len(found)}/{len(found)} tensors")
        copies += found
    with torch.no_grad():
        for ours, theirs in copies:
            ours.copy_(theirs)


def _copies(encoder: Encoder, modality: str, name: str) -> list[tuple[Tensor, Tensor]]:
    """The encoder's tensors, and what they shall be."""
    model, missing = _stock(modality, name)
    _check_sizes(encoder, modality, name, model.config)
    stock_names = {id(parameter): key for key, parameter in model.named_parameters()}
    copies, bad = [], []
    for pair in PAIRS[modality](encoder, model):
        theirs = pair.stock
        # A part of a tensor that was loaded is loaded.
        if stock_names.get(id(theirs if theirs._base is None else theirs._base)) in missing:
            bad.append(f"{pair.name}: not in the file")
            continue
        if pair.name == POSITIONS.format(modality):
            theirs = _positions(encoder, modality, name, model, theirs)
        if theirs.numel() != pair.ours.numel():
            bad.append(f"{pair.name}: {tuple(theirs.shape)} there, {tuple(pair.ours.shape)} here")
            continue
        copies.append((pair.ours, theirs.reshape(pair.ours.shape)))
    if bad:
        hint = ""
        if all(line.startswith(POOLER) for line in bad):
            hint = (
                "\nIt was saved without its pooler, as by a class for masked language. "
                "RobertaPreLayerNormModel.from_pretrained(..).save_pretrained(..) adds one with random weights"
            )
        listed = "\n  ".join(bad[:10] + ([f"... and {len(bad) - 10} more"] if len(bad) > 10 else []))
        raise InitialError(
            f"init_from.{modality}={name}: {len(copies)}/{len(copies) + len(bad)} tensors fit:\n  {listed}{hint}"
        )
    return copies


def _stock(modality: str, name: str) -> tuple[Any, set[str]]:
    """The stock model, and the names of parameters that its file lacks."""
    try:
        model, info = AutoModel.from_pretrained(name, output_loading_info=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: tensors of other shapes
        raise InitialError(f"init_from.{modality}={name}: {error}") from error
    if model.config.model_type != TYPES[modality]:
        raise InitialError(
            f"init_from.{modality}={name}: a model of type {model.config.model_type}; {TYPES[modality]} is needed"
        )
    return model.eval(), set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}


def _check_sizes(encoder: Encoder, modality: str, name: str, config: Any) -> None:
    model = encoder.config
    wanted: dict[str, tuple[str, object]] = {
        "hidden_size": ("model.width", model.width),
        "num_hidden_layers": ("model.depth", model.depth),
        "num_attention_heads": ("model.heads", model.heads),
        "intermediate_size": ("model.width * model.mlp_ratio", int(model.width * model.mlp_ratio)),
        "hidden_act": ("the activation", "gelu"),
    }
    if modality != "text":
        wanted["patch_size"] = (f"model.{modality}_patch", getattr(model, f"{modality}_patch"))
        wanted["qkv_bias"] = ("that of our attention", True)
    else:
        wanted["vocab_size"] = ("the tokenizer's vocabulary (tokenizer.name)", encoder.vocabulary.size)
        wanted["pad_token_id"] = ("the tokenizer's padding id", encoder.vocabulary.pad_id)
    for key, (ours, value) in wanted.items():
        if getattr(config, key) != value:
            raise InitialError(
                f"init_from.{modality}={name}: {key} is {getattr(config, key)} there, and {ours} is {value} here"
            )
    if config.layer_norm_eps > LARGEST_EPS:
        raise InitialError(
            f"init_from.{modality}={name}: layer_norm_eps is {config.layer_norm_eps} there, and {LAYER_NORM_EPS} here; "
            f"allowed is up to {LARGEST_EPS}"
        )


def _positions(encoder: Encoder, modality: str, name: str, model: Any, theirs: Tensor) -> Tensor:
    """Their positions for our sizes, in float32."""
    theirs = theirs.float()  # files in half precision are loaded as such
    tokenizer: Any = encoder.get_submodule(f"tokenizers.{modality}")
    config = model.config
    if modality == "text":
        needed = tokenizer.positions.num_embeddings
        if len(theirs) < needed:
            raise InitialError(
                f"init_from.text={name}: has positions for {len(theirs) - encoder.vocabulary.pad_id - 1} tokens, "
                f"data.views.text.max_tokens={tokenizer.max_tokens}"
            )
        # The stock class adds the embedding of the first type of token to all of them.
        first: Tensor = model.embeddings.token_type_embeddings.weight[0]
        return theirs[:needed] + first
    prefix, patches = theirs[: tokenizer.prefix_tokens], theirs[tokenizer.prefix_tokens :]
    if modality == "image":
        height = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        grid = patches.view(height // config.patch_size, -1, patches.shape[1])
    else:
        patch = config.patch_size
        rows = (config.num_mel_bins - patch) // config.frequency_stride + 1
        grid = patches.view(rows, -1, patches.shape[1])
        grid = _read_off(grid, 0, config.num_mel_bins // patch, patch / config.frequency_stride)
        grid = _read_off(grid, 1, config.max_length // patch, patch / config.time_stride)
        if grid.shape[1] >= tokenizer.grid[1]:
            grid = grid[:, : tokenizer.grid[1]]
    return torch.cat([prefix, resize_grid(grid, tokenizer.grid).flatten(0, 1)])


def _read_off(grid: Tensor, axis: int, count: int, step: float) -> Tensor:
    """``count`` slices of the grid along an axis, ``step`` apart; between two of its own by linear interpolation."""
    places = (torch.arange(count) * step).clamp(max=grid.shape[axis] - 1)
    low, high = (each.long() for each in (places.floor(), places.ceil()))
    share = (places - low).unsqueeze(1 - axis)[..., None]
    return torch.lerp(grid.index_select(axis, low), grid.index_select(axis, high), share)


def resize_grid(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions (rows, columns, D) interpolated to another grid (Dosovitskiy et al. 2021, section 3.2)."""
    if grid.shape[:2] == size:
        return grid
    smaller = size[0] < grid.shape[0] or size[1] < grid.shape[1]  # only then is there something to smooth
    return F.interpolate(grid.permute(2, 0, 1)[None], size, mode="bicubic", antialias=smaller)[0].permute(1, 2, 0)
