"""A ControlNet trains on pictures beside others, and says where things are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from small_runs import MODEL, log, recipe

from pixart import PixArt, PixArtConfig
from pixart.conditioning import VAE, CacheMetadata, CacheWriter
from pixart.controlnet import ControlledPixArt
from pixart.generation import PixArtPipeline, Prompts
from pixart.generation.pipeline import to_image, to_pixels
from pixart.training import TrainRecipe, train
from pixart.training.control import ControlledTextToImage

COUNT = 8
BASE = {**MODEL, "input_size": 8, "learn_sigma": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents that are those of the control image, which no caption tells of."""
    folder = tmp_path_factory.mktemp("control")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    (folder / "edges" / "sub").mkdir(parents=True)
    for i in range(COUNT):
        noise = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8)
        picture = Image.fromarray(noise.numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        picture.save(folder / "edges" / "sub" / f"{i}.png")
    vae = VAE.from_pretrained(folder / "vae")
    write_features(folder / "features", [f"sub/{i}.jpg" for i in range(COUNT)], vae, folder)
    base = PixArt(PixArtConfig(**BASE))
    torch.nn.init.normal_(base.final_layer.linear.weight, std=0.2)
    base.save_pretrained(folder / "base")
    return folder


def write_features(to: Path, keys: list[str], vae: VAE, folder: Path, size: int = 8) -> None:
    metadata = CacheMetadata("text", vae.identity, "float16", 5, 6, 4)
    with CacheWriter(to, metadata, torch.zeros(5, 6), 1) as writer:
        for key in keys:
            path = folder / "edges" / Path(key).with_suffix(".png")
            latents = torch.zeros(4, 8, 8)
            if path.is_file():
                pixels = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8)
                pixels = pixels.view(1, 16, 16, 3).permute(0, 3, 1, 2) / 127.5 - 1
                latents = vae.encode(pixels)[0]
            latents = latents[:, :size]
            writer.add(
                key=key,
                text=key,
                caption=torch.zeros(2, 6),
                latent_mean=latents,
                latent_std=torch.zeros_like(latents),
                image_size=(16, 16),
            )


def controlling(folder: Path, name: str, **changes: object) -> TrainRecipe:
    control = {
        "images": str(folder / "edges"),
        "features": str(folder / name / "edges"),
        "copies": 1,
    }
    values = {
        "model": {**BASE, "init": str(folder / "base")},
        "data": {"features": str(folder / "features"), "size": 16, "vae": str(folder / "vae")},
        "control": control,
        "schedule": {"name": "constant", "warmup_steps": 0},
        **changes,
    }
    return recipe(folder / name / "run", folder / "features", **values)


def test_it_learns_where_things_are_and_resumes(folder: Path) -> None:
    torch.manual_seed(3)
    latents = dict(enumerate(torch.randn(COUNT, 4, 8, 8)))
    for name in ("seen", "seen-controls"):
        metadata = CacheMetadata("text", "vae", "float16", 5, 6, 4)
        with CacheWriter(folder / name, metadata, torch.zeros(5, 6), 1) as writer:
            for i, mean in latents.items():
                writer.add(
                    key=f"{i}.png",
                    text="one caption for all",
                    caption=torch.zeros(2, 6),
                    latent_mean=mean,
                    latent_std=torch.zeros_like(mean),
                    image_size=(16, 16),
                )
    longer = {
        "steps": 120,
        "optimizer": {"lr": 1e-2},
        "ema_decay": 0.9,
        "checkpoint_every": 110,
        "data": {"features": str(folder / "seen")},
        "control": {"features": str(folder / "seen-controls"), "copies": 1},
    }
    made = controlling(folder, "whole", **longer)
    train(made, lambda device: ControlledTextToImage(made, device))
    base = PixArt.from_pretrained(folder / "base")
    task = ControlledTextToImage(made, torch.device("cpu"))
    batch = task.collate([task.dataset[i] for i in range(COUNT)])
    trained = ControlledPixArt.from_pretrained(base, made.output / "controlnet").eval()

    @torch.no_grad()
    def loss(model: torch.nn.Module, controls: torch.Tensor) -> float:
        torch.manual_seed(0)
        return task.loss(model, {**batch, "control": controls})["mse"].item()

    right = loss(trained, batch["control"])
    before = loss(task.module.eval(), batch["control"])
    assert right < 0.5 * before
    assert right < 0.9 * loss(trained, batch["control"].roll(1, 0))

    broken = controlling(folder, "broken", **{**longer, "steps": 3})
    train(broken, lambda device: ControlledTextToImage(broken, device))
    longer_run = broken.model_copy(update={"steps": 6})
    train(longer_run, lambda device: ControlledTextToImage(longer_run, device))
    assert log(broken.output) == log(made.output)[:6]
    (file,) = (broken.output / "checkpoints").glob("*6/*.safetensors")
    assert not any(name.startswith("model.base_model.blocks") for name in load_file(file))


def test_previews_are_what_the_exported_controlnet_draws(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {"every": 1, "steps": 2, "guidance_scale": 2.0}
    made = controlling(folder, "previews", steps=1, samples=samples)
    train(made, lambda device: ControlledTextToImage(made, device))
    assert (made.output / "samples" / "step-0000001.png").is_file()

    task = ControlledTextToImage(made, torch.device("cpu"))
    # each sample beside the next one's control
    task.dataset.rows = [*task.dataset.rows[1:], task.dataset.rows[0]]
    for parameter in task.module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    shown: list[Image.Image] = []
    texts: list[str] = []

    def sheet(pictures: list[Image.Image], names: list[str], columns: int) -> None:
        shown.extend(pictures)
        texts.extend(names)

    monkeypatch.setattr("pixart.training.control.contact_sheet", sheet)
    task.preview(task.module)
    captions = [f"sub/{i}.jpg" for i in range(COUNT)]
    assert texts == [text for caption in captions for text in ("control", caption, "original")]

    task.export(task.module, folder / "previews")
    vae = VAE.from_pretrained(folder / "vae")
    pipeline = PixArtPipeline(task.module.base_model, vae, None)
    files = [folder / "edges" / "sub" / f"{i}.png" for i in range(COUNT)]
    decoded = [to_image(vae.decode(vae.encode(to_pixels(Image.open(f))[None]))[0]) for f in files]
    caption, mask = torch.zeros(1, 2, 6), torch.ones(1, 2)
    for i, (control, drawn, original) in enumerate(zip(*[iter(shown)] * 3, strict=True)):
        edges = (i + 1) % COUNT
        assert difference(control, decoded[edges]) < 2
        assert difference(original, decoded[i]) < 2
        prompts = Prompts([captions[i]], caption, mask, "", caption[0], mask[0])
        pipeline.draw_along(folder / "previews" / "controlnet", Image.open(files[edges]))
        (expected,) = pipeline(prompts, seed=i, steps=2, guidance_scale=2.0)
        assert difference(drawn, expected) < 0.1


def difference(a: Image.Image, b: Image.Image) -> float:
    return 127.5 * (to_pixels(a) - to_pixels(b)).abs().mean().item()


def test_control_images_are_encoded_once_and_found_by_name(folder: Path) -> None:
    made = controlling(folder, "encoded")
    task = ControlledTextToImage(made, torch.device("cpu"))
    for i in range(COUNT):
        sample = task.dataset[i]
        torch.testing.assert_close(
            sample["control"], sample["latent_mean"].float(), atol=1e-2, rtol=0
        )
    files = {p: p.stat().st_mtime_ns for p in made.control.features.iterdir()}
    ControlledTextToImage(made, torch.device("cpu"))
    assert {p: p.stat().st_mtime_ns for p in made.control.features.iterdir()} == files


@pytest.mark.parametrize(
    ("keys", "size", "message"),
    [
        (["sub/0.jpg", "sub/99.jpg"], 8, r"1 of 2 images have no control image \(sub/99\)"),
        (["sub/0.jpg"], 6, r"0 of 1 images have no control image \(\), 1 one of another size"),
    ],
    ids=["missing", "size"],
)
def test_images_without_their_control_are_named(
    folder: Path, tmp_path: Path, keys: list[str], size: int, message: str
) -> None:
    write_features(tmp_path / "features", keys, VAE.from_pretrained(folder / "vae"), folder, size)
    made = controlling(folder, "unmatched")
    data = made.data.model_copy(update={"features": tmp_path / "features"})
    with pytest.raises(ValueError, match=message):
        ControlledTextToImage(made.model_copy(update={"data": data}), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {}}, "control: .*goes without lora"),
        ({"samples": {"prompts": ["a"]}}, "control: .*captions of the data are drawn"),
        ({"parallel": {"sequence": 2}}, "control: .*parallel.sequence 1"),
        ({"model": BASE}, "control: .*model.init"),
        ({"control": {"images": "x"}}, "control.features: required"),
    ],
    ids=["lora", "samples", "sequence", "base", "features"],
)
def test_wrong_settings_are_named(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controlling(folder, "wrong", **changes)
