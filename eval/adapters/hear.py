"""An encoder of sound under the HEAR 2021 API, so that HEAR's own programs score it.

    pip install --no-deps hearvalidator heareval
    pip install tensorflow-cpu click intervaltree pynvml python-slugify
    hear-validator eval.adapters.hear --model exported/audio
    python -m heareval.embeddings.runner eval.adapters.hear --model exported/audio --tasks-dir tasks

The model is a run, a checkpoint, an export, or an audio spectrogram transformer of `transformers`; ``tasks`` is what
HEAR offers for download. Both packages ask for releases of 2021, hence ``--no-deps``; these two commands take today's.
What comes after them, ``python -m heareval.predictions.runner embeddings/eval.adapters.hear/*``, reads nothing but the
files that they write, and can be run where the packages find what they ask for.

Sound that is longer than the model's spectrogram is cut into windows, each of which goes on with the patch behind the
last one of the window before, so that timestamps stay regular: for patches that don't overlap a window begins every
``frames`` frames. Patches whose centre lies behind the sound's end are not given. The scene is the mean of the windows'
pooled features, weighted by how many patches in time each of them gives.

Timestamps are a patch apart, 160 ms for patches of 16 frames; HEAR's validator warns of more than 50 ms, and its tasks
of transcription are hard at that.

Source: Turian et al. 2022, HEAR: Holistic Evaluation of Audio Representations, section 3.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batch import Field
from data.decode import Waveform
from data.transforms import FRAME, HOP, SAMPLE_RATE, AudioView
from eval.adapters.inputs import Inputs
from eval.encoders import Pretrained, load_scored
from eval.scored import LAST, EncoderError, Scored
from eval.stock import Spectrogram, Stock


class Patches(NamedTuple):
    """How patches lie on a spectrogram.

    Attributes:
        high: how many above each other.
        wide: how many beside each other.
        step: samples from the beginning of one to that of the next, in time.
        centre: samples from the beginning of the sound to the centre of the first.
    """

    high: int
    wide: int
    step: int
    centre: float


class HearModel(nn.Module):
    """What the functions below take; it has no parameters of its own, and runs where the sound is.

    Attributes:
        sample_rate: in Hz.
        scene_embedding_size: width of the pooled features.
        timestamp_embedding_size: width of the states, of which those above each other are averaged.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, scored: Scored) -> None:
        super().__init__()
        view = scored.views.audio
        if view is None:
            raise EncoderError(f"{scored.name}: reads no audio; allowed are {', '.join(scored.modalities)}")
        self.scored, self.inputs, self.window = scored, Inputs(scored), view.samples
        self.patches, self.states = _patches(scored, view)
        silence = torch.zeros(1, 1)
        self.scene_embedding_size = self.scenes(silence).shape[1]
        self.timestamp_embedding_size = self.timestamps(silence)[0].shape[2]

    def scenes(self, audio: Tensor) -> Tensor:
        """See `get_scene_embeddings`."""
        parts, counts = [], []
        for field, count in self._windows(audio):
            parts.append(self.scored.encode("audio", field).features[LAST, "default"])
            counts.append(count)
        weights = [count / sum(counts) for count in counts]
        return torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)

    @torch.inference_mode()
    def timestamps(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """See `get_timestamp_embeddings`."""
        high, wide, step, centre = self.patches
        parts = []
        for field, count in self._windows(audio):
            patches = self.states(field)[:, -high * wide :]
            parts.append(patches.reshape(len(patches), high, wide, -1).mean(1)[:, :count].float())
        found = torch.cat(parts, 1)
        times = (torch.arange(found.shape[1], device=audio.device) * step + centre) * (1000 / SAMPLE_RATE)
        return found, times.float().expand(len(audio), -1)

    def _windows(self, audio: Tensor) -> Iterator[tuple[Field, int]]:
        """What the encoder reads of each window, and how many of its patches in time are sound."""
        if audio.dim() != 2 or not audio.numel() or not audio.is_floating_point():
            raise ValueError(f"audio must be (n_sounds, n_samples) float, got {tuple(audio.shape)} {audio.dtype}")
        if not audio.isfinite().all():
            raise ValueError("audio must be finite, got NaN or infinity")
        self.scored.to(audio.device)
        sounds = audio.float().cpu().numpy()
        _, wide, step, centre = self.patches
        given = max(1, math.ceil((audio.shape[1] - centre) / step))
        for first in range(0, given, wide):
            waveforms = [Waveform(sound[first * step : first * step + self.window], SAMPLE_RATE) for sound in sounds]
            yield self.inputs.field("audio", waveforms), min(wide, given - first)


def load_model(model_file_path: str = "") -> HearModel:
    """The encoder of a run, a checkpoint or an export, or an audio spectrogram transformer, by path or hub id.

    Raises:
        EncoderError: nothing that can be scored, or that sees sound as a spectrogram in patches.
    """
    if not model_file_path:
        raise EncoderError("load_model needs the path of a run, a checkpoint or an export: give --model")
    return HearModel(load_scored(model_file_path))


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """One vector per sound.

    Args:
        audio: (n_sounds, n_samples) floating point in [-1, 1] at 16 kHz; what lies outside is clipped.
        model: of `load_model`.

    Returns:
        (n_sounds, scene_embedding_size) float32 on the device of ``audio``.

    Raises:
        ValueError: audio of another shape or type, empty, or not finite.
    """
    return model.scenes(audio)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """A vector per sound and patch in time.

    Args:
        audio: as for `get_scene_embeddings`.
        model: of `load_model`.

    Returns:
        (n_sounds, n_timestamps, timestamp_embedding_size) float32, and the centres of the patches in milliseconds,
        (n_sounds, n_timestamps) float32, both on the device of ``audio``.

    Raises:
        ValueError: as `get_scene_embeddings`.
    """
    return model.timestamps(audio)


def _patches(scored: Scored, view: AudioView) -> tuple[Patches, Callable[[Field], Tensor]]:
    """How an encoder's patches lie, and its states (n, N, D) behind the last norm.

    In these patches come last, those of the lowest frequencies first.
    """
    states: Callable[[Field], Tensor]
    if isinstance(scored, Pretrained):
        patch = down = along = scored.encoder.config.audio_patch
        states = partial(scored.encoder.encode, "audio")
    elif isinstance(scored, Stock) and isinstance(scored.streams["audio"].reader, Spectrogram):
        model, reader = scored.streams["audio"].model, scored.streams["audio"].reader
        patch, down, along = model.config.patch_size, model.config.frequency_stride, model.config.time_stride

        def states(field: Field) -> Tensor:
            found: Tensor = model(**reader.inputs(field)).last_hidden_state
            return found
    else:
        raise EncoderError(
            f"{scored.name}: sees no spectrogram in patches; allowed are runs, checkpoints, exports and audio "
            "spectrogram transformers"
        )
    high, wide = (view.mels - patch) // down + 1, (view.frames - patch) // along + 1
    return Patches(high, wide, along * HOP, ((patch - 1) * HOP + FRAME) / 2), states
