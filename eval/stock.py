"""Stock models of `transformers` to be scored: one, two in a space that they share, or an export's one per modality."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    ASTFeatureExtractor,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from data.batch import Field
from data.manifest import check_folder
from data.transforms import FRAME, HOP, SAMPLE_RATE, AudioView, ImageView, TextView, Views
from eval.scored import LAST, Encoded, EncoderError, Scored, always_the_same, read_config, tensors_digest

MAX_TOKENS = 512  # captions are cut there, whatever the model could read
MAX_SECONDS = 30  # and sounds for models that have no longest one
FEWEST_WORDS = 10  # of a tokenizer: where its files are missing, `transformers` makes one of special tokens alone

# What loading raises where a file is missing, damaged, or asks for what can't be.
_UNLOADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)


class Reader(Protocol):
    """How a stock model reads a modality.

    Attributes:
        view: what the loader makes of a member.
        settings: what else decides on the inputs, for JSON.
        singly: whether inputs go in one by one, since padding would change the result.
        listens: whether ``inputs`` takes what the loader's worker ships.
    """

    view: Any
    settings: Any
    singly: bool
    listens: bool

    def inputs(self, field: Field) -> dict[str, Tensor]:
        """Keyword arguments of the model, on the field's device."""

    def prefix(self, tokens: int, config: Any) -> int:
        """How many first ones of so many tokens are no patches."""

    def valid(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """(n, N) bool, which tokens are no padding; None where that is no matter of tokens."""


class Pixels:
    """Images with the mean and the standard deviation of the model's image processor.

    They are resized without regard to their aspect ratio to what the processor resizes or crops to.
    """

    singly = listens = False

    def __init__(self, name: str) -> None:
        processor: Any = _stock(AutoImageProcessor.from_pretrained, name, "an image processor")
        crops = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
        size = dict((crops or processor.size) if getattr(processor, "size", None) else {})
        sides = {size[key] for key in ("height", "width", "shortest_edge") if size.get(key)}
        if len(sides) != 1:
            raise EncoderError(f"{name}: its image processor's size is {size}; one square size is needed")
        self.view = ImageView(size=int(sides.pop()))
        # Ours are -1 .. 1, 127.5 to a unit.
        span = 127.5 * (processor.rescale_factor if processor.do_rescale else 1.0)
        mean, std = [0.0] * 3, [1.0] * 3
        if processor.do_normalize:
            try:
                mean, std = ([float(x) for x in _three(given)] for given in (processor.image_mean, processor.image_std))
            except (TypeError, ValueError) as error:
                raise EncoderError(f"{name}: its image processor's mean or standard deviation: {error}") from error
        self.settings = {"span": span, "mean": mean, "std": std}
        self.scale = torch.tensor([span / s for s in std])[:, None, None]
        self.shift = torch.tensor([(span - m) / s for m, s in zip(mean, std, strict=True)])[:, None, None]

    def inputs(self, field: Field) -> dict[str, Tensor]:
        """(n, 3, size, size)."""
        return {"pixel_values": field.x * self.scale.to(field.x.device) + self.shift.to(field.x.device)}

    def prefix(self, tokens: int, config: Any) -> int:
        """What is left of the tokens by a grid of patches."""
        patch = getattr(config, "patch_size", None)
        patches = (self.view.size // patch) ** 2 if isinstance(patch, int) else tokens
        return max(0, tokens - patches)

    def valid(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """All are."""
        return None


class Words:
    """Captions by the model's own tokenizer."""

    singly = listens = False

    def __init__(self, name: str, model: Any, config: Any) -> None:
        tokenizer: Any = _stock(AutoTokenizer.from_pretrained, name, "a tokenizer")
        if not tokenizer.is_fast:
            raise EncoderError(f"{name}: its tokenizer is a slow one; only fast ones (tokenizer.json) are supported")
        if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) < FEWEST_WORDS:
            raise EncoderError(f"{name}: its tokenizer has no words: tokenizer.json, or what it is made of, is missing")
        tokenizer.padding_side = "right"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise EncoderError(f"{name}: its tokenizer has neither a padding nor an end token; one is needed")
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        longest = [MAX_TOKENS, tokenizer.model_max_length]
        if (positions := getattr(config, "max_position_embeddings", None)) is not None:
            # RoBERTa's begin behind the padding's.
            tables = (m for key, m in model.named_modules() if key.endswith("position_embeddings"))
            paddings = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
            longest.append(positions - (paddings[0] + 1 if paddings else 0))
        self.view = TextView(max_tokens=int(min(longest)))
        # SigLIP reads its embedding at the last place, padding or not, and was trained with a fixed length, unmasked.
        self.fixed = str(config.model_type) in ("siglip_text_model", "siglip2_text_model")
        self.settings = {"fixed": self.fixed}

    def inputs(self, field: Field) -> dict[str, Tensor]:
        """(n, L) ids, and which are no padding."""
        if self.fixed:
            missing = self.view.max_tokens - field.x.shape[1]
            return {"input_ids": F.pad(field.x, (0, missing), value=int(self.tokenizer.pad_token_id))}
        valid = torch.ones_like(field.x) if field.valid is None else field.valid.long()
        return {"input_ids": field.x, "attention_mask": valid}

    def prefix(self, tokens: int, config: Any) -> int:
        """The first token of a text is one of it."""
        return 0

    def valid(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """All that are no padding."""
        if self.fixed:
            return inputs["input_ids"].ne(int(self.tokenizer.pad_token_id))
        return inputs["attention_mask"].bool()


class Spectrogram:
    """The log-mel spectrogram of ASTFeatureExtractor, which is ours."""

    singly = listens = False
    settings: Any = None

    def __init__(self, extractor: ASTFeatureExtractor) -> None:
        mean, std = (extractor.mean, extractor.std) if extractor.do_normalize else (0.0, 0.5)
        self.view = AudioView(frames=extractor.max_length, mels=extractor.num_mel_bins, mean=mean, std=std)

    def inputs(self, field: Field) -> dict[str, Tensor]:
        """(n, frames, mels)."""
        return {"input_values": field.x}

    def prefix(self, tokens: int, config: Any) -> int:
        """What is left of the tokens by the patches, which overlap."""
        patch, steps = config.patch_size, (config.frequency_stride, config.time_stride)
        sides = zip((self.view.mels, self.view.frames), steps, strict=True)
        high, wide = (int((side - patch) // step + 1) for side, step in sides)
        return max(0, tokens - high * wide)

    def valid(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """All are."""
        return None


class Sound:
    """Waveforms through the model's own feature extractor, on the CPU; what lies above 8 kHz is not there."""

    listens = True

    def __init__(self, extractor: Any) -> None:
        self.extractor, self.rate = extractor, int(extractor.sampling_rate)
        seconds = getattr(extractor, "chunk_length", None) or getattr(extractor, "max_length_s", None)
        self.singly = seconds is None  # it has no length of its own to pad to
        # No longer than it reads: of more, some take a random part.
        self.view = AudioView(frames=((seconds or MAX_SECONDS) * SAMPLE_RATE - FRAME) // HOP + 1)
        self.settings = json.loads(extractor.to_json_string())

    def inputs(self, field: Field) -> dict[str, Tensor]:
        """(n, T) int16 at 16 kHz -> what the extractor makes of it."""
        lengths = [field.x.shape[1]] * len(field.x) if field.valid is None else field.valid.sum(1).tolist()
        sounds = []
        for sound, length in zip(field.x.cpu().numpy(), lengths, strict=True):
            floats = sound[: int(length)].astype(np.float32) / 32768
            if self.rate != SAMPLE_RATE:
                floats = soxr.resample(floats, SAMPLE_RATE, self.rate)
            sounds.append(np.pad(floats, (0, max(0, FRAME - len(floats)))))  # models need a frame at least
        made = dict(self.extractor(sounds, sampling_rate=self.rate, return_tensors="pt"))
        if "is_longer" in made:  # CLAP's extractor draws one at random where none is
            made["is_longer"] = torch.zeros(len(sounds), 1, dtype=torch.bool)
        return {key: value.to(field.x.device) for key, value in made.items()}

    def prefix(self, tokens: int, config: Any) -> int:
        """No class token."""
        return 0

    def valid(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """All are: the length is fixed, or sounds come one by one."""
        return None


def _audio(name: str) -> Spectrogram | Sound:
    extractor: Any = _stock(AutoFeatureExtractor.from_pretrained, name, "a feature extractor")
    if isinstance(extractor, ASTFeatureExtractor) and extractor.sampling_rate == SAMPLE_RATE:
        return Spectrogram(extractor)
    return Sound(extractor)


# Modality -> how a stock model (name, model or its part, config of that) reads it.
READERS: dict[str, Callable[[str, Any, Any], Reader]] = {
    "image": lambda name, _, __: Pixels(name),
    "text": Words,
    "audio": lambda name, _, __: _audio(name),
}
# What a model of a single modality names its input.
INPUTS = {"pixel_values": "image", "input_ids": "text", "input_values": "audio", "input_features": "audio"}
# Modality -> part of a model of several, in the releases of `transformers`.
PARTS = {"image": "vision_model", "text": "text_model", "audio": "audio_model"}
# Modality -> class of the models in ``embed_image/`` and so on of an export, whose logits are the embedding.
EMBEDDERS = {
    "image": AutoModelForImageClassification,
    "text": AutoModelForSequenceClassification,
    "audio": AutoModelForAudioClassification,
}


class Stream(NamedTuple):
    """One modality of a stock model.

    Attributes:
        model: the whole of it.
        reader: of its inputs.
        shared: whether it is one of several modalities of the model, with embeddings.
        embedder: another model of the same inputs, whose logits are the embedding; None without.
    """

    model: Any
    reader: Reader
    shared: bool
    embedder: Any = None


class Stock(Scored):
    """Models of `transformers`: one, or one per modality."""

    def __init__(self, name: str, streams: dict[str, Stream]) -> None:
        self.name, self.streams = name, streams
        self.views = Views(**{key: streams[key].reader.view if key in streams else None for key in PARTS})
        words = streams["text"].reader if "text" in streams else None
        self.tokenizer = words.tokenizer if isinstance(words, Words) else None
        self.listens = frozenset(key for key, stream in streams.items() if stream.reader.listens)

    @classmethod
    def find(cls, name: str) -> "Stock | None":
        """From a folder or a hub id of `transformers`; None if ``name`` is neither."""
        path = Path(name)
        is_id = not path.exists() and not path.is_absolute() and len(path.parts) in (1, 2) and path.parts[0] != ".."
        if not is_id and "model_type" not in read_config(path):
            return None
        return cls(name, _streams(name))

    def random(self) -> "Stock":
        """The same architectures."""
        models = {}
        with always_the_same():
            for model in self._modules():
                fresh = type(model)(copy.deepcopy(model.config))
                if getattr(model, "pooler", fresh) is None:
                    fresh.pooler = None
                models[id(model)] = fresh
        streams = {
            key: stream._replace(model=models[id(stream.model)], embedder=models.get(id(stream.embedder)))
            for key, stream in self.streams.items()
        }
        return Stock(f"random:{self.name}", streams)

    def _identity(self) -> Any:
        return {
            key: [
                type(stream.model).__name__,
                {k: v for k, v in stream.model.config.to_dict().items() if k not in ("_name_or_path", "dtype")},
                tensors_digest(stream.model.state_dict()),
                None if stream.embedder is None else tensors_digest(stream.embedder.state_dict()),
                stream.reader.settings,
            ]
            for key, stream in self.streams.items()
        }

    def _modules(self) -> Sequence[Any]:
        models = [model for stream in self.streams.values() for model in (stream.model, stream.embedder)]
        return list({id(model): model for model in models if model is not None}.values())

    def _encode(self, modality: str, field: Field, layers: Sequence[int], poolings: Sequence[str]) -> Encoded:
        reader = self.streams[modality].reader
        if not reader.singly:
            return self._run(modality, field, layers, poolings)
        one_by_one = [
            self._run(modality, field.select(torch.tensor([i])), layers, poolings) for i in range(len(field.rows))
        ]
        keys = one_by_one[0].features
        embeddings = [each.embeddings for each in one_by_one if each.embeddings is not None]
        return Encoded(
            {key: torch.cat([each.features[key] for each in one_by_one]) for key in keys},
            torch.cat(embeddings) if embeddings else None,
        )

    def _run(self, modality: str, field: Field, layers: Sequence[int], poolings: Sequence[str]) -> Encoded:
        model, reader, shared, embedder = self.streams[modality]
        inputs = reader.inputs(field)
        many = bool(set(layers) - {LAST})
        pooled: Tensor | None
        if shared:
            part, before = getattr(model, PARTS[modality]), list[Any]()
            hook = part.register_forward_hook(lambda _, __, made: before.append(made["pooler_output"]))
            try:
                outputs = getattr(model, f"get_{modality}_features")(
                    **inputs, output_hidden_states=many, return_dict=True
                )
            finally:
                hook.remove()
            config, pooled, embeddings = part.config, before[0], outputs.pooler_output
        else:
            model = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
            outputs = model(**inputs, output_hidden_states=many, return_dict=True)
            config, pooled = model.config, outputs.get("pooler_output")
            embeddings = None if embedder is None else embedder(**inputs).logits
        states = [tokens(x) for x in (*(outputs.hidden_states if many else ())[:-1], outputs.last_hidden_state)]
        prefix, valid = reader.prefix(states[-1].shape[1], config), reader.valid(inputs)
        if pooled is None:
            own = "cls" if prefix else "mean"
            pooled = self._pool(states[-1:], None, (LAST,), (own,), prefix, valid)[LAST, own]
        return Encoded(self._pool(states, pooled.flatten(1), layers, poolings, prefix, valid), embeddings)


class Exported(Stock):
    """The folders ``image/``, ``text/`` and ``audio/`` of an export, and ``embed_image/`` and so on for embeddings, as
    far as they are there.
    """

    @classmethod
    def find(cls, name: str) -> "Exported | None":
        """From the folder that holds them; None if ``name`` holds none of them."""
        folders = {key: Path(name) / key for key in PARTS if "model_type" in read_config(Path(name) / key)}
        streams: dict[str, Stream] = {}
        for modality, folder in folders.items():
            found = _streams(str(folder))
            if list(found) != [modality]:
                raise EncoderError(f"{folder}: a model that reads {', '.join(found)}; one of {modality} is needed")
            embedder = Path(name) / f"embed_{modality}"
            if "model_type" in read_config(embedder):
                found[modality] = found[modality]._replace(embedder=_load(str(embedder), EMBEDDERS[modality]))
            streams |= found
        return cls(name, streams) if streams else None


def _streams(name: str) -> dict[str, Stream]:
    """The modalities of a model of `transformers`.

    Raises:
        EncoderError: no such model, not all of its tensors, or none that reads images, text or audio.
    """
    model = _load(name)
    # A model that generates text from images has the one without the other.
    shared = [key for key in PARTS if hasattr(model, f"get_{key}_features") and hasattr(model, PARTS[key])]
    if len(shared) > 1:
        parts = {key: getattr(model, PARTS[key]) for key in shared}
        return {key: Stream(model, READERS[key](name, part, part.config), True) for key, part in parts.items()}
    modality = INPUTS.get(model.main_input_name)
    if modality is None or len(shared) == 1:
        raise EncoderError(
            f"{name}: {type(model).__name__} reads {model.main_input_name}; models of {', '.join(INPUTS)} can be "
            "scored, and those of two modalities with embeddings for both"
        )
    return {modality: Stream(model, READERS[modality](name, model, model.config), False)}


def _load(name: str, kind: Any = AutoModel) -> Any:
    """A whole model in float32, from safetensors alone; says how many tensors it has."""
    check_folder(Path(name))  # weights with a flipped bit would load without a word
    model, info = _stock(
        kind.from_pretrained,
        name,
        "a model in safetensors",
        output_loading_info=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # named below, with what is missing
        dtype=torch.float32,
    )
    bad = dict.fromkeys(info["missing_keys"], "missing")
    bad |= {key: f"{tuple(there)} there, {tuple(here)} needed" for key, there, here in info["mismatched_keys"]}
    if bad and all(key.startswith("pooler.") for key in bad):
        print(f"{name}: the file has no pooler: features are those of its class token, or the mean", flush=True)
        model.pooler, bad = None, {}
    total = len(model.state_dict())
    if bad:
        listed = [f"{key}: {why}" for key, why in sorted(bad.items())]
        listed = [*listed[:10], *([f"... and {len(listed) - 10} more"] if len(listed) > 10 else [])]
        raise EncoderError(f"{name}: loaded {total - len(bad)}/{total} tensors:\n  " + "\n  ".join(listed))
    print(f"{name}: loaded {total}/{total} tensors", flush=True)
    if getattr(model.config, "mask_ratio", None):
        model.config.mask_ratio = 0.0  # masked autoencoders hide patches in evaluation, too
    return model


def _stock(load: Callable[..., Any], name: str, what: str, **settings: Any) -> Any:
    """What `transformers` loads; no code but its own is run."""
    try:
        return load(name, trust_remote_code=False, **settings)
    except _UNLOADABLE as error:
        raise EncoderError(f"{name}: {what} can't be loaded: {type(error).__name__}: {str(error).strip()}") from error


def tokens(states: Tensor) -> Tensor:
    """Feature maps (n, D, ...) of convolutions as tokens (n, N, D); tokens stay."""
    return states if states.dim() == 3 else states.flatten(2).transpose(1, 2)


def _three(given: Any) -> Sequence[float]:
    """One number per colour."""
    return [given] * 3 if isinstance(given, int | float) else list(given)
