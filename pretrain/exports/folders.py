"""The folders of an export: what writes each, what loads it, what it must give, and when there is none.

A new one is a line in ``FOLDERS``.
"""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Field
from pretrain.exports import streams
from pretrain.exports.image_text import image_text_model
from pretrain.exports.joint import joint_model, save_code
from pretrain.exports.sentences import save_sentence_layout
from pretrain.exports.subject import ExportError, Subject
from pretrain.model.layers import LAYER_NORM_EPS

# Modality -> the names under which stock models take its input.
INPUTS = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask"), "audio": ("input_values",)}
# Modality -> what writes the processor that makes them.
PROCESSORS = {
    "image": streams.save_image_processor,
    "text": streams.save_tokenizer,
    "audio": streams.save_feature_extractor,
}


class Call(NamedTuple):
    """What a loaded model is to do.

    Attributes:
        method: its name; empty for the model itself.
        modalities: that it is given.
        outputs: name -> what must come out; under the method's own name where that gives a tensor.
    """

    method: str
    modalities: tuple[str, ...]
    outputs: dict[str, Tensor]


class Seen(NamedTuple):
    """What a subject in float64 makes of a few samples.

    Attributes:
        subject: the encoder and what the objectives learned.
        fields: modality -> what the encoder reads.
        states: modality -> (n, N, D), each alone.
    """

    subject: Subject
    fields: Mapping[str, Field]
    states: Mapping[str, Tensor]

    def features(self, modality: str) -> Tensor:
        """(n, D)."""
        return self.subject.encoder.pool(modality, self.states[modality])

    def embeddings(self, modality: str) -> Tensor:
        """(n, E), not normalised."""
        return self.subject.encoder.project(modality, self.features(modality))


class Folder(NamedTuple):
    """A folder of an export.

    Attributes:
        build: the filled model, in float32.
        processors: each writes into the folder what goes with the model.
        loads: the class of `transformers` that loads it.
        expected: what the loaded model must give, in float64.
        absent: why this subject has no such folder; None where it has.
        about: what it is, for its card.
        reads_beside: whether its inputs are made by the processors in the folders of the streams.
    """

    build: Callable[[Subject], Any]
    processors: tuple[Callable[[Subject, Path], None], ...]
    loads: str
    expected: Callable[[Seen], list[Call]]
    absent: Callable[[Subject], str | None]
    about: str
    reads_beside: bool = False

    def write(self, subject: Subject, folder: Path) -> None:
        """Weights in safetensors, config and processors, into an existing folder."""
        self.build(subject).to(subject.dtype).save_pretrained(folder)
        for processor in self.processors:
            processor(subject, folder)
        mode = (folder / "config.json").stat().st_mode
        for path in folder.rglob("*.safetensors"):  # safetensors gives them to the owner alone
            path.chmod(mode)


def see(subject: Subject, fields: Mapping[str, Field]) -> Seen:
    """A subject's states of what the encoder reads, all in float64."""
    double = {name: _double(value) for name, value in subject.objectives.items()}
    subject = dataclasses.replace(subject, encoder=copy.deepcopy(subject.encoder).double(), objectives=double)
    fields = {name: field._replace(x=_double(field.x)) for name, field in fields.items()}
    return Seen(subject, fields, {name: subject.encoder.encode(name, field) for name, field in fields.items()})


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _stream(modality: str) -> Callable[[Seen], list[Call]]:
    def expected(seen: Seen) -> list[Call]:
        outputs = {"last_hidden_state": seen.states[modality], "pooler_output": seen.features(modality)}
        return [Call("", (modality,), outputs)]

    return expected


def _embedding(modality: str) -> Callable[[Seen], list[Call]]:
    def expected(seen: Seen) -> list[Call]:
        return [Call("", (modality,), {"logits": seen.embeddings(modality)})]

    return expected


def _masked_lm(seen: Seen) -> list[Call]:
    head = {
        name.removeprefix("masked_language."): value
        for name, value in seen.subject.objectives.items()
        if name.startswith("masked_language.")
    }
    hidden = F.gelu(F.linear(seen.states["text"], head["dense.weight"], head["dense.bias"]))
    hidden = F.layer_norm(hidden, hidden.shape[-1:], head["norm.weight"], head["norm.bias"], LAYER_NORM_EPS)
    embedding = seen.subject.encoder.get_parameter("tokenizers.text.embed.weight")
    return [Call("", ("text",), {"logits": F.linear(hidden, embedding, head["bias"])})]


def _image_text(seen: Seen) -> list[Call]:
    image, text = (F.normalize(seen.embeddings(name), dim=-1) for name in ("image", "text"))
    logits = seen.subject.log_scale("image_text").exp() * image @ text.T
    return [Call("", ("image", "text"), {"image_embeds": image, "text_embeds": text, "logits_per_image": logits})]


def _joint(seen: Seen) -> list[Call]:
    encoder, used = seen.subject.encoder, tuple(seen.subject.modalities)
    states = encoder.trunk({name: encoder.tokens(name, seen.fields[name]) for name in used})
    outputs = {f"{name}_features": encoder.pool(name, part) for name, part in states.items()}
    calls = [Call("", used, {"last_hidden_state": torch.cat(list(states.values()), dim=1), **outputs})]
    for name in used if seen.subject.contrasted else ():
        method = f"get_{name}_features"
        calls.append(Call(method, (name,), {method: seen.embeddings(name)}))
    return calls


def _without(*modalities: str) -> Callable[[Subject], str | None]:
    def absent(subject: Subject) -> str | None:
        missing = [name for name in modalities if name not in subject.modalities]
        return f"the encoder has no {missing[0]}" if missing else None

    return absent


def _uncontrasted(*modalities: str) -> Callable[[Subject], str | None]:
    def absent(subject: Subject) -> str | None:
        missing = _without(*modalities)(subject)
        return missing or (None if subject.contrasted else "the run had no contrastive loss: projections are untrained")

    return absent


def _no_head(subject: Subject) -> str | None:
    return _without("text")(subject) or (None if subject.reads_masked else "the run had no masked-language loss")


def _single(subject: Subject) -> str | None:
    return None if len(subject.modalities) > 1 else "the encoder has one modality: its own folder is all of it"


FOLDERS: dict[str, Folder] = {
    "image": Folder(
        streams.image_model,
        (streams.save_image_processor,),
        "AutoModel",
        _stream("image"),
        _without("image"),
        "The image stream as ViTModel; `pooler_output` is the class token, the feature that probes read.",
    ),
    "text": Folder(
        streams.text_model,
        (streams.save_tokenizer, save_sentence_layout),
        "AutoModel",
        _stream("text"),
        _without("text"),
        "The text stream as RobertaPreLayerNormModel; `pooler_output` is the feature that probes read. "
        "Where there is a `modules.json`, sentence-transformers reads the folder too and gives embeddings of length 1.",
    ),
    "audio": Folder(
        streams.audio_model,
        (streams.save_feature_extractor,),
        "AutoModel",
        _stream("audio"),
        _without("audio"),
        "The audio stream as ASTModel; `pooler_output`, the mean of its two prefix tokens, is the feature that probes "
        "read. It takes mono sound at 16 kHz.",
    ),
    "text/masked_lm": Folder(
        streams.masked_lm_model,
        (streams.save_tokenizer,),
        "AutoModelForMaskedLM",
        _masked_lm,
        _no_head,
        "The text stream with its language-model head as RobertaPreLayerNormForMaskedLM.",
    ),
    "embed_image": Folder(
        streams.embed_image_model,
        (streams.save_image_processor,),
        "AutoModelForImageClassification",
        _embedding("image"),
        _uncontrasted("image"),
        "ViTForImageClassification whose `logits` are the image's embedding, comparable by cosine with those of the "
        "other modalities. They are no classes.",
    ),
    "embed_text": Folder(
        streams.embed_text_model,
        (streams.save_tokenizer,),
        "AutoModelForSequenceClassification",
        _embedding("text"),
        _uncontrasted("text"),
        "RobertaPreLayerNormForSequenceClassification whose `logits` are the text's embedding, comparable by cosine "
        "with those of the other modalities. They are no classes.",
    ),
    "embed_audio": Folder(
        streams.embed_audio_model,
        (streams.save_feature_extractor,),
        "AutoModelForAudioClassification",
        _embedding("audio"),
        _uncontrasted("audio"),
        "ASTForAudioClassification whose `logits` are the sound's embedding, comparable by cosine with those of the "
        "other modalities. They are no classes.",
    ),
    "image_text": Folder(
        image_text_model,
        # VisionTextDualEncoderProcessor is made of these two.
        (streams.save_image_processor, streams.save_tokenizer),
        "AutoModel",
        _image_text,
        _uncontrasted("image", "text"),
        "Image and text as VisionTextDualEncoderModel, with the learned scale.",
    ),
    "joint": Folder(
        joint_model,
        (save_code,),
        "AutoModel",
        _joint,
        _single,
        "The whole encoder, several modalities as one sequence, for those who choose `trust_remote_code`: all its "
        "code is `modeling_triptych.py` beside its weights.",
        reads_beside=True,
    ),
}


@dataclasses.dataclass
class ExportConfig:
    """The export at a run's end."""

    folders: list[str] | None = None
    """Which folders it has, such as [image, embed_image]; each holds weights of its own. joint brings image, text and
    audio, whose processors it needs. null: all that there can be."""

    def __post_init__(self) -> None:
        check_names("export.folders", self.folders)


def check_names(setting: str, names: Sequence[str] | None) -> None:
    """Raises ExportError where ``names``, given by ``setting``, are no folders of exports."""
    if names is not None and not names:
        raise ExportError(f"{setting}: name one at least of {', '.join(FOLDERS)}")
    for name in names or ():
        if name not in FOLDERS:
            near = difflib.get_close_matches(name, FOLDERS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ExportError(f"{setting}: {name!r} is unknown; allowed are {', '.join(FOLDERS)}{hint}")


def folders_of(subject: Subject, names: Sequence[str] | None = None) -> dict[str, Folder]:
    """The folders that a subject has, or those of them that are named and what they need.

    Raises:
        ExportError: one is named that this subject has not.
    """
    found = {name: folder for name, folder in FOLDERS.items() if folder.absent(subject) is None}
    if names is None:
        return found
    for name in names:
        if name not in found:
            raise ExportError(f"folders: there can be no {name}, since {FOLDERS[name].absent(subject)}")
    beside = subject.modalities if any(found[name].reads_beside for name in names) else []
    return {name: folder for name, folder in found.items() if name in {*names, *beside}}


def absent_of(subject: Subject) -> dict[str, str]:
    """Name of each folder that a subject can't have -> why."""
    why = {name: folder.absent(subject) for name, folder in FOLDERS.items()}
    return {name: reason for name, reason in why.items() if reason is not None}
