"""What sentence-transformers needs besides the text stream, so that it reads `text/` as it is."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pretrain.exports.subject import Subject

MODULES = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")


def save_sentence_layout(subject: Subject, folder: Path) -> None:
    """``modules.json`` and what it names: the first token, our pooler and projection as two dense layers, length 1.

    Nothing where the projection was not trained.
    """
    if not subject.contrasted:
        return
    head, config = subject.encoder.get_submodule("heads.text"), subject.encoder.config
    weights = {name: value.to(subject.dtype).contiguous() for name, value in head.state_dict().items()}
    paths = ["", *(f"{number}_{name}" for number, name in enumerate(MODULES) if number)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(zip(paths, MODULES, strict=True))
    ]
    _write(folder / "modules.json", modules)
    positions: Any = subject.encoder.get_submodule("tokenizers.text.positions")
    longest = positions.num_embeddings - subject.encoder.vocabulary.pad_id - 1
    _write(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    pooling = {"word_embedding_dimension": config.width, "pooling_mode_cls_token": True}
    others = ("mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    _write(folder / paths[1] / "config.json", {**pooling, **{f"pooling_mode_{name}": False for name in others}})
    dense = {"linear.weight": weights["dense.weight"], "linear.bias": weights["dense.bias"]}
    _save_dense(folder / paths[2], dense, "torch.nn.modules.activation.Tanh")
    _save_dense(folder / paths[3], {"linear.weight": weights["projection.weight"]}, "torch.nn.modules.linear.Identity")


def _save_dense(folder: Path, weights: dict[str, Tensor], activation: str) -> None:
    outputs, inputs = weights["linear.weight"].shape
    config = {"in_features": inputs, "out_features": outputs, "bias": "linear.bias" in weights}
    _write(folder / "config.json", {**config, "activation_function": activation})
    save_file(weights, folder / "model.safetensors")


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
