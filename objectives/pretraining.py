"""One step's objectives as one module with one forward: unimodal passes, joint pass, named losses."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.batch import Batch, Field
from objectives.contrastive import Contrastive, ContrastiveConfig
from objectives.masked_language import MaskedLanguage, MaskedLanguageConfig
from objectives.masked_region import MaskedRegion, MaskedRegionConfig
from objectives.masking import mask_tokens, split_patches
from objectives.passes import JointPass, Passes
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import PatchTokenizer, Tokens

# Name -> class; the name is also the field of ObjectivesConfig that configures it. A new objective is a line here. A
# class says which modalities it `learns_from` and which passes it `reads`, "embeddings" or "joint"; passes that nobody
# reads are not made.
OBJECTIVES: dict[str, Any] = {
    "contrastive": Contrastive,
    "masked_language": MaskedLanguage,
    "masked_region": MaskedRegion,
}


@dataclass
class KeepConfig:
    """Share of its patches that the encoder sees, per modality made of patches."""

    image: float = 1.0
    """Of an image's patches."""
    audio: float = 1.0
    """Of a spectrogram's patches."""


@dataclass
class ObjectivesConfig:
    """The losses, and how much of each input the encoder sees."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Contrastive loss between modalities, on unimodal passes."""
    masked_language: MaskedLanguageConfig = field(default_factory=MaskedLanguageConfig)
    """Masked-language loss, on the joint pass."""
    masked_region: MaskedRegionConfig = field(default_factory=MaskedRegionConfig)
    """Masked-region losses of image and audio, on the joint pass."""
    keep: KeepConfig = field(default_factory=lambda: KeepConfig(image=0.5, audio=0.25))
    """What the unimodal pass sees."""
    joint_keep: KeepConfig = field(default_factory=lambda: KeepConfig(image=0.25, audio=0.2))
    """What the joint pass sees; the other patches are predicted."""
    joint_share: float = 1.0
    """Share of the batch that takes the joint pass. Contrastive learning wants large batches, masking does not."""
    final_whole: float = 0.05
    """The unimodal pass sees whole inputs in this last share of the steps, since exports always do."""

    def __post_init__(self) -> None:
        for part in ("keep", "joint_keep"):
            for name, share in vars(getattr(self, part)).items():
                if not 0 < share <= 1:
                    raise ValueError(f"objectives.{part}.{name}={share}: allowed is above 0 and at most 1")
        if not 0 < self.joint_share <= 1:
            raise ValueError(f"objectives.joint_share={self.joint_share}: allowed is above 0 and at most 1")
        if not 0 <= self.final_whole <= 1:
            raise ValueError(f"objectives.final_whole={self.final_whole}: allowed is 0 to 1")
        for name in OBJECTIVES:
            if not 0 <= (weight := getattr(self, name).weight) < math.inf:
                raise ValueError(f"objectives.{name}.weight={weight}: allowed is 0 or more")
        if all(getattr(self, name).weight == 0 for name in OBJECTIVES):
            raise ValueError("every objective has weight 0: there is nothing to learn")


class Loss(NamedTuple):
    """Outcome of a step.

    Attributes:
        total: scalar, the weighted sum of the terms.
        terms: name -> scalar, unweighted.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Pretraining(nn.Module):
    """Encoder and objectives. One ``forward``, so that a wrapper for data parallelism sees one call."""

    def __init__(self, encoder: Encoder, config: ObjectivesConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        self.weights = {name: getattr(config, name).weight for name in OBJECTIVES}
        self.objectives = nn.ModuleDict(
            {name: cls(getattr(config, name), encoder) for name, cls in OBJECTIVES.items() if self.weights[name] > 0}
        )
        self.reads = {OBJECTIVES[name].reads for name in self.objectives}
        ordinary = torch.ones(encoder.vocabulary.size, dtype=torch.bool)
        ordinary[list(encoder.vocabulary.special_ids)] = False
        self.ordinary = nn.Buffer(ordinary, persistent=False)

    def forward(self, batch: Batch, seed: int, whole: bool = False) -> Loss:
        """The losses of a batch as ``OnDevice`` gives it.

        Args:
            batch: any subset of the modalities per row.
            seed: fixes which patches and tokens are hidden.
            whole: the unimodal pass sees whole inputs.
        """
        generator = torch.Generator(self.ordinary.device).manual_seed(seed)
        embeddings: dict[str, Field] = {}
        joint: list[JointPass] = []
        if "embeddings" in self.reads:
            embeddings = self._unimodal(batch, generator, whole)
        if "joint" in self.reads:
            rows = max(1, round(self.config.joint_share * batch.size))
            joint = [self._joint(group, generator) for group in group_by_presence(batch, rows)]
        passes = Passes(self.encoder, embeddings, joint)

        total = torch.zeros((), device=self.ordinary.device)
        terms: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            for term, value in objective(passes).items():
                terms[term] = value
                total = total + self.weights[name] * value
        reaching: Tensor = _Reaches.apply(total, *self.parameters())  # type: ignore[no-untyped-call]
        return Loss(reaching, terms)

    def _unimodal(self, batch: Batch, generator: torch.Generator, whole: bool) -> dict[str, Field]:
        embeddings = {}
        for name, inputs in batch.fields.items():
            keep = None
            tokenizer = self.encoder.tokenizers[name]
            if isinstance(tokenizer, PatchTokenizer) and not whole:
                share = getattr(self.config.keep, name)
                keep = split_patches(len(inputs.x), tokenizer.num_patches, share, generator).visible
            features = self.encoder.pool(name, self.encoder.encode(name, inputs, keep))
            embeddings[name] = Field(self.encoder.project(name, features), inputs.rows)
        return embeddings

    def _joint(self, inputs: dict[str, Field], generator: torch.Generator) -> JointPass:
        streams: dict[str, Tokens] = {}
        splits = {}
        chosen = None
        for name, field_ in inputs.items():
            tokenizer = self.encoder.tokenizers[name]
            if isinstance(tokenizer, PatchTokenizer):
                share = getattr(self.config.joint_keep, name)
                splits[name] = split_patches(len(field_.x), tokenizer.num_patches, share, generator)
                streams[name] = self.encoder.tokens(name, field_, splits[name].visible)
            elif "masked_language" in self.objectives:
                language = self.config.masked_language
                rate = language.rate if len(inputs) == 1 else language.rate_paired
                masked = mask_tokens(field_.x, self.ordinary, self.encoder.vocabulary.mask_id, rate, generator)
                chosen = masked.chosen
                streams[name] = self.encoder.tokens(name, field_._replace(x=masked.ids))
            else:
                streams[name] = self.encoder.tokens(name, field_)
        return JointPass(inputs, self.encoder.trunk(streams), splits, chosen)


class _Reaches(torch.autograd.Function):
    """Gives every parameter a gradient, of zeros where the batch has nothing that it works on.

    A rank whose batch lacks a modality must still take part when gradients are averaged, and a batch that feeds no
    objective is a step of zeros and no error.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.parameters)
        return gradients[0], *zeros


def group_by_presence(batch: Batch, rows: int) -> list[dict[str, Field]]:
    """The first ``rows`` rows, grouped by which modalities they have, so that what is absent costs nothing.

    Returns:
        for each set of modalities that occurs: modality -> Field of the group's samples, in row order.
    """
    if not batch.fields:
        return []
    present = torch.stack([torch.isin(torch.arange(rows), f.rows) for f in batch.fields.values()], dim=1)  # (rows, M)
    groups = []
    for pattern in torch.unique(present, dim=0):
        wanted = (present == pattern).all(dim=1).nonzero()[:, 0]
        names = [name for name, has in zip(batch.fields, pattern.tolist(), strict=True) if has]
        groups.append({name: _rows(batch.fields[name], wanted) for name in names})
    return [group for group in groups if group]


def _rows(field_: Field, rows: Tensor) -> Field:
    return field_.select(torch.isin(field_.rows, rows).nonzero()[:, 0])
