"""Memory modes: the same pictures, with parts that take turns."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_pipeline import CONFIG, small_pipeline
from typer.testing import CliRunner

from pixart import PixArt
from pixart.cli import app
from pixart.conditioning import VAE, TextEncoder, tiling, vae
from pixart.generation import PixArtPipeline, pictures, placement
from pixart.generation.pipeline import to_image, to_pixels

PROMPTS = ["a red gem", "a robot walking", "two birds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pixart train` writes it, with the real MiniLM."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    model = PixArt(dataclasses.replace(CONFIG, caption_channels=384, max_caption_tokens=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "transformer")
    small_pipeline().vae.model.save_pretrained(folder / "vae")
    parts = {"vae": "vae", "text_encoder": "minilm"}
    (folder / "pipeline.json").write_text(json.dumps(parts))
    return folder


def drawn(pipeline: PixArtPipeline, **settings) -> list[Image.Image]:
    photo = to_image(torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(8)) * 2 - 1)
    encoded = pipeline.encode(PROMPTS, "bad art")
    return [
        *pipeline(encoded, height=20, width=12, steps=2, batch_size=2, **settings),
        *pipeline(PROMPTS[:1], image=photo, steps=3, **settings),
    ]


def test_every_mode_draws_the_same_bits(folder: Path) -> None:
    high, low, auto = (
        drawn(PixArtPipeline.from_pretrained(folder, memory=memory))
        for memory in ("high", "low", "auto")
    )
    for a, b, c in zip(high, low, auto, strict=True):
        assert a.tobytes() == b.tobytes() == c.tobytes()


def test_tiles_of_large_pictures_change_no_more_than_rounding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    high = drawn(PixArtPipeline.from_pretrained(folder, memory="high"))
    calls: list[str] = []
    for name in ("decode", "encode"):
        whole = getattr(tiling, name)
        monkeypatch.setattr(tiling, name, lambda *a, f=whole, n=name: (calls.append(n), f(*a))[1])
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 100)
    monkeypatch.setattr(tiling, "TILE", 8)
    low = drawn(PixArtPipeline.from_pretrained(folder, memory="low"))
    assert calls == ["decode"] * 3 + ["encode", "decode"]
    for a, b in zip(high, low, strict=True):
        # at most one of 255 steps
        assert (to_pixels(a) - to_pixels(b)).abs().max() < 1.5 / 127.5


def test_what_would_not_fit_is_tiled_in_any_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = small_pipeline()
    asked: list[bool] = []
    for name in ("decode", "encode"):
        whole = getattr(pipeline.vae, name)
        monkeypatch.setattr(
            pipeline.vae,
            name,
            lambda z, f=whole, *, tiled: asked.append(tiled) or f(z, tiled=tiled),
        )
    image = Image.new("RGB", (20, 12))
    needed = pipeline.vae.decoding_bytes(12, 20)
    for free, tiled in ((2 * needed, False), (needed, True)):
        monkeypatch.setattr(placement, "free_bytes", lambda device, free=free: free)
        pipeline(["a cat"], image=image, steps=2)
        assert asked == [tiled] * 2
        asked.clear()


def test_parts_take_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = PixArtPipeline.from_pretrained(folder, memory="low")
    moves: list[str] = []
    for part in (pipeline.model, pipeline.vae):
        to = part.to
        monkeypatch.setattr(
            part, "to", lambda where, to=to, part=part: moves.append(part) or to(where)
        )
    loaded: list[weakref.ref] = []
    load = pipeline._load_text_encoder

    def loading() -> TextEncoder:
        # whose hooks and modules refer to each other
        encoder = load().offload("cpu")
        loaded.append(weakref.ref(encoder.model))
        return encoder

    pipeline._load_text_encoder = loading
    identity = pipeline.identity
    encoded = pipeline.encode(PROMPTS)
    assert len(loaded) == 1 and loaded[0]() is not None

    def while_drawing(done: int, total: int) -> None:
        moves.append("step")
        assert loaded[0]() is None

    pipeline(encoded, steps=2, callback=while_drawing)
    assert moves == [pipeline.model, "step", "step", pipeline.model, pipeline.vae, pipeline.vae]
    # which encoder it is, is known without loading it again
    assert pipeline.identity == identity and len(loaded) == 1
    pipeline(PROMPTS[:1], steps=1)
    assert len(loaded) == 2
    moves.clear()
    with pytest.raises(ZeroDivisionError):
        pipeline(encoded, steps=2, callback=lambda *_: 1 / 0)
    assert moves == [pipeline.model] * 2


def test_one_loading_of_the_text_encoder_serves_many_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {}
    for memory, loadings in (("high", 0), ("low", 2)):
        pipeline = PixArtPipeline.from_pretrained(folder, memory=memory)
        count: list[int] = []
        whole = TextEncoder.from_pretrained
        monkeypatch.setattr(
            TextEncoder,
            "from_pretrained",
            lambda *a, f=whole, c=count, **k: c.append(1) or f(*a, **k),
        )
        monkeypatch.setattr(pictures, "ENCODED_AT_ONCE", 4)
        requests = [pictures.Request(prompt=f"{n} birds", height=8 + 4 * (n % 2)) for n in range(6)]
        todo = pictures.resolve(requests, pipeline, steps=1)
        paths[memory] = pictures.draw(pipeline, todo, tmp_path / memory, batch_size=2)
        monkeypatch.setattr(TextEncoder, "from_pretrained", whole)
        assert len(count) == loadings
    for a, b in zip(paths["high"], paths["low"], strict=True):
        # the name holds a digest of all that decides the picture
        assert a.name == b.name
        assert a.read_bytes() == b.read_bytes()


def test_one_loading_serves_many_settings(folder: Path, tmp_path: Path) -> None:
    pipeline = PixArtPipeline.from_pretrained(folder, memory="low")
    load, loadings = pipeline._load_text_encoder, []
    pipeline._load_text_encoder = lambda: loadings.append(1) or load()
    requests = [pictures.Request(prompt=f"{n} birds", steps=n) for n in range(1, 13)]
    todo = pictures.resolve(requests, pipeline, guidance_scale=1.0)
    pictures.draw(pipeline, todo, tmp_path)
    assert len(loadings) == 1
    # nor does it stay for pictures that are there
    again = PixArtPipeline.from_pretrained(folder, memory="low")
    pictures.draw(again, todo, tmp_path)
    assert again._text_encoder is None


def test_auto_is_high_for_cuda_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "choose", lambda *_: "low")
    # which are refused for another reason here
    with pytest.raises(ValueError, match="`cuda_graphs` is True for a model on cpu"):
        PixArtPipeline.from_pretrained(folder, cuda_graphs=True)
    monkeypatch.setattr(PixArtPipeline, "__init__", lambda *_, memory, **__: said.append(memory))
    said: list[str] = []
    PixArtPipeline.from_pretrained(folder, cuda_graphs=True)
    assert said == ["high"]


def test_a_text_encoder_is_streamed_to_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed: list[torch.device] = []
    monkeypatch.setattr(
        TextEncoder, "offload", lambda encoder, device: streamed.append(device) or encoder
    )
    pipeline = PixArtPipeline.from_pretrained(folder, memory="low", device="cuda")
    assert next(pipeline.model.parameters()).device.type == pipeline.vae.device.type == "cpu"
    assert pipeline.text_encoder.device.type == "cpu"
    assert streamed == [torch.device("cuda")]
    # elsewhere its weights are in the host's memory already
    assert PixArtPipeline.from_pretrained(folder, memory="low").text_encoder is not None
    assert len(streamed) == 1
    # and 8 bits cannot leave the device
    loaded: list[dict] = []
    monkeypatch.setattr(TextEncoder, "from_pretrained", lambda *_, **how: loaded.append(how))
    settings = {"memory": "low", "device": "cuda", "text_8bit": True}
    assert PixArtPipeline.from_pretrained(folder, **settings).text_encoder is None
    assert (loaded[0]["device"], loaded[0]["in_8bit"]) == (torch.device("cuda"), True)


@pytest.mark.parametrize("mode", ["high", "low"])
def test_auto_asks_the_device(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = small_pipeline()
    pipeline.model.to("meta")
    # the autoencoder is there already
    weights = sum(p.nbytes for p in pipeline.model.parameters())
    needed = weights + 1000 + 3 * 8 * 16 * 16 * 4
    # 9 bytes in 10 may be used
    free = -(-needed * 10 // 9) + 1
    monkeypatch.setattr(
        placement, "free_bytes", lambda device: free if mode == "high" else free - 3
    )
    with caplog.at_level(logging.INFO, "pixart"):
        device = torch.device("cpu")
        assert placement.choose(pipeline.model, pipeline.vae, 1000, device) == mode
    (line,) = caplog.messages
    assert line.startswith(f"memory: {mode}, because ")
    assert all(part in line for part in ("text encoder", "transformer", "decoding 16x16", "on cpu"))


@pytest.mark.parametrize("in_8bit", [False, True], ids=["", "8bit"])
def test_auto_counts_the_text_encoder_before_it_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, in_8bit: bool
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(placement, "choose", lambda *of: asked.append(of[2]) or "low")
    monkeypatch.setattr(TextEncoder, "from_pretrained", None)
    pipeline = PixArtPipeline.from_pretrained(folder, text_8bit=in_8bit)
    assert (pipeline.memory, asked) == (
        "low",
        [TextEncoder.weight_bytes("minilm", in_8bit=in_8bit)],
    )


def test_what_is_free_is_free() -> None:
    free = placement.free_bytes(torch.device("cpu"))
    assert 2**20 < free < 2**50


def test_modes_are_these(folder: Path) -> None:
    with pytest.raises(ValueError, match="`memory` is 'medium'; accepted: auto, low, high"):
        PixArtPipeline.from_pretrained(folder, memory="medium")
    with pytest.raises(ValueError, match='`cuda_graphs` is True with `memory` "low"'):
        PixArtPipeline(PixArt(CONFIG), VAE(small_pipeline().vae.model), None, cuda_graphs=True,
                       device="cuda", memory="low")  # fmt: skip


@pytest.mark.parametrize("memory", ["high", "low"])
def test_the_command_names_the_words_that_are_lost(
    folder: Path, tmp_path: Path, memory: str
) -> None:
    long = "a red gem on a table beside an astronaut"
    arguments = ["generate", folder, long, long, "a gem", "--steps", 1, "--memory", memory,
                 "--device", "cpu", "-o", tmp_path / memory]  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exception is None
    cuts = [str(warning.message) for warning in said if "caption cut" in str(warning.message)]
    assert cuts == ["caption cut at max_tokens=8 (it has 11 tokens); lost: 'beside an astronaut'"]
    assert len(list((tmp_path / memory).glob("a-*.png"))) == 3
