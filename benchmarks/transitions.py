"""What each step from one stage to the next keeps: ``python -m benchmarks transitions``.

Small models go the papers' way on the quickstart's sprites: from classes to text, to twice the
size, to compressed keys and values, to another autoencoder. After each step the grown model is
trained on, beside one that was grown wrongly and one from scratch, all on the same batches.
``benchmarks/results/cpu/transitions.jsonl`` has a line for each of them and seed: the error of the
predicted noise, right after the step and later, on noisy pictures that stay the same; and the
error just before the step. Each seed has its own weights and batches; pictures and autoencoders are
the same. ``plot`` draws them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks.environment import RESULTS, environment, write
from benchmarks.timing import busy_seconds
from pixart import PixArt, PixArtConfig
from pixart.checkpoints import grow
from pixart.conditioning import VAE, TextEncoder
from pixart.data import ImageFolder
from pixart.data.sprites import SPRITES, build_sprites
from pixart.diffusion import NoiseSchedule
from pixart.training import VAERecipe, load_recipe, train
from pixart.training.autoencoder import Autoencoder

PIXELS = 32
TEXT = PixArtConfig(
    input_size=8,
    in_channels=8,
    hidden_size=128,
    depth=4,
    num_heads=4,
    caption_channels=384,
    max_caption_tokens=20,
    learn_sigma=False,
)
FINER = replace(TEXT, input_size=16, pe_interpolation=2.0)
COMPRESSED = replace(
    FINER, kv_compression={"sampling": "conv", "scale_factor": 2, "layers": [2, 3]}
)
BATCH, LEARNING_RATE, WARM_UP = 32, 1e-3, 20
# spread over the schedule's middle, where scaled latents have the same noise at another timestep
TIMESTEPS = (120, 310, 500, 690, 880)
# latents of PixArt-Sigma's autoencoder with PixArt-alpha's scaling_factor
WRONG_SCALE = 0.18215 / 0.13025
SCHEDULE = NoiseSchedule()


@dataclass
class Pictures:
    """Latents of all pictures, (n, C, h, w), with what they are drawn from."""

    mean: Tensor
    std: Tensor
    caption: Tensor
    mask: Tensor
    label: Tensor
    scale: float = 1.0  # of these latents, over what they should be

    def condition(self, rows: Tensor, config: PixArtConfig) -> tuple[Tensor, ...]:
        if config.conditioning == "class":
            return (self.label[rows],)
        return self.caption[rows], self.mask[rows]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks transitions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=400, help="after each transition")
    parser.add_argument("--base-steps", type=int, default=1200, help="of the first stage")
    parser.add_argument("--vae-steps", type=int, default=800, help="of each autoencoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/cpu")
    arguments = parser.parse_args(argv)
    file = (arguments.output or RESULTS / "cpu") / "transitions.jsonl"
    about = environment(torch.device("cpu")) | {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder), arguments.vae_steps)
    rows: list[dict] = []
    for seed in arguments.seeds:
        busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
        found = run(data, arguments.base_steps, arguments.steps, seed)
        wall = time.perf_counter() - start
        foreign = (busy_seconds() - busy - (time.process_time() - own)) / wall
        spent = {"seconds": round(wall), "seed": seed, "foreign_cores": round(foreign, 2)}
        rows += [row | about | spent for row in found]
        write(file, rows)


def prepare(folder: Path, vae_steps: int) -> dict[str, Pictures]:
    """Sprites as latents: small, large, and small by another autoencoder, scaled right or not."""
    for pixels in (PIXELS, 2 * PIXELS):
        build_sprites(folder / str(pixels), pixels)
    kinds = [names[0].split("/")[0] for names, _ in SPRITES for _ in names]
    label = torch.tensor([sorted(set(kinds)).index(kind) for kind in kinds])
    encoder = TextEncoder.from_pretrained("minilm", max_tokens=TEXT.max_caption_tokens)

    def encoded(vae: VAE, pixels: int) -> Pictures:
        samples = list(ImageFolder(folder / str(pixels)))
        mean, std = vae.moments(torch.stack([sample.image for sample in samples]))
        caption, mask = encoder.encode([sample.caption for sample in samples])
        return Pictures(mean, std, caption.float(), mask, label)

    first, second = (_autoencoder(folder, vae_steps, seed) for seed in (0, 1))
    right = encoded(second, PIXELS)
    wrong = replace(
        right, mean=right.mean * WRONG_SCALE, std=right.std * WRONG_SCALE, scale=WRONG_SCALE
    )
    return {
        "small": encoded(first, PIXELS),
        "large": encoded(first, 2 * PIXELS),
        "other autoencoder": right,
        "other autoencoder, wrongly scaled": wrong,
    }


def _autoencoder(folder: Path, steps: int, seed: int) -> VAE:
    output = folder / f"vae-{seed}"
    paths = {"output": output, "images": folder / str(PIXELS)}
    numbers = {"steps": steps, "seed": seed, "checkpoint_every": steps, "samples_every": steps}
    changes = [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]
    changes += [f"{key}={value}" for key, value in numbers.items()]
    recipe = load_recipe(VAERecipe, "quickstart-vae", changes)
    train(recipe, lambda device: Autoencoder(recipe, device))
    return VAE.from_pretrained(output / "vae")


def run(data: dict[str, Pictures], base_steps: int, steps: int, seed: int) -> list[dict]:
    """The papers' way, with its wrong turns: a row for each model that was trained."""
    torch.manual_seed(seed)
    classes = replace(TEXT, conditioning="class", num_classes=int(data["small"].label.max()) + 1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rows: list[dict] = []
    with Progress(*columns, TimeElapsedColumn()) as progress:
        total = base_steps + 4 * 3 * steps + steps
        bar = progress.add_task("", total=total)

        def trained(model: PixArt, pictures: Pictures, steps: int, what: str) -> dict:
            progress.update(bar, description=what)
            at, errors = [0], [error_of(model, pictures)]
            for step, error in fit(model, pictures, steps, seed):
                progress.update(bar, advance=step - at[-1])
                at.append(step)
                errors.append(error)
            shown = "  ".join(f"{error:.3f}" for error in errors)
            progress.console.print(f"{what}: {shown}", highlight=False)
            return {"steps": at, "error": errors}

        def compare(name: str, before: float, starts: dict[str, tuple[PixArt, Pictures]]) -> float:
            """Trains each, in place; the last error of the first, which is the right one."""
            for start, (model, pictures) in starts.items():
                curve = trained(model, pictures, steps, f"{name}, {start}")
                rows.append({"transition": name, "start": start, "before": before, **curve})
            return rows[-len(starts)]["error"][-1]

        small, large = data["small"], data["large"]
        dit = PixArt(classes)
        before = trained(dit, small, base_steps, "on classes")["error"][-1]

        text, _ = grow(dit, TEXT)
        error = compare(
            "classes to text",
            before,
            {
                "grown: adaLN re-parameterised": (text, small),
                "wrong: adaLN-single fresh": (_fresh_modulation(text), small),
                "from scratch": (PixArt(TEXT), small),
            },
        )
        fine, _ = grow(text, FINER)
        unlike, _ = grow(text, replace(FINER, pe_interpolation=1.0))
        fine_error = compare(
            "32 to 64 pixels",
            error,
            {
                "grown: positions interpolated": (fine, large),
                "wrong: positions continued": (unlike, large),
                "from scratch": (PixArt(FINER), large),
            },
        )
        few, _ = grow(fine, COMPRESSED)
        compare(
            "keys and values compressed",
            fine_error,
            {
                "grown: averaging convolution": (few, large),
                "wrong: random convolution": (_random_convolution(few), large),
                "from scratch": (PixArt(COMPRESSED), large),
                "not compressed": (fine, large),
            },
        )
        kept, _ = grow(text, TEXT, vae_swap=True)
        compare(
            "another autoencoder",
            error,
            {
                "grown: weights kept": (kept, data["other autoencoder"]),
                f"wrong: scaled {WRONG_SCALE:.1f} times": (
                    copy.deepcopy(kept),
                    data["other autoencoder, wrongly scaled"],
                ),
                "from scratch": (PixArt(TEXT), data["other autoencoder"]),
            },
        )
    return rows


def _fresh_modulation(model: PixArt) -> PixArt:
    wrong, fresh = copy.deepcopy(model), PixArt(model.config)
    tables = {k: v for k, v in fresh.state_dict().items() if "scale_shift" in k or "t_block" in k}
    wrong.load_state_dict(tables, strict=False)
    return wrong


def _random_convolution(model: PixArt) -> PixArt:
    wrong = copy.deepcopy(model)
    for module in wrong.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.reset_parameters()
    return wrong


def fit(model: PixArt, pictures: Pictures, steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Trains a model; steps, at first often and then ever less, with the error after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    generator = torch.Generator().manual_seed(seed + 1)
    measured = {math.ceil(steps * (i / 8) ** 2) for i in range(1, 9)}
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / WARM_UP)
        rows = torch.randint(len(pictures.mean), (BATCH,), generator=generator)
        shape = (2, BATCH, *pictures.mean.shape[1:])
        first, noise = torch.randn(shape, generator=generator)
        t = torch.randint(len(SCHEDULE), (BATCH,), generator=generator)
        latents = pictures.mean[rows] + pictures.std[rows] * first
        noisy = SCHEDULE.add_noise(latents, noise, t)
        model.train()
        loss = F.mse_loss(model(noisy, t, *pictures.condition(rows, model.config)), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in measured:
            yield step, error_of(model, pictures)


@torch.no_grad()
def error_of(model: PixArt, pictures: Pictures) -> float:
    """Mean squared error of the noise that is predicted in every picture at a few noise levels.

    The levels are signal-to-noise ratios. Latents that are ``scale`` times what they should be
    have them at later timesteps, so that errors compare across scales.
    """
    model.eval()
    generator = torch.Generator().manual_seed(12345)
    rows, errors = torch.arange(len(pictures.mean)), []
    log_snr = (SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)).log().double()
    for level in TIMESTEPS:
        t = int((log_snr - log_snr[level] + 2 * torch.tensor(pictures.scale).log()).abs().argmin())
        noise = torch.randn(pictures.mean.shape, generator=generator)
        steps = torch.full((len(rows),), t)
        noisy = SCHEDULE.add_noise(pictures.mean, noise, steps)
        predicted = model(noisy, steps, *pictures.condition(rows, model.config))
        errors.append(F.mse_loss(predicted, noise).item())
    return sum(errors) / len(errors)
