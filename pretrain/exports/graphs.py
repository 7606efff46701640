"""The streams as ONNX graphs, for runtimes without torch; needs the extra ``onnx``."""

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Field
from pretrain.exports.folders import INPUTS
from pretrain.exports.joint import joint_model
from pretrain.exports.modeling_triptych import TriptychModel
from pretrain.exports.subject import ExportError, Subject
from pretrain.exports.verify import Inputs

OPSET = 18
TOLERANCE = 1e-4
NEEDED = ("onnx", "onnxscript", "onnxruntime")


class Tower(nn.Module):
    """One modality of the exported model, with tensors in and tensors out."""

    def __init__(self, model: TriptychModel, modality: str) -> None:
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What stock models take -> states (n, N, D), features (n, D) and, if they were trained, embeddings (n, E)."""
        got = self.model(**dict(zip(INPUTS[self.modality], inputs, strict=True)))
        features = got[f"{self.modality}_features"]
        head: Any = self.model.heads[self.modality]
        embeddings = (head(features),) if self.model.config.pairs else ()
        return got.last_hidden_state, features, *embeddings


def check_onnx() -> None:
    """Raises ExportError where a package that is needed is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ExportError(f"--onnx needs {', '.join(missing)}: pip install -e '.[onnx]'")


def write_onnx(
    subject: Subject, folder: Path, inputs: Inputs, streams: Collection[str] | None = None
) -> dict[str, float]:
    """``onnx/<modality>.onnx`` in float32, for any number of samples (and tokens), each compared with the encoder.

    Args:
        subject: its streams are written.
        folder: an existing one.
        inputs: real or random samples to compare with.
        streams: which of them; all if not given.

    Returns:
        modality -> the largest difference under onnxruntime.

    Raises:
        ExportError: packages that are missing, or a graph whose outputs differ by more than 1e-4.
    """
    check_onnx()
    wanted = [name for name in subject.modalities if streams is None or name in streams]
    return {name: _write(subject, name, folder / f"{name}.onnx", inputs.fields[name]) for name in wanted}


def _write(subject: Subject, modality: str, path: Path, field: Field) -> float:
    import onnxruntime

    tower = Tower(joint_model(subject), modality).train(False)
    given: tuple[Tensor, ...] = (field.x.contiguous(),)
    batch = torch.export.Dim("batch")
    shapes: list[dict[int, Any]] = [{0: batch}]
    if modality == "text":
        valid = torch.ones_like(field.x, dtype=torch.bool) if field.valid is None else field.valid
        given = (*given, valid.long())
        shapes = [{0: batch, 1: torch.export.Dim("length")}] * 2
    outputs = ["last_hidden_state", "pooler_output", "embeds"][: 3 if subject.contrasted else 2]
    with _quiet():
        torch.onnx.export(
            tower,
            given,
            path,
            input_names=list(INPUTS[modality]),
            output_names=outputs,
            dynamic_shapes={"inputs": tuple(shapes)},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in (len(field.x), 1):  # any number of samples
        part = [tensor[:count] for tensor in given]
        got = session.run(None, dict(zip(INPUTS[modality], (tensor.numpy() for tensor in part), strict=True)))
        with torch.inference_mode():
            states = subject.encoder.encode(
                modality, Field(part[0], torch.arange(count), part[1].bool() if len(part) > 1 else None)
            )
            features = subject.encoder.pool(modality, states)
            expected = (states, features, subject.encoder.project(modality, features))
        for name, one, other in zip(outputs, got, expected, strict=False):
            difference = float(np.abs(one - other.numpy()).max())
            if not difference <= TOLERANCE:
                raise ExportError(f"{path}: {name} differs by {difference:.1e} under onnxruntime")
            largest = max(largest, difference)
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the conversion tells its developers."""
    loud = logging.getLogger("torch.onnx")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="# The axis name")  # two axes that are of one length
            yield
    finally:
        loud.setLevel(level)
