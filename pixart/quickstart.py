"""The library's main job in miniature, offline: from sprites to pictures of prompts.

Builds a captioned data set, trains a small autoencoder, caches features, trains a small PixArt
with the trainer and recipe format of the large ones, draws every caption, and measures how many
pictures show what their prompt says.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from pixart.conditioning import FeatureCache
from pixart.data.sprites import build_sprites
from pixart.evaluation import Retrieval, plot_loss, prompt_retrieval
from pixart.files import write_atomically
from pixart.generation import PixArtPipeline, contact_sheet
from pixart.generation.pipeline import to_pixels
from pixart.training import TrainRecipe, VAERecipe, load_recipe, train
from pixart.training.autoencoder import Autoencoder
from pixart.training.text_to_image import TextToImage, encode_images

# pictures drawn of each caption for the measurement; the sheet shows the first
DRAWS = 2


def quickstart(
    folder: Path, *, seed: int = 0, vae_steps: int | None = None, steps: int | None = None
) -> Retrieval:
    """Runs everything into ``folder``, continuing where an earlier call was interrupted.

    Writes ``samples.png`` (pictures over their prompts), ``loss.png`` and ``report.json``.
    ``seed`` is that of both trainings. ``vae_steps`` and ``steps`` shorten them; None takes the
    recipes'.
    """
    console, began = Console(), time.perf_counter()
    seconds: dict[str, float] = {}

    def done(stage: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[stage], began = now - began, now

    images = folder / "images"
    count = build_sprites(images)
    console.print(f"[bold]1/4[/bold] {count} captioned pictures in {images}")
    done("images")

    paths = [
        f"output={_text(folder / 'vae')}",
        f"images={_text(images)}",
        f"seed={seed}",
    ]
    changes = paths if vae_steps is None else [*paths, f"steps={vae_steps}"]
    vae_recipe = load_recipe(VAERecipe, "quickstart-vae", changes)
    console.print(f"[bold]2/4[/bold] training the autoencoder: {vae_recipe.steps} steps")
    train(vae_recipe, lambda device: Autoencoder(vae_recipe, device))
    done("autoencoder")

    paths = [
        f"output={_text(folder / 'model')}",
        f"seed={seed}",
        f"data.features={_text(folder / 'features')}",
        f"data.images={_text(images)}",
        f"data.vae={_text(folder / 'vae' / 'vae')}",
    ]
    changes = paths if steps is None else [*paths, f"steps={steps}"]
    recipe = load_recipe(TrainRecipe, "quickstart", changes)
    console.print(f"[bold]3/4[/bold] training PixArt: {recipe.steps} steps")
    run = train(recipe, lambda device: TextToImage(recipe, device))
    plot_loss(run.read_log(), folder / "loss.png", "PixArt on sprites")
    done("transformer")

    console.print("[bold]4/4[/bold] drawing every caption")
    result = _draw_and_measure(folder, recipe)
    done("drawing")
    report = {
        **dataclasses.asdict(result),
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
    }
    text = json.dumps(report, indent=2)
    write_atomically(folder / "report.json", lambda file: file.write(text.encode()))
    console.print(
        f"prompt retrieval [bold]{result.retrieval:.1%}[/bold] over {result.captions} captions "
        f"(shuffled prompts {result.control:.1%}, chance {result.chance:.1%})\n"
        f"pictures: {folder / 'samples.png'}\n"
        f'draw more: pixart generate {folder / "model" / "pipeline"} "a red gem"'
    )
    return result


def _text(path: Path) -> str:
    """A path as YAML text, whatever characters it has."""
    return json.dumps(str(path))


def _draw_and_measure(folder: Path, recipe: TrainRecipe) -> Retrieval:
    pipeline = PixArtPipeline.from_pretrained(folder / "model" / "pipeline")
    cache = FeatureCache(folder / "features")
    rows = encode_images(recipe.data, recipe.config, torch.device("cpu"))  # all are there
    training = [cache[i] for i in rows]
    captions = [sample["text"] for sample in training]
    prompts = sorted(set(captions))
    samples = recipe.samples
    with Progress() as progress:
        bar = progress.add_task("drawing", total=None)
        drawn = pipeline(
            prompts * DRAWS,
            seed=recipe.seed + 1,
            steps=samples.steps,
            sampler=samples.sampler,
            guidance_scale=samples.guidance_scale,
            guidance_mask=samples.guidance_mask,
            batch_size=32,
            callback=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    sheet = contact_sheet(drawn[: len(prompts)], prompts)
    write_atomically(folder / "samples.png", lambda file: sheet.save(file, "PNG"))
    latents = torch.stack([sample["latent_mean"] for sample in training]).float()
    # what a viewer gets, 8-bit pictures, and not the latents that they were decoded from
    drawn_latents = pipeline.vae.encode(torch.stack([to_pixels(image) for image in drawn]))
    return prompt_retrieval(drawn_latents, prompts * DRAWS, latents, captions)
