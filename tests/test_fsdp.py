"""Ranks that share weights: what they learn and save is what one process learns and saves."""

import copy
import json
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

import pretrain.engine
from data.batch import Batch
from objectives.masked_region import MaskedRegionConfig
from objectives.pretraining import Pretraining
from objectives.teacher import TeacherConfig
from pretrain.checkpoint import Checkpoints, load_checkpoint
from pretrain.config import ConfigError, TrainConfig
from pretrain.engine import go_backward, pulls
from pretrain.optimizer import BadSteps, make_optimizer
from pretrain.sharding import Sharded, bare_of, full, gathered
from pretrain.start import check_sharding, shards_weights
from tests.samples import encoder, free_port
from tests.test_launch_files import FOLDER
from tests.test_parallel import model_of, whole_batch
from tests.test_processes import finish, metrics, start
from tests.tiny import STEPS, tiny_config, tiny_tokenizer, tiny_trained_state, without_key_biases, write_recipe

WORLD = 2
# Loss, parts of a batch, target of masked regions.
CASES = [("info_nce", 1, "pixel"), ("sigmoid", 3, "pixel"), ("info_nce", 3, "kl")]
COMPARED = {"loss", "image_text", "masked_image", "gradient_norm", "rankme/image", "gap/image_text"}
FILES = ("encoder/model", "trained", "objectives", "optimizer")


def model_for(loss: str, target: str, seed: int = 0) -> Pretraining:
    teacher = TeacherConfig(layers=1, prototypes=5)
    objectives = replace(model_of(loss).config, masked_region=MaskedRegionConfig(target=target, teacher=teacher))
    trunk = encoder()
    torch.manual_seed(seed)
    return Pretraining(trunk, objectives).double()


class Trained:
    """A model as ranks share it, or one process has it, what trains it, and the average of its encoder."""

    def __init__(self, loss: str, target: str, sharded: bool, seed: int = 0) -> None:
        self.bare = model_for(loss, target, seed)
        average = copy.deepcopy(self.bare.encoder).requires_grad_(False)
        self.model: nn.Module = Sharded(self.bare, "cpu") if sharded else self.bare
        self.average: nn.Module = Sharded(average, "cpu") if sharded else average
        self.optimizer = make_optimizer(self.bare, TrainConfig(learning_rate=0.1))

    def learn(self, accelerator: Accelerator, given: Batch, accumulate: int) -> dict[str, Tensor]:
        """A clipped step: losses, gradients, their norm, and the state after it."""
        loss = go_backward(accelerator, self.model, given.split(accumulate), 5, False, 0.0)
        found = {f"term {name}": term for name, term in loss.terms.items()}
        gradients = {name: p.grad for name, p in self.bare.named_parameters() if p.grad is not None}
        found |= {f"gradient {name}": full(each).clone() for name, each in gradients.items()}
        found["norm"] = full(accelerator.clip_grad_norm_(self.model.parameters(), 0.5))
        BadSteps(0).step(self.optimizer, found["norm"], loss.total, accelerator)
        self.bare.after_step(0.5)
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.bare.encoder.parameters(), strict=True):
                mean.lerp_(parameter, 0.25)
        return found | {f"state {name}": full(each) for name, each in self.bare.state_dict().items()}

    def save(self, folder: Path, step: int, main: bool = True) -> None:
        with Checkpoints(folder, 9, main=main) as checkpoints:
            average = bare_of(self.average)
            checkpoints.save(step, self.bare, self.optimizer, tiny_tokenizer(), {}, {}, {}, average)

    def load(self, checkpoint: Path) -> None:
        load_checkpoint(checkpoint, self.bare, self.optimizer, {}, bare_of(self.average))


def on_a_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    accelerator = Accelerator(cpu=True)
    given = whole_batch().split(WORLD)[rank]
    for loss, accumulate, target in CASES:
        trained = Trained(loss, target, sharded=True)
        # A look first, which must leave nothing behind.
        alone = pulls(accelerator, model_for(loss, target), given, 5, False, 0.0)
        assert pulls(accelerator, trained.model, given, 5, False, 0.0) == pytest.approx(alone)
        assert all(isinstance(parameter, DTensor) for parameter in trained.model.parameters())
        seen: list[Any] = []
        trained.model.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.extend(arguments))
        outcome = trained.learn(accelerator, given, accumulate)
        # No tensors, which FSDP would move to a GPU, also those that are read on the CPU.
        assert [type(argument) for argument in seen] == [partial] * accumulate
        outcome["held"] = torch.tensor([held(trained.model.parameters()), held(moments(trained))])
        save_file(
            {name: each.detach().contiguous() for name, each in outcome.items()}, folder / f"{target}-{loss}-{rank}"
        )
    trained.save(folder / "shared", 1, accelerator.is_main_process)
    leave_out_a_bad_step(accelerator, trained, given)
    other = Trained(*CASES[-1][::2], sharded=True, seed=1)
    other.load(folder / "one" / "step-00000001")
    with gathered(other.model):
        assert not any(isinstance(parameter, DTensor) for parameter in other.model.parameters())
    other.save(folder / "again", 1, accelerator.is_main_process)
    accelerator.wait_for_everyone()  # who leaves earlier may take the others with it
    accelerator.end_training()


def leave_out_a_bad_step(accelerator: Accelerator, trained: Trained, given: Batch) -> None:
    """One whose gradient is not finite in a place that a single rank holds."""
    before = [full(parameter).clone() for parameter in trained.model.parameters()]
    loss = go_backward(accelerator, trained.model, [given], 6, False, 0.0)
    if accelerator.is_main_process:
        gradient = trained.bare.get_parameter("encoder.tokenizers.text.embed.weight").grad
        assert isinstance(gradient, DTensor)
        gradient.to_local()[0, 0] = math.nan
    norm = full(accelerator.clip_grad_norm_(trained.model.parameters(), 0.5))
    assert BadSteps(0).step(trained.optimizer, norm, loss.total, accelerator)
    after = [full(parameter) for parameter in trained.model.parameters()]
    assert all(map(torch.equal, after, before))


def held(tensors: Any) -> float:
    """The share of the tensors that this rank holds."""
    local, whole = zip(*((each.to_local().numel(), each.numel()) for each in tensors), strict=True)
    return float(sum(local) / sum(whole))


def moments(trained: Trained) -> list[Tensor]:
    return [state[name] for state in trained.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ranks found, and the checkpoints ``one``, of one process, ``shared``, of ranks, and ``again``, of theirs."""
    folder = tmp_path_factory.mktemp("ranks")
    loss, accumulate, target = CASES[-1]
    trained = Trained(loss, target, sharded=False)
    trained.learn(Accelerator(cpu=True), whole_batch(), accumulate)
    trained.save(folder / "one", 1)
    spawn(on_a_rank, args=(free_port(), folder), nprocs=WORLD)  # type: ignore[no-untyped-call]
    return folder


@pytest.mark.parametrize(("loss", "accumulate", "target"), CASES)
def test_a_step_is_that_of_one_process(loss: str, accumulate: int, target: str, ranks: Path) -> None:
    """Gradients, also of what a rank has no samples for; clipping; weights, teachers and their centres afterwards."""
    expected = Trained(loss, target, sharded=False).learn(Accelerator(cpu=True), whole_batch(), 1)
    found = [load_file(ranks / f"{target}-{loss}-{rank}") for rank in range(WORLD)]
    assert expected["norm"] > 0.5
    for name, value in expected.items():
        if name.startswith("term "):
            mean = torch.stack([each.get(name, torch.zeros_like(value)) for each in found]).mean()
            torch.testing.assert_close(mean, value.detach())
            continue
        for each in found:
            tolerance = 1e-6 if "centres" in name else 1e-9  # those are sums in float32
            torch.testing.assert_close(each[name], value.detach(), rtol=tolerance, atol=tolerance)


def test_each_rank_holds_its_part_alone(ranks: Path) -> None:
    for loss, _, target in CASES:
        shares = sum(load_file(ranks / f"{target}-{loss}-{rank}")["held"] for rank in range(WORLD))
        torch.testing.assert_close(shares, torch.ones(2))


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    files = {file: load_file(checkpoint / f"{file}.safetensors") for file in FILES}
    return {f"{file} {name}": value for file, tensors in files.items() for name, value in tensors.items()}


def test_a_checkpoint_is_that_of_one_process(ranks: Path) -> None:
    one, shared = (tensors_of(ranks / name / "step-00000001") for name in ("one", "shared"))
    assert shared.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-7, atol=1e-9)


def test_a_checkpoint_goes_from_one_process_to_ranks_and_back(ranks: Path) -> None:
    """Loaded and saved again, not a bit of it is another."""
    one, again = (tensors_of(ranks / name / "step-00000001") for name in ("one", "again"))
    assert [name for name in one.keys() | again.keys() if not torch.equal(again[name], one[name])] == []
    other = Trained(*CASES[-1][::2], sharded=False, seed=1)
    other.load(ranks / "shared" / "step-00000001")
    other.save(ranks / "alone", 1)
    shared, alone = (tensors_of(ranks / name / "step-00000001") for name in ("shared", "alone"))
    assert [name for name in shared.keys() | alone.keys() if not torch.equal(alone[name], shared[name])] == []


# Whole runs


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", r"fsdp_version: 1: it has to be 2; docs/launch/fsdp2\.yaml is one that works"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: true: it has to be false"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: true: .* every process reads all"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing: true: .* train.recompute=true"),
        ("precision", "fp16", "train.precision=fp16: FSDP goes with bf16 or fp32"),
    ],
)
def test_what_fsdp_can_not_do_is_refused(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / "fsdp2.yaml"), "run.py"])
    launched = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    for variable in (each for each in launched if "FSDP" in each):
        monkeypatch.setenv(variable, launched[variable])
    assert shards_weights(8)
    assert not shards_weights(1)
    check_sharding("bf16")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"launched with FSDP and {message}"):
        check_sharding("fp16" if name == "precision" else "bf16")


def test_a_run_goes_on_as_one_process_would_which_can_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["eval.label=null", "train.ema=0.3", "train.gradients_every=4", "train.accumulate=2"]
    settings += ["eval.monitor.every=4", "eval.monitor.max_share=1.0", "train.keep=3"]
    pretrain.engine.pretrain(tiny_config(tmp_path, *settings))
    one, out = tmp_path / "run", tmp_path / "shared"
    begun = one / "checkpoints" / "step-00000004"
    with monkeypatch.context() as environment:
        environment.setenv("ACCELERATE_USE_FSDP", "true")
        environment.setenv("FSDP_VERSION", "2")
        code, said, errors = finish(start(WORLD, write_recipe(tmp_path), f"out={out}", f"resume={begun}", *settings))
    assert code == 0, errors
    assert f"FSDP2 over {WORLD} processes" in said
    after = [line for line in metrics(one) if line["step"] > 4]
    for a, b in zip(after, metrics(out), strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        for name in a.keys() & COMPARED:
            assert b[name] == pytest.approx(a[name], rel=2e-3), (a["step"], name)
    found, expected = (without_key_biases(tiny_trained_state(each / "checkpoints" / "last")) for each in (out, one))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-3)
    assert list((out / "pictures").glob("step-*.png"))
    last = pretrain.engine.pretrain(tiny_config(tmp_path, f"out={out}", *settings, f"train.steps={STEPS + 2}"))
    assert json.loads((last / "state.json").read_text())["step"] == STEPS + 2
