"""The encoder: a tokenizer per modality, one pre-LN Transformer trunk, pooling and projection per modality.

A unimodal pass sends one modality through the trunk; a joint pass sends several as one sequence. The choices
(LayerNorm eps 1e-6, GELU, qkv biases, learned positions, the poolings) are those of stock `transformers` classes, so
that every stream can be exported exactly.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batch import Field
from data.documents import read_document
from data.errors import UserError
from data.transforms import Views
from pretrain.model.layers import ALL, LAYER_NORM_EPS, Block, apart, init_weights
from pretrain.model.tokenizers import TOKENIZERS, ModelConfig, Tokens, Vocabulary

SCHEMA = 2


class ImageHead(nn.Module):
    """The class token, and a linear projection (ViTModel's pooler, made an identity)."""

    pooled = 1  # first tokens that ``pool`` reads

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, embed_dim)

    def pool(self, states: Tensor) -> Tensor:
        """(n, N, D) -> (n, D)."""
        return states[:, 0]

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, D) -> (n, E)."""
        out: Tensor = self.projection(pooled)
        return out


class TextHead(nn.Module):
    """RoBERTa's pooler, tanh(dense(first token)), and a projection without bias."""

    pooled = 1  # first tokens that ``pool`` reads

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def pool(self, states: Tensor) -> Tensor:
        """(n, N, D) -> (n, D)."""
        return torch.tanh(self.dense(states[:, 0]))

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, D) -> (n, E)."""
        out: Tensor = self.projection(pooled)
        return out


class AudioHead(nn.Module):
    """The mean of the two prefix tokens, and LayerNorm with a linear projection: ASTModel's pooling and head."""

    pooled = 2  # first tokens that ``pool`` reads

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.projection = nn.Linear(width, embed_dim)

    def pool(self, states: Tensor) -> Tensor:
        """(n, N, D) -> (n, D)."""
        return (states[:, 0] + states[:, 1]) / 2

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, D) -> (n, E)."""
        out: Tensor = self.projection(self.norm(pooled))
        return out


HEADS: dict[str, Any] = {"image": ImageHead, "text": TextHead, "audio": AudioHead}


class Encoder(nn.Module):
    """What survives pretraining."""

    def __init__(self, config: ModelConfig, views: Views, vocabulary: Vocabulary) -> None:
        """Random weights from torch's global generator.

        Args:
            config: shape of the trunk and patches.
            views: which modalities there are and the sizes of their inputs.
            vocabulary: size and padding id of the text tokenizer.

        Raises:
            UserError: sizes that patches don't divide.
        """
        super().__init__()
        self.config, self.views, self.vocabulary = config, views, vocabulary
        self.recompute = False
        """Whether blocks compute their activations again in the backward pass, rather than keep them."""
        self.tokenizers = nn.ModuleDict(
            {name: TOKENIZERS[name](config, view, vocabulary) for name, view in views.used.items()}
        )
        shared, own = (ALL,), tuple(views.used)
        attention_keys = own if config.sharing == "none" else shared
        feed_forward_keys = shared if config.sharing == "all" else own
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio, attention_keys, feed_forward_keys)
            for _ in range(config.depth)
        )
        self.norm = nn.ModuleDict({key: nn.LayerNorm(config.width, eps=LAYER_NORM_EPS) for key in attention_keys})
        self.heads = nn.ModuleDict({name: HEADS[name](config.width, config.embed_dim) for name in views.used})
        self.apply(init_weights)

    def tokens(self, modality: str, field: Field, keep: Tensor | None = None) -> Tokens:
        """Tokens of one modality; ``keep`` (n, K) names the patches, or tokens of a text, to keep; None keeps all."""
        tokens: Tokens = self.tokenizers[modality](field, keep)
        return tokens

    def patches(self, modality: str, x: Tensor) -> Tensor:
        """Input (n, ...) of a modality made of patches -> (n, P, patch_dim)."""
        tokenizer: Any = self.tokenizers[modality]
        patches: Tensor = tokenizer.patchify(x)
        return patches

    def trunk(self, streams: dict[str, Tokens], last: int | None = None, first: int | None = None) -> dict[str, Tensor]:
        """Attend over the tokens of all streams as one sequence.

        Args:
            streams: modality -> tokens of the same n samples.
            last: of how many last blocks the mean is wanted, each normalised without weights (data2vec, Baevski et
                al. 2022, section 3.3). None: of none of them, but what follows the last LayerNorm.
            first: of a single stream, how many of its first tokens' states are wanted; the last block then makes no
                others. None: all.

        Returns:
            modality -> states (n, N, D).
        """
        if first is not None and (len(streams) > 1 or last is not None):
            raise ValueError("the first tokens alone can be had of one stream, after the last LayerNorm")
        xs = [tokens.x for tokens in streams.values()]
        x = xs[0] if len(xs) == 1 else torch.cat(xs, dim=1)
        valid = None
        if any(tokens.valid is not None for tokens in streams.values()):
            valid = torch.cat([_valid(tokens) for tokens in streams.values()], dim=1)
        lengths = {name: tokens.x.shape[1] for name, tokens in streams.items()}
        total = torch.zeros((), device=x.device)
        for i, block in enumerate(self.blocks, start=1):
            wanted = first if i == len(self.blocks) else None
            if self.recompute and torch.is_grad_enabled():  # there is no dropout, so no random state
                x = checkpoint(block, x, valid, lengths, wanted, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, valid, lengths, wanted)
            if last is not None and i > len(self.blocks) - last:
                total = total + F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        lengths = lengths if first is None else dict.fromkeys(lengths, x.shape[1])
        x = apart(self.norm, "forward", x, lengths) if last is None else total / last
        return dict(zip(streams, torch.split(x, list(lengths.values()), dim=1), strict=True))

    def compile_blocks(self) -> None:
        """Compile each block; what is saved and exported stays as it is."""
        # Blocks have their graphs in common: one per set of modalities, and one per modality for a last block that
        # makes first tokens alone. Each of these is there for a single sample, for the shape that came first and for
        # others, with gradients and without: 60 for three modalities, and more where several lengths vary. Past its
        # limit, 8 unless told, torch runs what is new uncompiled.
        limit = 16 * 2 ** len(self.views.used)
        for block in self.blocks:
            block.compile(recompile_limit=limit)

    def encode(self, modality: str, field: Field, keep: Tensor | None = None) -> Tensor:
        """One modality alone: states (n, N, D)."""
        return self.trunk({modality: self.tokens(modality, field, keep)})[modality]

    def features(self, modality: str, field: Field, keep: Tensor | None = None) -> Tensor:
        """One modality alone: features (n, D). As ``pool`` of ``encode``, without states that it does not read."""
        head: Any = self.heads[modality]
        streams = {modality: self.tokens(modality, field, keep)}
        return self.pool(modality, self.trunk(streams, first=head.pooled)[modality])

    def pool(self, modality: str, states: Tensor) -> Tensor:
        """States (n, N, D) -> features (n, D): what probes read and exports return as ``pooler_output``."""
        head: Any = self.heads[modality]
        pooled: Tensor = head.pool(states)
        return pooled

    def project(self, modality: str, features: Tensor) -> Tensor:
        """Features (n, D) -> embeddings (n, E), not normalised: what is compared over modalities."""
        embedding: Tensor = self.heads[modality](features)
        return embedding

    def forward(self, modality: str, field: Field) -> tuple[Tensor, Tensor]:
        """One modality alone, whole: features (n, D) and embeddings (n, E)."""
        features = self.features(modality, field)
        return features, self.project(modality, features)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` into an existing folder.

        Args:
            folder: where to.
            weights: instead of its own, as ``state_dict`` gives them.
        """
        config = {
            "schema": SCHEMA,
            "model": dataclasses.asdict(self.config),
            "views": dataclasses.asdict(self.views),
            "vocabulary": self.vocabulary._asdict(),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = self.state_dict() if weights is None else weights
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read what ``save`` wrote, on the CPU.

        Raises:
            FileNotFoundError: a file is missing.
            UserError: another schema, a damaged config.json, or tensors that are missing, left over or of other shapes.
        """
        config = read_document(folder / "config.json")
        if config.get("schema") != SCHEMA:
            raise UserError(f"{folder}/config.json: schema {config.get('schema')}; this version reads {SCHEMA}")
        try:
            model: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), config["model"]))
            views: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Views), config["views"]))
            words = config["vocabulary"]
            vocabulary = Vocabulary(**{**words, "special_ids": tuple(words["special_ids"])})
            if odd := [id_ for id_ in (*vocabulary[:-1], *vocabulary.special_ids) if type(id_) is not int]:
                raise TypeError(f"vocabulary holds {odd[0]!r}, where only whole numbers can be")
        except (KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
            raise UserError(f"{folder}/config.json is damaged: {error}") from error
        encoder = cls(model, views, vocabulary)
        try:
            encoder.load_state_dict(load_file(folder / "model.safetensors"))
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}/model.safetensors does not fit its config.json: {error}") from error
        return encoder


def _valid(tokens: Tokens) -> Tensor:
    if tokens.valid is not None:
        return tokens.valid
    return torch.ones(tokens.x.shape[:2], dtype=torch.bool, device=tokens.x.device)
