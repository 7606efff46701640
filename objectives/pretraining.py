"""One step's objectives as one module with one forward: unimodal passes, joint pass, named losses."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import Batch, Field
from data.draws import fork, uniform, uniforms
from objectives.contrastive import Contrastive, ContrastiveConfig, embedding_gradients, with_gradients
from objectives.gather import world_size
from objectives.masked_language import MaskedLanguage, MaskedLanguageConfig
from objectives.masked_region import MaskedRegion, MaskedRegionConfig
from objectives.masking import MASKS, keep_tokens, mask_tokens, split_patches
from objectives.passes import JointInput, JointPass, Passes
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import PatchTokenizer, Tokens

# Name -> class; the name is also the field of ObjectivesConfig that configures it. A new objective is a line here. A
# class says whether it `learns_from` some modalities, those of the encoder (else it is not built) and of a sample (else
# that takes no joint pass for it), and which passes it `reads`, "embeddings", "pairs" (embeddings of samples that have
# several modalities) or "joint"; passes that nobody reads are not made. `names` are those of its terms. It may have
# ``counts(joint)``, by which ``Passes.counts`` come about, and ``after_step(encoder, progress)``, see
# ``Pretraining.after_step``.
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
class UnimodalKeepConfig(KeepConfig):
    """Share of its input that the unimodal pass sees."""

    text: float = 1.0
    """Of data.views.text.max_tokens: a text with more tokens keeps its first one and others at random."""


@dataclass
class MaskConfig:
    """Which of its patches are hidden, per modality made of patches."""

    image: str = "random"
    """Of an image. Allowed: random; block (a rectangle)."""
    audio: str = "random"
    """Of a spectrogram. Allowed: random; block; time, frequency and time_frequency (whole columns, rows, both)."""


@dataclass
class ObjectivesConfig:
    """The losses, and how much of each input the encoder sees."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Contrastive loss between modalities, on unimodal passes."""
    masked_language: MaskedLanguageConfig = field(default_factory=MaskedLanguageConfig)
    """Masked-language loss, on the joint pass."""
    masked_region: MaskedRegionConfig = field(default_factory=MaskedRegionConfig)
    """Masked-region losses of image and audio, on the joint pass."""
    keep: UnimodalKeepConfig = field(default_factory=lambda: UnimodalKeepConfig(image=0.5, audio=0.25))
    """What the unimodal pass sees."""
    joint_keep: KeepConfig = field(default_factory=lambda: KeepConfig(image=0.25, audio=0.2))
    """What the joint pass sees; the other patches are predicted."""
    joint_mask: MaskConfig = field(default_factory=MaskConfig)
    """Which patches the joint pass does not see."""
    joint_share: float = 0.125
    """Share of the batch that takes the joint pass. Contrastive learning wants large batches, masking does not."""
    joint_share_alone: float = 1.0
    """The same of samples of one modality, from which contrastive learning learns nothing."""
    final_whole: float = 0.05
    """The unimodal pass sees whole inputs in this last share of the steps, since exports always do."""

    def __post_init__(self) -> None:
        for part in ("keep", "joint_keep"):
            for name, share in vars(getattr(self, part)).items():
                if not 0 < share <= 1:
                    raise ValueError(f"objectives.{part}.{name}={share}: allowed is above 0 and at most 1")
        for name, allowed in MASKS.items():
            if (mask := getattr(self.joint_mask, name)) not in allowed:
                raise ValueError(f"objectives.joint_mask.{name}={mask}: allowed are {', '.join(allowed)}")
        for name in ("joint_share", "joint_share_alone"):
            if not 0 < (share := getattr(self, name)) <= 1:
                raise ValueError(f"objectives.{name}={share}: allowed is above 0 and at most 1")
        if not 0 <= self.final_whole <= 1:
            raise ValueError(f"objectives.final_whole={self.final_whole}: allowed is 0 to 1")
        for name in OBJECTIVES:
            if not 0 <= (weight := getattr(self, name).weight) < math.inf:
                raise ValueError(f"objectives.{name}.weight={weight}: allowed is 0 or more")
            if not 0 <= (weight := self.weight(name, 1)) < math.inf:
                raise ValueError(f"objectives.{name}.weight_end={weight}: allowed is 0 or more, or null")
        if not self.used:
            raise ValueError("every objective has weight 0: there is nothing to learn")

    @property
    def used(self) -> list[str]:
        """Names of the objectives whose weight is above 0 at some time."""
        return [name for name in OBJECTIVES if max(self.weight(name, progress) for progress in (0, 1)) > 0]

    def weight(self, objective: str, progress: float) -> float:
        """An objective's weight when ``progress`` of the steps, 0 .. 1, are done."""
        part = getattr(self, objective)
        weight: float = part.weight
        end = getattr(part, "weight_end", None)  # an objective need not have one
        return weight if end is None else weight + progress * (end - weight)


class Loss(NamedTuple):
    """Outcome of a step.

    Attributes:
        total: scalar, the weighted sum of the terms.
        terms: name -> scalar, unweighted.
        weights: name -> the term's weight.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: Mapping[str, float] = MappingProxyType({})


class Contrast(NamedTuple):
    """What contrasting a whole batch means for one of its micro-batches (GradCache, Gao et al. 2021).

    Attributes:
        terms: name -> scalar, the losses of the whole batch; without a graph.
        embeddings: modality -> (n, E), the gradient of the sum of the terms, times the number of micro-batches; in at
            least float32, whatever the embeddings are in.
        parameters: name -> gradient, likewise; with one micro-batch only.
    """

    terms: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    parameters: dict[str, Tensor]

    def pull(self, embeddings: Mapping[str, Field], parameters: Mapping[str, Tensor]) -> Tensor:
        """A zero with these gradients."""
        inputs = {name: field.x for name, field in embeddings.items()}
        inputs |= {name: parameters[name] for name in self.parameters}
        zero = next(iter(parameters.values())).new_zeros(())
        return with_gradients(zero, {**self.embeddings, **self.parameters}, inputs)


class Together(NamedTuple):
    """What a micro-batch must know of the others of its step.

    Attributes:
        joint: what its joint passes are going to see, drawn already to be counted.
        counts: as in ``Passes``.
        contrast: its part of what they have in common; None: it is contrasted alone.
    """

    joint: list[JointInput]
    counts: dict[str, Tensor]
    contrast: Contrast | None


class Pretraining(nn.Module):
    """Encoder and objectives. One ``forward``, so that a wrapper for data parallelism sees one call."""

    def __init__(self, encoder: Encoder, config: ObjectivesConfig, continues: Tensor | None = None) -> None:
        """Random weights of the objectives from torch's global generator.

        Args:
            encoder: trained in place.
            config: the objectives and their weights; those that cannot learn from the encoder's modalities are left
                out.
            continues: (V,) bool, ids that go on with a word (``data.text.continues_word``); for ``whole_words``.
        """
        super().__init__()
        self.encoder = encoder
        self.config = config
        used = [name for name in config.used if OBJECTIVES[name].learns_from(encoder.views.used)]
        self.objectives = nn.ModuleDict({name: OBJECTIVES[name](getattr(config, name), encoder) for name in used})
        ordinary = torch.ones(encoder.vocabulary.size, dtype=torch.bool)
        ordinary[list(encoder.vocabulary.special_ids)] = False
        self.ordinary = nn.Buffer(ordinary, persistent=False)
        if config.masked_language.whole_words and continues is None:
            raise ValueError("objectives.masked_language.whole_words=true: needs to know which ids continue a word")
        self._idle: dict[tuple[Any, ...], list[str]] = {}
        self.continues: Tensor | None
        self.register_buffer("continues", continues if config.masked_language.whole_words else None, persistent=False)

    def forward(
        self, batch: Batch, seed: int, whole: bool = False, progress: float = 0.0, together: Together | None = None
    ) -> Loss:
        """The losses of a batch as ``OnDevice`` gives it.

        With several ranks all call it at the same time. The mean of their losses, and of the gradients of these, is
        that of all their batches as one.

        Args:
            batch: any subset of the modalities per row.
            seed: of the step, the same on all ranks: with the rows' own seeds it fixes what is hidden.
            whole: the unimodal pass sees whole inputs.
            progress: share of the run's steps that are done, 0 .. 1; weights may depend on it.
            together: of a micro-batch, what `together` made of all; the mean is then over micro-batches, too.
        """
        active = self.active(progress)
        joint = self.joint_inputs(batch, seed, active) if together is None else together.joint
        counts = self._counts([joint], active) if together is None else together.counts
        passes = self.passes(batch, seed, whole, active, joint)._replace(counts=counts)

        total = torch.zeros((), device=self.ordinary.device)
        terms: dict[str, Tensor] = {}
        term_weights: dict[str, float] = {}
        for name, weight in active.items():
            if name == "contrastive" and together is not None and (contrast := together.contrast) is not None:
                found = contrast.pull(passes.embeddings, dict(self.objectives[name].named_parameters()))
                total = total + weight * (found + sum(contrast.terms.values()))
                terms |= contrast.terms
                term_weights |= dict.fromkeys(contrast.terms, weight)
                continue
            for term, value in self.objectives[name](passes).items():
                terms[term], term_weights[term] = value, weight
                total = total + weight * value
        if torch.is_grad_enabled():
            # Which parameters a step reaches depends on what there is, not on numbers: it is found out once per case.
            seen = tuple(tuple(each.inputs) for each in joint)
            pulled = together and together.contrast and tuple(together.contrast.parameters)
            # Of the embeddings, not of the batch: a modality that no pair of this rank has makes none, though another
            # rank's pairs give it a term here, too.
            case = (tuple(passes.embeddings), whole, tuple(terms), seen, pulled)
            if case not in self._idle:
                reached = reached_from(total)
                learned = ((name, each) for name, each in self.named_parameters() if each.requires_grad)
                self._idle[case] = [name for name, each in learned if id(each) not in reached]
            if idle := [self.get_parameter(name) for name in self._idle[case]]:
                total = _Reaches.apply(total, *idle)  # type: ignore[no-untyped-call]
        return Loss(total, terms, term_weights)

    @property
    def names(self) -> list[str]:
        """All terms that a step may have."""
        return [name for objective in self.objectives.values() for name in cast(Any, objective).names]

    def active(self, progress: float) -> dict[str, float]:
        """The weights above 0 of the objectives, by name."""
        weights = {name: self.config.weight(name, progress) for name in self.objectives}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def together(
        self, batches: Sequence[Batch], seed: int, whole: bool = False, progress: float = 0.0
    ) -> list[Together]:
        """Look at the micro-batches of a step, of all ranks, before each goes forward; arguments as for ``forward``.

        Returns:
            for each of them what ``forward`` takes. The mean of their losses has the gradients of the whole.
        """
        active = self.active(progress)
        joints = [self.joint_inputs(batch, seed, active) for batch in batches]
        counts = self._counts(joints, active)
        contrasts: Sequence[Contrast | None] = [None] * len(batches)
        if "contrastive" in active and self.config.contrastive.cached:
            contrasts = self._contrast(batches, seed, whole, active)
        return [Together(joint, counts, contrast) for joint, contrast in zip(joints, contrasts, strict=True)]

    def _contrast(
        self, batches: Sequence[Batch], seed: int, whole: bool, objectives: Collection[str]
    ) -> list[Contrast]:
        objective = self.objectives["contrastive"]
        if not isinstance(objective, Contrastive):
            raise TypeError(f"contrastive is a {type(objective).__name__}")
        # The rows that `forward` embeds: all of them where another objective reads more than pairs.
        reading = [name for name in objectives if OBJECTIVES[name].reads != "joint"]
        with torch.no_grad():
            embeddings = [self.passes(batch, seed, whole, reading).embeddings for batch in batches]
        groups = [batch.groups for batch in batches if batch.groups is not None]
        found = embedding_gradients(objective, embeddings, [batch.size for batch in batches], groups or None)
        parts = len(batches)
        # Scales and biases are learned once, with the last micro-batch.
        parameters: list[dict[str, Tensor]] = [{} for _ in batches[1:]] + [found.parameters]
        return [
            Contrast(found.terms, *({name: parts * each for name, each in pulls.items()} for pulls in pair))
            for pair in zip(found.embeddings, parameters, strict=True)
        ]

    def _counts(self, parts: Sequence[Sequence[JointInput]], objectives: Collection[str]) -> dict[str, Tensor]:
        """``Passes.counts`` from the joint inputs of each micro-batch of this rank; all ranks call it."""
        counts: dict[str, Tensor] = {}
        for name in objectives:
            if hasattr(OBJECTIVES[name], "counts"):
                objective: Any = self.objectives[name]
                for term in objective.names:
                    counts[term] = self.ordinary.new_zeros((), dtype=torch.float64)
                for part in parts:
                    for term, number in objective.counts(part).items():
                        counts[term] += number
        if not counts:
            return {}
        together = torch.stack(list(counts.values()))
        if (ranks := world_size()) > 1:
            dist.all_reduce(together)
        # Nothing counted is a sum of 0 to be divided by something.
        together = together.clamp(min=1) / (ranks * len(parts))
        return dict(zip(counts, together.unbind(), strict=True))

    def joint_inputs(self, batch: Batch, seed: int, objectives: Collection[str]) -> list[JointInput]:
        """What the joint passes are going to see; samples from which none of the ``objectives`` learns take none."""
        readers = [OBJECTIVES[name] for name in objectives if OBJECTIVES[name].reads == "joint"]
        if not readers:
            return []
        alone = ~paired(batch)
        rows, rows_alone = (
            joint_rows(batch.first, batch.size, share, seed)
            for share in (self.config.joint_share, self.config.joint_share_alone)
        )
        rows = torch.cat([rows[~alone[rows]], rows_alone[alone[rows_alone]]]).sort().values
        seeds = self._row_seeds(batch, seed)
        hide_text = "masked_language" in objectives
        groups = group_by_presence(batch, rows)
        read = [group for group in groups if any(reader.learns_from(group) for reader in readers)]
        return [self._hide(group, seeds, hide_text) for group in read]

    def passes(
        self,
        batch: Batch,
        seed: int,
        whole: bool,
        objectives: Collection[str],
        joint: Sequence[JointInput] | None = None,
    ) -> Passes:
        """The passes that the ``objectives`` of these names read, without counts; for the rest see ``forward``.

        Args:
            joint: what `joint_inputs` has made already.
        """
        embeddings: dict[str, Field] = {}
        read = {OBJECTIVES[name].reads for name in objectives}
        if read & {"embeddings", "pairs"}:
            fields = batch.fields
            if "embeddings" not in read and not (both := paired(batch)).all():
                chosen = {name: inputs.select(both[inputs.rows].nonzero()[:, 0]) for name, inputs in fields.items()}
                fields = {name: inputs for name, inputs in chosen.items() if len(inputs.rows)}
            embeddings = self._unimodal(fields, self._row_seeds(batch, seed), whole)
        joint = self.joint_inputs(batch, seed, objectives) if joint is None else joint
        return Passes(self.encoder, embeddings, [self._joint(each) for each in joint], batch.groups)

    def _row_seeds(self, batch: Batch, seed: int) -> Tensor:
        """(size,) int64: a row's masks depend on its own seed, or its number, wherever it is computed."""
        rows = batch.seeds
        if rows is None:
            rows = torch.arange(batch.first, batch.first + batch.size, device=self.ordinary.device)
        return fork(rows, f"step {seed}")

    def after_step(self, progress: float) -> None:
        """To be called by all ranks together when the optimiser has made its step: teachers follow what they teach.

        Args:
            progress: share of the run's steps that are done, 0 .. 1.
        """
        for objective in self.objectives.values():
            after_step: Any = getattr(objective, "after_step", None)
            if after_step is not None:
                after_step(self.encoder, progress)

    def _unimodal(self, fields: Mapping[str, Field], seeds: Tensor, whole: bool) -> dict[str, Field]:
        embeddings = {}
        for name, inputs in fields.items():
            keep = None if whole else self._kept(name, inputs, fork(_of(inputs, seeds), f"keep {name}"))
            features = self.encoder.features(name, inputs, keep)
            embeddings[name] = Field(self.encoder.project(name, features), inputs.rows)
        return embeddings

    def _kept(self, name: str, inputs: Field, seeds: Tensor) -> Tensor | None:
        """(n, K) int64, what the unimodal pass sees of a modality; None: all of it."""
        tokenizer, share = self.encoder.tokenizers[name], getattr(self.config.keep, name)
        if isinstance(tokenizer, PatchTokenizer):
            return split_patches(seeds, tokenizer.grid, share).visible
        most = max(1, round(share * tokenizer.max_tokens))
        if most >= inputs.x.shape[1]:
            return None
        valid = torch.ones_like(inputs.x, dtype=torch.bool) if inputs.valid is None else inputs.valid
        return keep_tokens(seeds, valid, most)

    def _hide(self, inputs: dict[str, Field], seeds: Tensor, hide_text: bool) -> JointInput:
        splits = {}
        ids = chosen = None
        for name, field_ in inputs.items():
            tokenizer, own = self.encoder.tokenizers[name], fork(_of(field_, seeds), f"hide {name}")
            if isinstance(tokenizer, PatchTokenizer):
                share, kind = getattr(self.config.joint_keep, name), getattr(self.config.joint_mask, name)
                splits[name] = split_patches(own, tokenizer.grid, share, kind)
            elif hide_text:
                language, mask_id = self.config.masked_language, self.encoder.vocabulary.mask_id
                rate = language.rate if len(inputs) == 1 else language.rate_paired
                ids, chosen = mask_tokens(field_.x, own, self.ordinary, mask_id, rate, self.continues)
            else:
                ids = field_.x
        return JointInput(inputs, splits, ids, chosen)

    def _joint(self, hidden: JointInput) -> JointPass:
        streams: dict[str, Tokens] = {}
        for name, field_ in hidden.inputs.items():
            if name in hidden.splits:
                streams[name] = self.encoder.tokens(name, field_, hidden.splits[name].visible)
            elif hidden.ids is not None:
                streams[name] = self.encoder.tokens(name, field_._replace(x=hidden.ids))
        return JointPass(hidden.inputs, self.encoder.trunk(streams), hidden.splits, hidden.chosen)


def reached_from(value: Tensor) -> set[int]:
    """The ids of the parameters that get a gradient when ``value`` goes backward."""
    nodes, seen, reached = [value.grad_fn], set[Any](), set[int]()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        nodes.extend(following for following, _ in node.next_functions)
    return reached


class _Reaches(torch.autograd.Function):
    """Gives parameters a gradient of zeros: those on which the batch has nothing to work.

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


def trunk_gradients(loss: Loss, trunk: Iterable[nn.Parameter]) -> dict[str, float]:
    """How much each term pulls at the trunk, and how far they agree. Call it before the backward pass.

    Args:
        loss: of a step. Only what this rank's samples contribute to its gradients is seen.
        trunk: the parameters to look at, such as ``encoder.blocks.parameters()``.

    Returns:
        ``trunk_norm/<term>``: norm of the gradient of the weighted term. ``trunk_cosine/<term>/<other>``: the cosine
        of two of them; below 0 they hinder each other, and it is 0 where one has no gradient.
    """
    parameters = list(trunk)
    pulls = {}
    for name, term in loss.terms.items():
        parts = torch.autograd.grad(
            loss.weights[name] * term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        pulls[name] = torch.cat([part.flatten().float() for part in parts])
    found = {f"trunk_norm/{name}": pull.norm().item() for name, pull in pulls.items()}
    for (one, pull), (other, pull_of_other) in combinations(pulls.items(), 2):
        cosine = F.cosine_similarity(pull, pull_of_other, dim=0)
        found[f"trunk_cosine/{one}/{other}"] = cosine.item()
    return found


def joint_rows(first: int, size: int, share: float, seed: int) -> Tensor:
    """Which of ``size`` rows take the joint pass: one of every 1 / share, drawn from these.

    Args:
        first: number of the first row within the step; what comes out for a row depends on its number in the step
            alone, not on the rank or micro-batch that has it.
        size: number of rows.
        share: above 0 and at most 1.
        seed: of the step.

    Returns:
        (k,) int64 on the CPU, ascending.
    """
    stretches = torch.arange(int(first * share) - 1, int((first + size) * share) + 3)
    # Stretches of unequal length lie elsewhere in each step, so that every row has the same chance.
    phase = 0.0 if (1 / share).is_integer() else uniform(seed, 1)
    begin, end = (((stretches + more).double() - phase).div(share).ceil() for more in (0, 1))
    draws = uniforms(fork(stretches, f"joint rows {seed}"), 0, 1)[:, 0]
    rows = (begin + draws * (end - begin)).floor().long() - first
    return rows[(rows >= 0) & (rows < size)]


def paired(batch: Batch) -> Tensor:
    """(size,) bool on the CPU: which rows have several modalities."""
    modalities = torch.zeros(batch.size, dtype=torch.int64)
    for inputs in batch.fields.values():
        modalities[inputs.rows.cpu()] += 1
    return modalities > 1


def group_by_presence(batch: Batch, rows: Tensor) -> list[dict[str, Field]]:
    """The rows (k,) on the CPU, grouped by which modalities they have, so that what is absent costs nothing.

    Returns:
        for each set of modalities that occurs: modality -> Field of the group's samples, in row order.
    """
    if not batch.fields:
        return []
    present = torch.stack([torch.isin(rows, f.rows) for f in batch.fields.values()], dim=1)  # (k, M)
    groups = []
    for pattern in torch.unique(present, dim=0):
        wanted = rows[(present == pattern).all(dim=1)]
        names = [name for name, has in zip(batch.fields, pattern.tolist(), strict=True) if has]
        groups.append({name: _rows(batch.fields[name], wanted) for name in names})
    return [group for group in groups if group]


def _rows(field_: Field, rows: Tensor) -> Field:
    return field_.select(torch.isin(field_.rows, rows).nonzero()[:, 0])


def _of(field_: Field, seeds: Tensor) -> Tensor:
    """The seeds (n,) of those rows of the batch that a field has."""
    return seeds if len(field_.rows) == len(seeds) else seeds[field_.rows.to(seeds.device, non_blocking=True)]
