"""How fast a training step is: ours beside open_clip's and FLAVA's at the same sizes, timed in turn.

    pip install --no-deps open_clip_torch
    python benchmarks/step.py                       # minutes on 2 CPU cores; the figures of benchmarks/README.md
    python benchmarks/step.py --rounds 5            # a quick look

Image 64 px in patches of 8, text of 32 tokens, width 192, depth 6, 3 heads, batch 64; bf16 by autocast, AdamW, forward,
backward and optimiser step on random data in memory. open_clip's CLIP and `transformers`' FlavaForPreTraining have the
same sizes; FLAVA gets its image tokens for free, and a multimodal encoder of half the depth, as in its paper. The last
line is one JSON object with the ratios.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from transformers import FlavaConfig, FlavaForPreTraining

from benchmarks.peers import MissingPeerError, open_clip
from data.batch import Batch, Field
from data.transforms import ImageView, TextView, Views
from objectives.contrastive import ContrastiveConfig
from objectives.masked_language import MaskedLanguageConfig
from objectives.masked_region import MaskedRegionConfig
from objectives.pretraining import ObjectivesConfig, Pretraining, UnimodalKeepConfig
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import ModelConfig, Vocabulary

SIDE, PATCH, TOKENS, WIDTH, DEPTH, HEADS, EMBED = 64, 8, 32, 192, 6, 3, 128
WORDS = 8000
VIEWS = Views(ImageView(size=SIDE), TextView(max_tokens=TOKENS), None)
VOCABULARY = Vocabulary(size=WORDS, pad_id=1, mask_id=4, special_ids=(0, 1, 2, 3, 4))

Step = Callable[[], Tensor]


def pairs(n: int) -> Batch:
    """Random images and texts."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    ids = torch.randint(5, WORDS, (n, TOKENS), generator=generator)
    return Batch({"image": Field(images, torch.arange(n)), "text": Field(ids, torch.arange(n))}, n, [""] * n)


def train_step(model: nn.Module, loss: Step, device: torch.device) -> Step:
    """Forward, backward and update; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def ours(batch: Batch, objectives: ObjectivesConfig, device: torch.device, compiled: bool) -> Step:
    """A step of this project's."""
    torch.manual_seed(0)
    config = ModelConfig(width=WIDTH, depth=DEPTH, heads=HEADS, embed_dim=EMBED, image_patch=PATCH, audio_patch=PATCH)
    model = Pretraining(Encoder(config, VIEWS, VOCABULARY), objectives).to(device)
    if compiled:
        model.encoder.compile_blocks()
    seeds = iter(range(10**9))
    return train_step(model, lambda: model(batch, seed=next(seeds)).total, device)


def contrastive_only(keep: float) -> ObjectivesConfig:
    """No masked objectives; the share of patches that the encoder sees."""
    return ObjectivesConfig(
        masked_language=MaskedLanguageConfig(weight=0),
        masked_region=MaskedRegionConfig(weight=0),
        contrastive=ContrastiveConfig(),
        keep=UnimodalKeepConfig(image=keep),
    )


def clip(batch: Batch, device: torch.device) -> Step:
    """A step of open_clip's."""
    torch.manual_seed(0)
    model_module, loss_module = open_clip("model"), open_clip("loss")
    model = model_module.CLIP(
        embed_dim=EMBED,
        vision_cfg=model_module.CLIPVisionCfg(
            layers=DEPTH, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=SIDE
        ),
        text_cfg=model_module.CLIPTextCfg(
            context_length=TOKENS, vocab_size=WORDS, width=WIDTH, heads=HEADS, layers=DEPTH
        ),
    ).to(device)
    loss = loss_module.ClipLoss()
    images, ids = batch.fields["image"].x, batch.fields["text"].x
    return train_step(model, lambda: loss(*model(images, ids)), device)


def flava(batch: Batch, device: torch.device) -> Step:
    """A step of FLAVA's pretraining: all of its losses, its image tokens given."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": DEPTH,
    }
    image_words = 8192
    config = FlavaConfig(
        image_config={**sizes, "image_size": SIDE, "patch_size": PATCH, "vocab_size": image_words, "mask_token": True},
        text_config={**sizes, "vocab_size": WORDS, "max_position_embeddings": TOKENS, "pad_token_id": 1},
        multimodal_config={**sizes, "num_hidden_layers": DEPTH // 2},
        hidden_size=WIDTH,
        projection_dim=EMBED,
        init_codebook=False,
    )
    model: Any = FlavaForPreTraining(config)
    model.to(device).train()
    images, ids = batch.fields["image"].x, batch.fields["text"].x
    generator = torch.Generator(device.type).manual_seed(0)
    n, patches = len(ids), (SIDE // PATCH) ** 2

    def loss() -> Tensor:
        chosen = torch.rand(ids.shape, generator=generator, device=device) < 0.15
        hidden = torch.rand((n, patches), generator=generator, device=device) < 0.4
        out = model(
            input_ids=ids,
            input_ids_masked=ids.masked_fill(chosen, 4),
            pixel_values=images,
            attention_mask=torch.ones_like(ids),
            bool_masked_pos=hidden,
            mlm_labels=ids.masked_fill(~chosen, -100),
            mim_labels=torch.randint(image_words, (n, patches), generator=generator, device=device),
            itm_labels=torch.ones(n, dtype=torch.long, device=device),
            skip_unmasked_multimodal_encoder=True,
            return_loss=True,
        )
        total: Tensor = out.loss
        return total

    return train_step(model, loss, device)


def seconds(step: Step, device: torch.device) -> float:
    """How long one step takes."""
    before = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - before


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description="Time training steps in turn.")
    parser.add_argument("--rounds", type=int, default=15, help="times that each step is timed, in turn")
    parser.add_argument("--batch", type=int, default=64, help="pairs of a step")
    parser.add_argument("--compile", action="store_true", help="time our steps with compiled blocks as well")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = pairs(arguments.batch).to(device)
    steps = {
        "ours, contrastive": ours(batch, contrastive_only(1.0), device, False),
        "ours, contrastive, 50 % of patches": ours(batch, contrastive_only(0.5), device, False),
        "ours, all objectives": ours(batch, ObjectivesConfig(), device, False),
        "open_clip": clip(batch, device),
        "FLAVA": flava(batch, device),
    }
    if arguments.compile:
        steps |= {
            "ours, contrastive, compiled": ours(batch, contrastive_only(1.0), device, True),
            "ours, contrastive, 50 %, compiled": ours(batch, contrastive_only(0.5), device, True),
            "ours, all objectives, compiled": ours(batch, ObjectivesConfig(), device, True),
        }
    rounds = [{name: seconds(step, device) for name, step in steps.items()} for _ in range(arguments.rounds + 2)][2:]
    times = {name: statistics.median(taken[name] for taken in rounds) for name in steps}
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; batch {arguments.batch}\n")
    print(f"{'step':36} {'ms':>8} {'samples/s':>10} {'vs open_clip':>13}")
    for name, taken in times.items():
        ratio = statistics.median(row["open_clip"] / row[name] for row in rounds)
        print(f"{name:36} {1000 * taken:8.1f} {arguments.batch / taken:10.0f} {ratio:12.2f}x")

    def ratio_of(one: str, other: str) -> float:
        return round(statistics.median(row[other] / row[one] for row in rounds), 2)

    print(
        json.dumps(
            {
                "contrastive_vs_open_clip": ratio_of("ours, contrastive", "open_clip"),
                "contrastive_keep50_vs_open_clip": ratio_of("ours, contrastive, 50 % of patches", "open_clip"),
                "all_time_vs_own_contrastive": ratio_of("ours, contrastive", "ours, all objectives"),
                "all_vs_flava": ratio_of("ours, all objectives", "FLAVA"),
            }
        )
    )


if __name__ == "__main__":
    try:
        main()
    except MissingPeerError as error:
        sys.exit(f"error: {error}")
