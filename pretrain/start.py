"""What stands before the first step: processes, folder, data, model and optimizer, new or from a checkpoint."""

import copy
import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs, PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from data.crew import available_cpus
from data.documents import leaves
from data.index import write_whole
from data.source import Source
from data.stream import Stream, open_train
from data.text import MAX_CAPTIONS, TokenizerConfig, continues_word, load_tokenizer, train_tokenizer
from objectives.pretraining import Pretraining
from pretrain import trackers
from pretrain.allocator import keep_freed_memory
from pretrain.checkpoint import find_checkpoint, find_last, load_checkpoint
from pretrain.config import Config, ConfigError, to_yaml
from pretrain.explain import differences
from pretrain.initial import load_initial
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import Vocabulary
from pretrain.optimizer import BadSteps, make_optimizer
from pretrain.ranks import first_alone
from pretrain.sharding import Sharded, bare_of, gathered

# Settings that change memory and speed alone.
SAME_RESULT = {"objectives.contrastive.tile"}
# Ways in which several processes may share the work.
SHARED_BY = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
LOCK = ".lock"
# What may lie in a run's folder before it has begun.
BEFORE_A_RUN = {"checkpoints", "tokenizer", "trackers", "bad_steps", "export", "eval", "pictures", "dry_run"}


@dataclass
class Run:
    """All that the loop works with.

    Attributes:
        config: the whole run.
        accelerator: device, precision, ranks.
        stream: the data, where it stands.
        tokenizer: of the texts.
        bare: the module itself.
        model: the module as ranks share it.
        optimizer: as Accelerate wraps it.
        average_model: the average of the encoder's weights as ranks share it, if ``train.ema`` is set.
        step: steps done.
        bad: steps that were left out.
        tracker_ids: by which trackers know the run again.
    """

    config: Config
    accelerator: Accelerator
    stream: Stream
    tokenizer: PreTrainedTokenizerBase
    bare: Pretraining
    model: nn.Module
    optimizer: Any
    average_model: nn.Module | None
    step: int
    bad: BadSteps
    tracker_ids: dict[str, str]

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.config.out)

    @property
    def done(self) -> float:
        """Share of the steps that are done."""
        return self.step / self.config.train.steps

    @property
    def average(self) -> Encoder | None:
        """The average itself."""
        return None if self.average_model is None else bare_of(self.average_model)

    @contextmanager
    def evaluated(self) -> Iterator[Encoder]:
        """What evaluation sees, with all its weights; all ranks enter it."""
        with gathered(self.model if self.average_model is None else self.average_model):
            yield self.bare.encoder if self.average is None else self.average

    def counters(self) -> dict[str, Any]:
        """What a resumed run has to know besides weights and data."""
        scaler = self.accelerator.scaler
        return {
            "bad_steps": self.bad.count,
            "trackers": self.tracker_ids,
            "scaler": None if scaler is None else scaler.state_dict(),
        }


def start_accelerator(config: Config) -> Accelerator:
    """The processes that this one is launched with, on the device that Accelerate finds, in the precision asked for.

    Raises:
        ConfigError: a precision that this device does not have.
        TrackerError: a tracker that is not installed.
    """
    # oneDNN reads it when it first computes something. It would keep 1,024 kernels of a quarter of a megabyte, one per
    # shape. A step uses some 200; but the number of hidden tokens varies, and a run would grow for thousands of steps.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "384")
    # Without CUDA it is the CPU: Apple's GPUs have no float64, in which the log-mel is computed.
    cpu = not torch.cuda.is_available()
    settings = config.train
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=settings.timeout))
    state = PartialState(cpu=cpu, **timeout.to_kwargs())
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if fast_in_bf16(state.device) else "fp32"
    if precision == "fp16" and state.device.type != "cuda":
        raise ConfigError(f"train.precision=fp16 needs a GPU, and this is {state.device}; allowed are auto, fp32, bf16")
    if shards_weights(state.num_processes):
        check_sharding(precision)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[timeout],
        **trackers.accelerator_arguments(config.trackers, Path(config.out)),
    )
    if accelerator.distributed_type not in SHARED_BY:
        raise ConfigError(
            f"launched with {accelerator.distributed_type.value}: processes share the work by plain data parallelism "
            "or FSDP2, on CPUs or CUDA GPUs; the files in docs/launch do that"
        )
    if accelerator.device.type == "cpu":
        # `accelerate launch` sets one thread per process where nobody chose, which would leave the others idle.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(settings.threads or max(1, available_cpus() // here))
        keep_freed_memory()
    return accelerator


def shards_weights(processes: int) -> bool:
    """Whether the launcher asks for FSDP, and there are ranks to share anything."""
    # Accelerate itself takes no notice of it on CPUs.
    return processes > 1 and bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def check_sharding(precision: str) -> None:
    """Raise ConfigError if what the launcher says of FSDP, or the precision, is not to be had."""
    version = os.environ.get("FSDP_VERSION", "1")
    wrong = {
        f"fsdp_version: {version}": (version != "2", "it has to be 2"),
        "fsdp_offload_params: true": (parse_flag_from_env("FSDP_OFFLOAD_PARAMS"), "it has to be false"),
        "fsdp_cpu_ram_efficient_loading: true": (
            parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"),
            "it has to be false, since every process reads all weights",
        ),
        "fsdp_activation_checkpointing: true": (
            parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"),
            "it has to be false; train.recompute=true does that",
        ),
        "train.precision=fp16": (precision == "fp16", "FSDP goes with bf16 or fp32"),
    }
    for what, (is_wrong, instead) in wrong.items():
        if is_wrong:
            raise ConfigError(f"launched with FSDP and {what}: {instead}; docs/launch/fsdp2.yaml is one that works")


def fast_in_bf16(device: torch.device) -> bool:
    """Whether the device has matrix units for bf16; without them it is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def claimed(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of a folder; the system gives it back when this process ends, however that is.

    Raises:
        ConfigError: another run is at work there.
    """
    if not accelerator.is_main_process:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+") as file:
        try:
            # Of this process alone: `flock` would live on in the workers of a run that was killed, for some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"out={out}: another run is at work there ({file.read().strip()}): wait for it, end it, or choose "
                "another `out`"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def set_up(config: Config, sources: Sequence[Source] | None, accelerator: Accelerator, given: str | None = None) -> Run:
    """Everything built and, where there is a checkpoint to go on from, restored; raises what `pretrain` raises."""
    out, main = Path(config.out), accelerator.is_main_process
    if (part := config.train.batch_size // accelerator.num_processes) % config.train.accumulate:
        raise ConfigError(
            f"train.accumulate={config.train.accumulate} does not divide the {part} samples of a step that each of "
            f"{accelerator.num_processes} processes has"
        )
    resumed_from = prepare_folder(config, accelerator)
    sources = open_train(config.data) if sources is None else sources
    accelerator.print(modalities_of(config, sources))
    tokenizer = make_tokenizer(config.tokenizer, sources, resumed_from, out, accelerator)
    stream = Stream(
        sources,
        config.data,
        tokenizer,
        seed=config.seed,
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    identity = identity_of(config)

    torch.manual_seed(config.seed)
    encoder = Encoder(config.model, config.data.views, vocabulary_of(tokenizer))
    if resumed_from is None:
        load_initial(encoder, config.init_from, accelerator.print)
    encoder.recompute = config.train.recompute
    continues = continues_word(tokenizer) if config.objectives.masked_language.whole_words else None
    bare = Pretraining(encoder, config.objectives, continues).to(accelerator.device)
    average = copy.deepcopy(encoder).requires_grad_(False) if config.train.ema is not None else None
    if config.train.compile:
        encoder.compile_blocks()
    # Before the optimiser is made: it has to know each rank's part.
    model = share_model(bare, accelerator)
    average_model = share_average(average, accelerator)
    bare_optimizer = make_optimizer(bare, config.train)
    step, counters = 0, dict[str, Any]()
    if resumed_from is not None:
        step, counters = load_checkpoint(resumed_from, bare, bare_optimizer, identity, average)
        accelerator.print(f"resumed from {resumed_from} at step {step}")
        before = resumed_from.parents[1] / "config.yaml"  # of the run that saved it, which may have another folder
        if before.exists() and (lines := differences(before.read_text(), config)):
            accelerator.print("  " + "\n  ".join(lines))
        if changed := stream.load(resumed_from):
            accelerator.print("the data have changed, a new pass over them begins:\n  " + "\n  ".join(changed))
        if step > config.train.steps or (step == config.train.steps and find_last(out / "checkpoints") is None):
            raise ConfigError(f"train.steps={config.train.steps}, but {resumed_from} has done {step} already")
    if stream.steps is not None and stream.steps < config.train.steps:
        raise ConfigError(f"train.steps={config.train.steps}, but max_epochs of all sources end at step {stream.steps}")
    optimizer = accelerator.prepare_optimizer(bare_optimizer)
    if accelerator.scaler is not None and counters.get("scaler"):
        accelerator.scaler.load_state_dict(counters["scaler"])
    bad = BadSteps(config.train.max_bad_steps, counters.get("bad_steps", 0))
    run = Run(config, accelerator, stream, tokenizer, bare, model, optimizer, average_model, step, bad, {})
    if step < config.train.steps:
        if main:
            record_run(config, given, accelerator)
            drop_later_metrics(out / "metrics.jsonl", step)
            for path in (out / "bad_steps").glob("*.jsonl"):
                drop_later_metrics(path, step)
            describe(config, accelerator, encoder, sources, len(tokenizer))
        # A run that goes on elsewhere with another one's checkpoint is a run of its own.
        own = resumed_from is not None and resumed_from.resolve().parent == (out / "checkpoints").resolve()
        ids = counters.get("trackers") if own else None
        run.tracker_ids = trackers.start(accelerator, config.trackers, asdict(config), out, step, ids)
    return run


def prepare_folder(config: Config, accelerator: Accelerator) -> Path | None:
    """Make the run's folder; returns the checkpoint to go on from, or None.

    Raises:
        ConfigError: ``resume`` does not fit what is there, or there is something that is no run.
        CheckpointError: ``resume`` is the path of nothing that can be resumed.
    """
    out = Path(config.out)
    own = find_last(out / "checkpoints")
    if config.resume == "none" and own is not None:
        raise ConfigError(
            f"resume=none, but {out / 'checkpoints'} holds a checkpoint: choose another `out`, or remove it"
        )
    if own is None and out.exists() and not (out / "config.yaml").exists():
        odd = sorted(path.name for path in out.iterdir() if path.name not in BEFORE_A_RUN and path.name[0] != ".")
        if odd:
            raise ConfigError(
                f"out={out}: there is something that is no run ({', '.join(odd[:3])}): choose another `out`"
            )
    resumed_from = own
    if config.resume not in ("auto", "none"):
        resumed_from = find_checkpoint(Path(config.resume)).resolve()
        if own is not None and began_with(out) == config.resume:
            resumed_from = own  # the same command once more: it goes on with what it has done since
        elif own is not None and resumed_from != own.resolve():
            raise ConfigError(
                f"resume={config.resume}, but {out / 'checkpoints'} holds checkpoints of its own: choose another `out`"
            )
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    return resumed_from


def began_with(out: Path) -> str | None:
    """What ``resume`` was when a run was last started in this folder."""
    saved = out / "config.yaml"
    try:
        settings = yaml.safe_load(saved.read_text()) if saved.exists() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{saved} is damaged: {error}") from error
    return settings.get("resume") if isinstance(settings, dict) else None


def modalities_of(config: Config, sources: Sequence[Source]) -> str:
    """How many samples have each modality, and what nothing reads; a line per source.

    Raises:
        ConfigError: a modality in use that no sample has.
    """
    unread = ", ".join(f".{extension}" for extension in sorted(set().union(*(s.unread() for s in sources))))
    for name in config.data.views.used:
        if not any(source.count(name) for source in sources):
            raise ConfigError(
                f"data.views.{name} is in use, but no training sample has {name}"
                + (f"; not read are {unread}" if unread else "")
                + f". Set data.views.{name}=null to train without it"
            )
    lines = []
    for source in sources:
        counts = ", ".join(f"{source.count(name)} with {name}" for name in config.data.views.used)
        lines.append(f"{'samples' if len(sources) == 1 else source.name:9} {len(source)}: {counts}")
    if unread:
        lines.append(f"          members that nothing reads: {unread}")
    return "\n".join(lines)


def make_tokenizer(
    config: TokenizerConfig,
    sources: Sequence[Source],
    checkpoint: Path | None,
    out: Path,
    accelerator: Accelerator,
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint if there is one, else the named one, else one trained on the captions.

    Raises:
        UserError: the tokenizer lacks a token that training needs, or ``train`` is too small.
    """
    if checkpoint is not None:
        return load_tokenizer(checkpoint / "encoder" / "tokenizer")
    if config.name is not None:
        return load_tokenizer(config.name)
    folder = out / "tokenizer"
    with first_alone(accelerator.is_main_process, accelerator.num_processes):
        if accelerator.is_main_process:  # the others read it: a tokenizer of their own might differ
            captions = chain.from_iterable(source.captions(MAX_CAPTIONS // len(sources)) for source in sources)
            train_tokenizer(captions, config.train or 0).save_pretrained(folder)
    return load_tokenizer(folder)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What the model needs to know of a tokenizer."""
    return Vocabulary(
        len(tokenizer), tokenizer.pad_token_id, tokenizer.mask_token_id, tuple(sorted(tokenizer.all_special_ids))
    )


def share_model(bare: Pretraining, accelerator: Accelerator) -> nn.Module:
    """The module whose gradients are averaged over ranks, by FSDP2 if the launcher asks for it, else by DDP.

    Not by ``Accelerator.prepare``, which names the device: DDP would then move all tensors of a batch to it, also those
    that say which rows are whose and are read on the CPU.
    """
    if shards_weights(accelerator.num_processes):
        return Sharded(bare, accelerator.device.type)
    # One buffer for gradients and what is sent, no second copy of them.
    return DistributedDataParallel(bare, gradient_as_bucket_view=True) if accelerator.num_processes > 1 else bare


def share_average(average: Encoder | None, accelerator: Accelerator) -> nn.Module | None:
    """As the weights that it is an average of, so that each rank's part follows the same part of these."""
    if average is None or not shards_weights(accelerator.num_processes):
        return average
    return Sharded(average, accelerator.device.type)


def identity_of(config: Config) -> dict[str, Any]:
    """Everything but the data that, if it changed, would make a resumed run another run; dotted keys."""
    parts = {
        "data": {"group": config.data.group, "views": asdict(config.data.views)},
        "model": asdict(config.model),
        "objectives": asdict(config.objectives),
        "tokenizer": asdict(config.tokenizer),
    }
    return {key: value for key, value in leaves(parts) if key not in SAME_RESULT}


def record_run(config: Config, given: str | None, accelerator: Accelerator) -> None:
    """Write config.yaml, given.yaml and env.json, once it is sure that this configuration runs."""
    out = Path(config.out)
    write_whole(out / "config.yaml", to_yaml(config).encode())  # by it a folder is known as a run's
    if given is not None:
        (out / "given.yaml").write_text(given)
    packages = ("torch", "transformers", "accelerate", "datasets", "webdataset", "numpy", "tokenizers", "safetensors")
    environment = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": available_cpus(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": accelerator.num_processes,
        "precision": precision_of(accelerator),
        "packages": {name: version(name) for name in packages},
    }
    (out / "env.json").write_text(json.dumps(environment, indent=2) + "\n")


def drop_later_metrics(path: Path, step: int) -> None:
    """Keep the lines up to ``step``: those after it are written again by the resumed run."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    write_whole(path, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())


def precision_of(accelerator: Accelerator) -> str:
    """What `train.precision` came to: bf16, fp16 or fp32."""
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def describe(
    config: Config, accelerator: Accelerator, encoder: Encoder, sources: Sequence[Source], vocabulary: int
) -> None:
    """Say what is about to be trained, on what and where."""
    parameters = sum(p.numel() for p in encoder.parameters())
    world = accelerator.num_processes
    shared = f", {'FSDP2' if shards_weights(world) else 'DDP'} over {world} processes" if world > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    epochs = config.train.steps * config.train.batch_size / sum(map(len, sources))
    shards = sum(len(source.shards) for source in sources)
    print(
        f"encoder   {', '.join(config.data.views.used)}: {parameters / 1e6:.2f} M parameters, "
        f"{vocabulary} tokens of vocabulary\n"
        f"data      {shards} shards; "
        f"{config.train.steps} steps of {config.train.batch_size} are {epochs:.1f} epochs\n"
        f"device    {accelerator.device}{threads}, {precision_of(accelerator)}{shared}\n"
        f"run       {config.out}",
        flush=True,
    )
