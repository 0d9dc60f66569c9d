"""Drawing pictures with guidance, beside diffusers' pipeline: ``python -m benchmarks generation``.

The same weights, noise, texts and solver for all; the weights are random, on which speed does not
depend. On a CPU small models in float32; on a GPU XL/2 in bf16, 512 to 4096px. Each way to draw has
a process of its own with empty caches: its first picture shows all that it compiles, captures or
compares with itself, and the memory is its alone. The latents of that picture are held against a
more exact model's; then the processes take turns, picture by picture.
Writes ``benchmarks/results/<device>/generation.jsonl``; ``--resume`` goes on from there.

``set_attention_backend`` and ``compile_repeated_blocks`` of diffusers do not know PixArt: "fastest
SDPA" tries the backends of PyTorch's attention, and "compiled blocks" compiles each block.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import Connection
from typing import Any

import diffusers
import numpy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pixart_kernels as pk
from benchmarks.block import only
from benchmarks.cases import command
from benchmarks.model import LEAST, MAY_ERR, STOCK, models
from benchmarks.providers import in_short
from benchmarks.timing import measure
from pixart import PixArt, PixArtConfig, presets
from pixart.conditioning import VAE
from pixart.diffusion import NoiseSchedule, sample
from pixart.generation import PixArtPipeline, Prompts
from pixart.generation.pipeline import to_image
from pixart_kernels import dispatch

EXACT = "exact"
GUIDANCE_SCALE = 4.5
LENGTHS = (120, 20)  # real tokens of the texts, in turn; the negative prompt is empty, so one
SECONDS = {"cpu": 120.0, "cuda": 240.0}  # that a case needs, most of them to compile
FIRST = 100.0  # seconds that each may take to start or for any picture, whatever is left
MEASURING = 60.0  # seconds, of which a machine that is quiet needs less
PROCESSES: Any = torch.multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class GenerationCase:
    name: str
    config: PixArtConfig
    batch: int
    steps: int
    text: int

    def about(self) -> dict:
        tokens = (self.config.input_size // self.config.patch_size) ** 2
        return {
            **{"model": self.name, "pixels": 8 * self.config.input_size, "steps": self.steps},
            **{"shape": [self.batch, tokens, self.config.hidden_size], "text": self.text},
        }

    def noise(self) -> Tensor:
        """That of the seeds 0, 1, ..., as the pipeline draws it."""
        shape = (1, self.config.in_channels, *[self.config.input_size] * 2)
        generators = (torch.Generator().manual_seed(seed) for seed in range(self.batch))
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators])

    def prompts(self, dtype: torch.dtype) -> Prompts:
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch + 1, self.text, self.config.caption_channels)
        *texts, null = torch.randn(shape, generator=generator).to(dtype)
        lengths = torch.tensor([*islice(cycle(LENGTHS), self.batch), 1])
        *masks, null_mask = torch.arange(self.text) < lengths.clamp(max=self.text)[:, None]
        return Prompts(
            [""] * self.batch, torch.stack(texts), torch.stack(masks), "", null, null_mask
        )


def cases(kind: str) -> list[GenerationCase]:
    """The most important first."""
    if kind == "cpu":
        wide = PixArtConfig(depth=4, hidden_size=384, num_heads=6, max_caption_tokens=120)
        large = replace(wide, input_size=64, pe_interpolation=1.0)
        return [
            GenerationCase("depth 4, width 384", config, batch, steps, 120)
            for config, batch, steps in ((wide, 1, 20), (large, 1, 10), (wide, 4, 10))
        ]
    found = []
    # where a picture takes many seconds, fewer steps of it tell as much
    for pixels, batch, steps in (
        *((1024, 1, 20), (512, 1, 20), (2048, 1, 10), (4096, 1, 2)),
        # eight of 4096px would need minutes for each turn
        *((1024, 8, 10), (512, 8, 20), (2048, 8, 2)),
    ):
        # no weights for 4096px were published: those of 2048px, with its positions closer
        config = presets[{512: "sigma-512", 1024: "sigma-1024"}.get(pixels, "sigma-2k")]
        config = replace(config, input_size=pixels // 8, pe_interpolation=pixels / 512)
        found.append(GenerationCase("XL/2", config, batch, steps, 300))
    return found


Draw = Callable[[], Tensor]


@dataclass
class Parts:
    """What a process has on the device before its clock starts."""

    case: GenerationCase
    ours: PixArt
    stock: nn.Module
    vae: Any
    prompts: Prompts
    noise: Tensor

    @classmethod
    def of(cls, case: GenerationCase, device: torch.device, dtype: torch.dtype) -> Parts:
        ours, stock = models(case.config, device, dtype)
        # Stable Diffusion's autoencoder, whose weights all PixArts share; small on a CPU
        channels = (128, 256, 512, 512) if device.type == "cuda" else (8, 8, 8, 8)
        vae: Any = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=min(32, channels[0]),
            sample_size=1024,
        )
        vae.to(device, dtype).eval().requires_grad_(False)
        noise = case.noise().to(device, dtype)
        return cls(case, ours.eval(), stock.eval(), vae, case.prompts(dtype), noise)

    def pipeline(self) -> PixArtSigmaPipeline:
        betas = NoiseSchedule().betas.tolist()
        scheduler = DPMSolverMultistepScheduler(trained_betas=betas)
        parts: Any = {"vae": self.vae, "transformer": self.stock, "scheduler": scheduler}
        pipeline = PixArtSigmaPipeline(tokenizer=None, text_encoder=None, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def stock_draw(self, pipeline: PixArtSigmaPipeline | None = None) -> Draw:
        pipeline = pipeline or self.pipeline()
        device, prompts = self.noise.device, self.prompts
        pixels = 8 * self.case.config.input_size

        def of_all(negative: Tensor) -> Tensor:
            return negative.to(device).expand(len(prompts), *negative.shape)

        arguments: Any = {
            **{"prompt": None, "negative_prompt": None, "output_type": "latent"},
            **{"prompt_embeds": prompts.caption.to(device)},
            **{"prompt_attention_mask": prompts.mask.to(device)},
            **{"negative_prompt_embeds": of_all(prompts.null_caption)},
            **{"negative_prompt_attention_mask": of_all(prompts.null_mask)},
            **{"height": pixels, "width": pixels, "use_resolution_binning": False},
            **{"num_inference_steps": self.case.steps, "guidance_scale": GUIDANCE_SCALE},
        }
        return lambda: pipeline(latents=self.noise.clone(), **arguments).images

    def our_draw(self, cuda_graphs: bool = False) -> Draw:
        pipeline = PixArtPipeline(self.ours, VAE(self.vae), None, cuda_graphs=cuda_graphs)
        size = self.case.config.input_size

        def draw() -> Tensor:
            (latents,) = pipeline.draw_latents(
                self.prompts,
                (size, size),
                seeds=range(self.case.batch),
                steps=self.case.steps,
                sampler="dpm-solver++",
                guidance_scale=GUIDANCE_SCALE,
                guidance_mask="diffusers",
                batch_size=self.case.batch,
            )
            return latents

        return draw

    def decode(self, name: str, latents: Tensor) -> list[Image.Image]:
        """As the pipeline of that way does; both in tiles above 1024px."""
        if name.startswith("ours"):
            return [to_image(pixels) for pixels in VAE(self.vae).decode(latents, tiled=True)]
        pipeline: Any = self.pipeline()
        vae = pipeline.vae
        vae.enable_slicing()
        vae.enable_tiling()
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return pipeline.image_processor.postprocess(pixels)

    def exact_draw(self) -> Draw:
        """In float64 or, where that would take too long, float32."""
        device = self.noise.device
        exactly = torch.float64 if device.type == "cpu" else torch.float32
        torch.set_float32_matmul_precision("high")  # TF32, beside which bf16 is coarse
        model = self.ours.to(exactly)
        prompts = self.prompts
        return lambda: sample(
            model,
            self.noise.to(exactly),
            prompts.caption.to(device, exactly),
            prompts.mask.to(device),
            null_caption=prompts.null_caption.to(device, exactly),
            null_mask=prompts.null_mask.to(device),
            steps=self.case.steps,
            guidance_scale=GUIDANCE_SCALE,
            guidance_mask="diffusers",
        )


def kernels(x: Tensor) -> AbstractContextManager:
    """``auto``, on a GPU as it will choose once all kernels are verified."""
    if x.device.type == "cpu":
        return pk.use_backend("auto")
    able = [b for b in ("cuda", "triton") if dispatch.why_not("adaln_single", b, x) is None]
    if not able:
        raise RuntimeError(str(dispatch.why_not("adaln_single", "triton", x)))
    return only(*able)


def _within(context: Callable[[], AbstractContextManager], draw: Draw) -> Draw:
    def within() -> Tensor:
        with context():
            return draw()

    return within


def _compiled_blocks(parts: Parts) -> Draw:
    for block in parts.stock.transformer_blocks:
        block.compile(dynamic=False)
    return parts.stock_draw()


def _compiled(parts: Parts, mode: str | None = None) -> Draw:
    parts.stock.compile(dynamic=False, mode=mode)
    return parts.stock_draw()


def _fastest_sdpa(parts: Parts) -> Draw:
    """With the backend that is the fastest for these pictures' self-attention."""
    config, batch = parts.case.config, 2 * parts.case.batch
    tokens, heads = (config.input_size // config.patch_size) ** 2, config.num_heads
    q = parts.noise.new_zeros(batch, tokens, heads, config.hidden_size // heads).transpose(1, 2)
    backends = [
        *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
        *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    ]

    def seconds(backend: SDPBackend) -> float:
        try:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, q, q)
                torch.cuda.synchronize()
                start = time.perf_counter()
                F.scaled_dot_product_attention(q, q, q)
                torch.cuda.synchronize()
                return time.perf_counter() - start
        except RuntimeError:
            return float("inf")

    # the others for what it cannot do, as masks; the last one would need memory it has not
    order = sorted(backends[:-1], key=seconds) + backends[-1:]
    print(f"fastest SDPA: {order[0].name}", flush=True)
    return _within(partial(sdpa_kernel, order, set_priority=True), parts.stock_draw())


def _patched(parts: Parts) -> Draw:
    pipeline = parts.pipeline()
    with kernels(parts.noise):
        pk.patch(pipeline)
    return _within(partial(kernels, parts.noise), parts.stock_draw(pipeline))


def _ours(parts: Parts, cuda_graphs: bool = False) -> Draw:
    return _within(partial(kernels, parts.noise), parts.our_draw(cuda_graphs))


# those of diffusers first, of which the first is what all are compared with
VARIANTS: dict[str, Callable[[Parts], Draw]] = {
    STOCK: Parts.stock_draw,
    f"{STOCK}, fastest SDPA": _fastest_sdpa,
    f"{STOCK}, pk.patch": _patched,
    "ours": _ours,
    "ours, graph": partial(_ours, cuda_graphs=True),
    f"{STOCK}, compiled blocks": _compiled_blocks,
    f"{STOCK}, compiled": _compiled,
    f"{STOCK}, max-autotune": partial(_compiled, mode="max-autotune"),
}
OF_GPUS = (f"{STOCK}, fastest SDPA", "ours, graph", f"{STOCK}, max-autotune")


def variants(kind: str) -> list[str]:
    return [name for name in VARIANTS if kind == "cuda" or name not in OF_GPUS]


@torch.no_grad()
def serve(
    connection: Connection,
    case: GenerationCase,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
) -> None:
    """A process: says that it is ready, then draws whenever it is told to, until told not to."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def peak() -> int | None:
        """Of bytes since the last time."""
        if device.type == "cpu":
            return None
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def leave_room() -> None:
        """For the other processes; where there is enough, giving back would only cost time."""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            if free < total / 2:
                torch.cuda.empty_cache()

    def reply(**found: object) -> None:
        connection.send({"cpu_seconds": time.process_time(), **found})

    diffusers.utils.logging.set_verbosity_error()  # it warns of casting no module
    torch.set_num_threads(threads)
    # beyond the limit torch would go on in eager mode, and be timed as if compiled
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = cache
        try:
            parts = Parts.of(case, device, dtype)
            wait()
            reply()
            if not connection.recv():
                return
            peak()
            if name == EXACT:
                reply(latents=parts.exact_draw()().double().cpu().numpy())
                return
            start = time.perf_counter()
            draw = VARIANTS[name](parts)
            latents = draw()
            peaks = {"peak_bytes": peak()}
            parts.decode(name, latents)
            wait()
            seconds = time.perf_counter() - start
            peaks["decoding_peak_bytes"] = peak()
            leave_room()
            reply(seconds=seconds, **peaks, latents=latents.double().cpu().numpy())
            while connection.recv():
                draw()
                wait()
                leave_room()
                reply()
        # parts of it may not run here, which is a finding
        except Exception as error:
            reply(error=in_short(error))


class NoPicture(RuntimeError):
    """A process could not draw, or not in time."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class Worker:
    """A process that draws, seen from outside."""

    def __init__(self, name: str, *arguments: object) -> None:
        self.name = name
        self.connection, theirs = PROCESSES.Pipe()
        case, *rest = arguments
        self.process = PROCESSES.Process(target=serve, args=(theirs, case, name, *rest))
        self.process.start()
        # so that a process which dies is noticed
        theirs.close()
        self.cpu_seconds = 0.0

    def answer(self, seconds: float) -> dict:
        """Raises NoPicture where there is an error instead, or nothing."""
        try:
            if not self.connection.poll(seconds):
                raise NoPicture(self.name, f"no answer within {seconds:.0f} s")
            found = self.connection.recv()
        except (EOFError, OSError):
            raise NoPicture(self.name, "its process ended") from None
        self.cpu_seconds = found["cpu_seconds"]
        if "error" in found:
            raise NoPicture(self.name, found["error"])
        return found

    def draw(self, seconds: float = FIRST) -> dict:
        # where it has ended, the answer says so
        with contextlib.suppress(OSError):
            self.connection.send(True)
        return self.answer(seconds)

    @contextlib.contextmanager
    def running(self) -> Iterator[Worker]:
        try:
            yield self
        finally:
            with contextlib.suppress(OSError):
                self.connection.send(False)
            # it may be in the middle of minutes of compiling
            self.process.join(5)
            self.process.kill()


def _distance(found: numpy.ndarray, exact: numpy.ndarray) -> float:
    return float(numpy.linalg.norm(found - exact) / numpy.linalg.norm(exact))


def time_case(
    case: GenerationCase, device: torch.device, dtype: torch.dtype, seconds: float
) -> dict:
    deadline = time.perf_counter() + seconds
    arguments = (case, device, dtype, torch.get_num_threads())
    first_seconds: dict[str, float] = {}
    peaks: dict[str, dict[str, int]] = {"peak_bytes": {}, "decoding_peak_bytes": {}}
    errors: dict[str, float] = {}
    incorrect: dict[str, str] = {}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, *arguments).running())
            for name in (EXACT, *variants(device.type))
        }

        def left() -> float:
            return max(FIRST, deadline - time.perf_counter())

        def drop(failure: NoPicture) -> None:
            """All are compared with two of them, without which there is nothing to go on with."""
            if failure.name in (EXACT, STOCK):
                raise failure
            incorrect[failure.name] = str(failure)
            # what it is still busy with, or keeps, would disturb the others
            workers.pop(failure.name).process.kill()

        # importing at once, but drawing in turn
        for worker in list(workers.values()):
            try:
                worker.answer(left())
            except NoPicture as failure:
                drop(failure)
        exact = workers[EXACT].draw(left())["latents"]
        del workers[EXACT]
        for name, worker in list(workers.items()):
            try:
                found = worker.draw(left())
                first_seconds[name] = found["seconds"]
                errors[name] = _distance(found["latents"], exact)
                for part, sizes in peaks.items():
                    if found[part] is not None:
                        sizes[name] = found[part]
                bound = max(case.steps * LEAST, MAY_ERR * errors[STOCK])
                # written so that a NaN is wrong
                if not errors[name] <= bound:
                    raise NoPicture(name, f"is off by {errors[name]}, may be by {bound}")
            except NoPicture as failure:
                drop(failure)
        measured = None
        while measured is None:
            try:
                measured = measure(
                    {name: worker.draw for name, worker in workers.items()},
                    min(MEASURING, max(0.0, deadline - time.perf_counter())),
                    warm_ups=0,  # the first pictures were
                    own=lambda: time.process_time() + sum(w.cpu_seconds for w in workers.values()),
                )
            except NoPicture as failure:
                drop(failure)
    return {
        **{"incorrect": incorrect, "errors": errors},
        **{"first_seconds": first_seconds, **peaks, **measured.as_json()},
    }


def main(argv: list[str]) -> None:
    command(argv, "generation", __doc__, cases, time_case, budget=400.0, needed=SECONDS.__getitem__)
