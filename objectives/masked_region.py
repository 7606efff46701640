"""Masked-region modelling: predict hidden patches of images and spectrograms from the visible ones."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from objectives.gather import world_size
from objectives.masking import PatchSplit
from objectives.passes import JointInput, JointPass, Passes, at_least_float32
from objectives.teacher import Teacher, TeacherConfig
from pretrain.model.encoder import Encoder
from pretrain.model.layers import LAYER_NORM_EPS, Block, gather_tokens, init_weights
from pretrain.model.tokenizers import TOKENIZERS, PatchTokenizer


@dataclass
class MaskedRegionConfig:
    """Predict hidden patches."""

    weight: float = 1.0
    """Weight of each modality's term; 0 switches the objective off."""
    weight_end: float | None = None
    """Weight at the end of training, to which it goes in a straight line; null keeps it as it is."""
    target: str = "pixel"
    """What of a patch is predicted. pixel: its values, normalised; latent: a teacher's state at it, where the teacher
    sees everything; kl: to which prototypes the teacher assigns that state."""
    decode: float = 1.0
    """Share of the hidden patches that are predicted, a random part of them; the others cost nothing."""
    decoder_width: int = 128
    """Width of the decoder."""
    decoder_depth: int = 1
    """Number of the decoder's Transformer blocks."""
    decoder_heads: int = 4
    """Attention heads of the decoder; they divide its width."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Of the targets latent and kl."""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"objectives.masked_region.target={self.target}: allowed are {', '.join(TARGETS)}")
        if not 0 < self.decode <= 1:
            raise ValueError(f"objectives.masked_region.decode={self.decode}: allowed is above 0 and at most 1")
        for name in ("decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"objectives.masked_region.{name}={getattr(self, name)}: allowed is 1 or more")
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"objectives.masked_region.decoder_heads={self.decoder_heads}: "
                f"it must divide decoder_width={self.decoder_width}"
            )


class MaskedRegion(nn.Module):
    """A light decoder per modality made of patches (MAE, He et al. 2022, section 3)."""

    reads = "joint"

    @staticmethod
    def learns_from(modalities: Collection[str]) -> bool:
        """It predicts what is made of patches."""
        return any(issubclass(TOKENIZERS[name], PatchTokenizer) for name in modalities)

    def __init__(self, config: MaskedRegionConfig, encoder: Encoder) -> None:
        super().__init__()
        self.decode = config.decode
        target = TARGETS[config.target]
        self.decoders = nn.ModuleDict(
            {
                name: RegionDecoder(config, encoder.config.width, tokenizer, target.width(tokenizer, encoder))
                for name, tokenizer in encoder.tokenizers.items()
                if isinstance(tokenizer, PatchTokenizer)
            }
        )
        self.decoders.apply(init_weights)
        self.names = tuple(f"masked_{name}" for name in self.decoders)
        self.target = target(config.teacher, encoder, list(self.decoders))

    def counts(self, joint: Sequence[JointInput]) -> dict[str, int]:
        """How many patches of each modality a rank is about to predict."""
        counts: dict[str, int] = {}
        for each in joint:
            for name, split in each.splits.items():
                number = len(split.hidden) * self._predicted(split)
                counts[f"masked_{name}"] = counts.get(f"masked_{name}", 0) + number
        return counts

    def _predicted(self, split: PatchSplit) -> int:
        """How many hidden patches of each sample are predicted."""
        hidden = split.hidden.shape[1]
        return min(hidden, max(1, round(self.decode * hidden)))

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """``masked_image``, ``masked_audio``: mean error over the predicted patches; absent where none is hidden."""
        errors: dict[str, list[Tensor]] = {name: [] for name in self.decoders}
        for joint in passes.joint:
            splits = {name: split for name, split in joint.splits.items() if split.hidden.numel()}
            if not splits:
                continue
            wanted = self.target.wanted(passes.encoder, joint)
            for name, split in splits.items():
                # They are in random order.
                part = split._replace(hidden=split.hidden[:, : self._predicted(split)])
                predicted = at_least_float32(self.decoders[name](joint.states[name], part))
                error = self.target.errors(name, predicted, gather_tokens(wanted[name], part.hidden))
                errors[name].append(error.sum())
        terms = {f"masked_{name}": torch.stack(each).sum() for name, each in errors.items() if each}
        return {name: total / passes.counts[name].to(total.dtype) for name, total in terms.items()}

    def after_step(self, encoder: Encoder, progress: float) -> None:
        """What goes on when the weights have changed; see ``Pretraining.after_step``."""
        self.target.after_step(encoder, progress)


class RegionDecoder(nn.Module):
    """Visible states and mask tokens -> a prediction for each hidden patch."""

    def __init__(self, config: MaskedRegionConfig, width: int, tokenizer: PatchTokenizer, predicts: int) -> None:
        super().__init__()
        self.prefix_tokens = tokenizer.prefix_tokens
        self.embed = nn.Linear(width, config.decoder_width)
        self.mask = nn.Parameter(torch.zeros(config.decoder_width))
        self.positions = nn.Parameter(torch.zeros(tokenizer.num_patches, config.decoder_width))
        self.blocks = nn.ModuleList(
            Block(config.decoder_width, config.decoder_heads, mlp_ratio=4.0) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(config.decoder_width, eps=LAYER_NORM_EPS)
        self.predict = nn.Linear(config.decoder_width, predicts)
        nn.init.normal_(self.mask, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, states: Tensor, split: PatchSplit) -> Tensor:
        """States (n, prefix + K, D) of the visible patches -> (n, P - K, *), the hidden ones in order."""
        positions = self.positions.expand(len(states), -1, -1)
        prefix, visible = self.embed(states).split([self.prefix_tokens, split.visible.shape[1]], dim=1)
        visible = visible + gather_tokens(positions, split.visible)
        hidden = self.mask + gather_tokens(positions, split.hidden)
        x = torch.cat([prefix, visible, hidden], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.predict(self.norm(x[:, -split.hidden.shape[1] :]))
        return out


class PixelTarget(nn.Module):
    """The patch's own values, normalised (MAE, He et al. 2022, section 3)."""

    def __init__(self, _: TeacherConfig, __: Encoder, ___: Collection[str]) -> None:
        super().__init__()

    @staticmethod
    def width(tokenizer: PatchTokenizer, _: Encoder) -> int:
        """How many numbers are predicted for a patch."""
        return tokenizer.patch_dim

    def wanted(self, encoder: Encoder, joint: JointPass) -> dict[str, Tensor]:
        """For each modality made of patches, what ``errors`` compares with, of all patches: (n, P, *)."""
        return {name: encoder.patches(name, joint.inputs[name].x) for name in joint.splits}

    def errors(self, _: str, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Predictions of a modality (n, K, width) and what was wanted there (n, K, *) -> (n, K)."""
        return (predicted - normalise_patches(wanted)).square().mean(dim=-1)

    def after_step(self, encoder: Encoder, progress: float) -> None:
        """What goes on when the weights have changed: nothing."""


class LatentTarget(nn.Module):
    """The teacher's state at the patch, where it sees the whole input (data2vec, Baevski et al. 2022, section 3)."""

    def __init__(self, config: TeacherConfig, encoder: Encoder, _: Collection[str]) -> None:
        super().__init__()
        if config.layers > (depth := encoder.config.depth):
            raise UserError(f"objectives.masked_region.teacher.layers={config.layers}: model.depth is only {depth}")
        self.config = config
        self.teacher = Teacher(encoder, config.momentum)

    @staticmethod
    def width(_: PatchTokenizer, encoder: Encoder) -> int:
        """That of the encoder."""
        return encoder.config.width

    @torch.no_grad()
    def wanted(self, _: Encoder, joint: JointPass) -> dict[str, Tensor]:
        """The teacher's states of all patches (n, P, D), of each modality made of patches."""
        teacher: Any = self.teacher.module
        streams = {name: teacher.tokens(name, inputs) for name, inputs in joint.inputs.items()}
        states = teacher.trunk(streams, last=self.config.layers)
        return {name: states[name][:, teacher.tokenizers[name].prefix_tokens :] for name in joint.splits}

    def errors(self, _: str, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Smooth L1 distance of (n, K, D) and (n, K, D) -> (n, K)."""
        return F.smooth_l1_loss(predicted, wanted, reduction="none").mean(dim=-1)

    def after_step(self, encoder: Encoder, progress: float) -> None:
        """The teacher follows."""
        self.teacher.follow(encoder, progress)


class PrototypeTarget(LatentTarget):
    """To which prototypes the teacher assigns its state at the patch (iBOT, Zhou et al. 2022, section 3).

    Teacher and student have prototypes of their own, the teacher's being an average of the student's past ones.
    """

    def __init__(self, config: TeacherConfig, encoder: Encoder, modalities: Collection[str]) -> None:
        super().__init__(config, encoder, modalities)
        self.modalities = list(modalities)
        width, count = encoder.config.width, config.prototypes
        self.prototypes = nn.ParameterDict({name: torch.randn(count, width) for name in modalities})
        self.teacher_prototypes = Teacher(self.prototypes, config.momentum)
        self.centres = nn.Buffer(torch.zeros(len(modalities), count))
        # Of this step, by modality: sums of the teacher's similarities, and of how many patches. No buffer, since data
        # parallelism would overwrite it with the first rank's.
        self.sums: Tensor | None = None

    def errors(self, modality: str, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Divergence of the student's assignments, from (n, K, D), from the teacher's, from (n, K, D) -> (n, K)."""
        number, config = self.modalities.index(modality), self.config
        with torch.no_grad():
            prototypes: Any = self.teacher_prototypes.module
            similarities = _cosines(wanted, prototypes[modality])
            if self.training:
                self._count(number, similarities.flatten(0, 1))
            assigned = ((similarities - self.centres[number]) / config.temperature).softmax(dim=-1)
        student = _cosines(predicted, self.prototypes[modality]) / config.student_temperature
        return F.kl_div(student.log_softmax(dim=-1), assigned, reduction="none").sum(dim=-1)

    def _count(self, number: int, similarities: Tensor) -> None:
        """Add the rows (n, prototypes) that are finite to what the step has of a modality."""
        if self.sums is None:
            self.sums = torch.zeros(len(self.centres), self.config.prototypes + 1, device=similarities.device)
        # The optimiser leaves a step out whose gradients are not finite. Centres would keep a NaN for good.
        finite = similarities.isfinite().all(dim=1, keepdim=True)
        self.sums[number, :-1] += similarities.where(finite, 0).sum(dim=0)
        self.sums[number, -1] += finite.sum()

    @torch.no_grad()
    def after_step(self, encoder: Encoder, progress: float) -> None:
        """The teacher follows, and the centres move to the mean of the step's patches of all ranks."""
        super().after_step(encoder, progress)
        self.teacher_prototypes.follow(self.prototypes, progress)
        sums = self.centres.new_zeros(len(self.centres), self.config.prototypes + 1) if self.sums is None else self.sums
        if world_size() > 1:
            dist.all_reduce(sums)
        count = sums[:, -1:]
        means = torch.where(count > 0, sums[:, :-1] / count, self.centres)
        self.centres.lerp_(means, 1 - self.config.centre_momentum)
        self.sums = None


# Name -> class, the allowed values of ``target``. A new target is a line here.
TARGETS: dict[str, Any] = {"pixel": PixelTarget, "latent": LatentTarget, "kl": PrototypeTarget}


def _cosines(states: Tensor, prototypes: Tensor) -> Tensor:
    """(n, K, D) and (count, D) -> (n, K, count)."""
    return at_least_float32(F.linear(F.normalize(states, dim=-1), F.normalize(prototypes, dim=-1)))


def normalise_patches(patches: Tensor) -> Tensor:
    """(n, P, patch_dim) to mean 0 and variance 1 per patch (MAE, section 4, "reconstruction target")."""
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n, P, 1) of the values of each patch."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
