"""Make digits-voices-more.tar: 40 further synthetic voices x 10 digits, for training only.

Needs the commands espeak-ng (1.51 was used) and the packages of this project; takes a minute:

    python data/assets/make_voices.py OUT.tar

No voice is taken that comes nearer to a held-out voice of digits-voices.tar than that archive's own training voices
do, so the held-out voices stay as unheard as they were.
"""

import argparse
import io
import subprocess
import tarfile
import tempfile
from itertools import cycle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch

from data.decode import Waveform, decode_audio
from data.digits import CLASS_NAMES
from data.index import build_index
from data.transforms import AudioView, make_field

BANK = Path(__file__).with_name("digits-voices.tar")
RATE = 8000
WANTED = 40
FIRST_NUMBER = 32  # the bank has 00 to 31
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
_VARIANTS = """
Alex Alicia Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario Michael Mike adam anika antonio aunty
belinda benjamin boris caleb david ed edward f1 f2 f3 f4 f5 gustave iven john kaukovalta klatt klatt2 klatt3 klatt4
linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel norbert pablo paul pedro quincy rob robert sandro shelby steph
travis victor zac grandma grandpa
"""
VARIANTS = _VARIANTS.split()

Clip = npt.NDArray[np.float32]


def speak(digit: str, variant: str, accent: str, speed: int, pitch: int) -> Clip:
    """One word at 8 kHz, without the silence around it, its peak at 0.9 of full scale, as in the bank."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        voice = ["-v", f"{accent}+{variant}", "-s", str(speed), "-p", str(pitch)]
        subprocess.run(["espeak-ng", *voice, "-w", file.name, digit], check=True)  # noqa: S603, S607
        sound = decode_audio(Path(file.name).read_bytes())
    x = soxr.resample(sound.floats(), sound.rate, RATE)
    loud = np.flatnonzero(np.abs(x) > 0.01 * np.abs(x).max())
    x = x[loud[0] : loud[-1] + 1]
    return np.asarray(x * (0.9 / np.abs(x).max()), dtype=np.float32)


def fingerprint(clips: list[Clip]) -> torch.Tensor:
    """(10, 12, 64): the log-mel spectrogram of each digit, stretched to 12 steps, without its mean level."""
    view = AudioView(frames=96, mels=64)
    log_mel = view.on_device()
    steps = []
    for clip in clips:
        field = make_field(view, [Waveform(clip, RATE)], tokenizer=None)  # type: ignore[arg-type]  # sound needs none
        length = field.x.shape[1] if field.valid is None else int(field.valid.sum())
        x = log_mel(field).x[0][: max(1, (length - 400) // 160 + 1)]
        steps.append(torch.nn.functional.interpolate(x.T[None], size=12, mode="linear")[0].T)
    spectra = torch.stack(steps)
    return spectra - spectra.mean(dim=(1, 2), keepdim=True)


def bank_voices() -> dict[str, dict[str, list[Clip]]]:
    """``train`` and ``val`` (held out) -> voice -> its ten clips."""
    clips: dict[str, dict[str, list[Clip]]] = {"train": {}, "val": {}}
    samples = sorted(build_index(BANK).samples)
    with BANK.open("rb") as file:
        for key, members in samples:  # by split, then digit, then voice
            split, _, voice = key.split("_")
            offset, size = members["flac"]
            file.seek(offset)
            clips[split].setdefault(voice, []).append(decode_audio(file.read(size)).floats())
    return clips


def main() -> None:
    """Choose the voices and write the archive."""
    parser = argparse.ArgumentParser(description="Make further synthetic voices.")
    parser.add_argument("out", type=Path, help="the archive to write")
    out = parser.parse_args().out

    bank = bank_voices()
    held_out = torch.stack([fingerprint(clips) for clips in bank["val"].values()])
    training = torch.stack([fingerprint(clips) for clips in bank["train"].values()])
    nearest = (training[:, None] - held_out).square().mean(dim=(2, 3, 4)).amin(dim=0)  # (held out,)
    taken: list[list[Clip]] = []
    refused = 0
    settings = zip(VARIANTS, cycle(ACCENTS), cycle((140, 155, 170, 185, 125)), cycle((50, 35, 65, 25)), strict=False)
    for variant, accent, speed, pitch in settings:
        clips = [speak(name, variant, accent, speed, pitch) for name in CLASS_NAMES]
        distance = (fingerprint(clips) - held_out).square().mean(dim=(1, 2, 3))
        if (distance < nearest).any() or max(map(len, clips)) > 0.8 * RATE:
            refused += 1
            continue
        taken.append(clips)
        if len(taken) == WANTED:
            break
    print(f"{len(taken)} voices taken; {refused} refused: too near to a held-out voice, or longer than 0.8 s")

    with tarfile.open(out, "w") as archive:
        for number, clips in enumerate(taken, start=FIRST_NUMBER):
            for digit, clip in enumerate(clips):
                data = io.BytesIO()
                soundfile.write(data, clip, RATE, format="FLAC", subtype="PCM_16")
                info = tarfile.TarInfo(f"train_{digit}_{number:02}.flac")
                info.size = len(data.getvalue())
                archive.addfile(info, io.BytesIO(data.getvalue()))


if __name__ == "__main__":
    main()
