"""Several processes: what they learn together is what one process learns of the whole batch."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from data.batch import Batch
from objectives.contrastive import ContrastiveConfig
from objectives.masked_language import MaskedLanguageConfig
from objectives.masked_region import MaskedRegionConfig
from objectives.pretraining import ObjectivesConfig, Pretraining, UnimodalKeepConfig
from pretrain.engine import go_backward
from tests.samples import batch, encoder, free_port

# The second half has no image: all that is made of images has to come from the first rank.
PRESENCE = ["ita", "it", "ia", "i", "ita", "it", "ta", "a", "t", "ta", "ta", "a"]


def model_of(loss: str) -> Pretraining:
    objectives = ObjectivesConfig(
        contrastive=ContrastiveConfig(weight=0.7, loss=loss),
        masked_language=MaskedLanguageConfig(weight=0.5),
        masked_region=MaskedRegionConfig(decode=0.5),
        keep=UnimodalKeepConfig(image=0.5, audio=0.5, text=0.4),
        joint_share=0.5,
    )
    trunk = encoder()
    torch.manual_seed(0)
    return Pretraining(trunk, objectives).double()


def whole_batch() -> Batch:
    made = batch(PRESENCE)
    fields = {name: f._replace(x=f.x.double()) if f.x.is_floating_point() else f for name, f in made.fields.items()}
    return made._replace(fields=fields, groups=torch.tensor([0, 1, 2, 0, 0, 3, 3, -1, -1, 1, 4, 2]))


def learn(accelerator: Accelerator, loss: str, given: Batch, accumulate: int) -> dict[str, Tensor]:
    """The gradients of one step, and its losses."""
    bare = model_of(loss)
    model = accelerator.prepare(bare)
    found = go_backward(accelerator, model, given.split(accumulate), 5, False, 0.0)
    outcome = {f"term {name}": term for name, term in found.terms.items()}
    return outcome | {name: p.grad for name, p in bare.named_parameters() if p.grad is not None}


def learn_on_a_rank(rank: int, world: int, port: int, loss: str, accumulate: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    given = whole_batch().split(world)[rank]
    outcome = learn(accelerator, loss, given, accumulate)
    save_file({name: each.contiguous() for name, each in outcome.items()}, f"{folder}/{rank}.safetensors")
    accelerator.wait_for_everyone()  # who leaves earlier may take the others with it
    accelerator.end_training()


@pytest.mark.parametrize(("loss", "world", "accumulate"), [("info_nce", 2, 1), ("sigmoid", 2, 3), ("info_nce", 3, 2)])
def test_gradients_are_those_of_one_process(loss: str, world: int, accumulate: int, tmp_path: Path) -> None:
    expected = learn(Accelerator(cpu=True), loss, whole_batch(), 1)
    arguments = (world, free_port(), loss, accumulate, str(tmp_path))
    spawn(learn_on_a_rank, args=arguments, nprocs=world)  # type: ignore[no-untyped-call]
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(world)]
    gradients = [name for name in expected if not name.startswith("term ")]
    assert len(gradients) == len(dict(model_of(loss).named_parameters()))
    for found in ranks:
        for name in gradients:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-10)
    for name in expected.keys() - set(gradients):
        mean = torch.stack([found.get(name, torch.zeros_like(expected[name])) for found in ranks]).mean()
        torch.testing.assert_close(mean, expected[name].detach())
