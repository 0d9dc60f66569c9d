"""One model, one thread that draws with it, and those who wait in line."""

from __future__ import annotations

import base64
import io
import logging
import math
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pixart.conditioning import VAE
from pixart.diffusion import SAMPLERS
from pixart.generation import PixArtPipeline, pictures
from pixart.generation.pipeline import to_image
from pixart.webui.limits import Limits, Rate, Refused

log = logging.getLogger(__name__)

# latents a side of which a preview is decoded: a sixteenth of a 1024-pixel picture's
PREVIEW_SIDE = 32
# of the time of drawing
PREVIEW_SHARE = 0.1
# on the disk, of all visits together
KEPT_PICTURES = 500
# characters of lost words: proxies take only so much in a header
LOST_WORDS = 100


class Cancelled(Exception):
    """Nobody waits for the picture any more."""


class Job:
    """A picture in the works.

    Attributes:
        picture: what is drawn.
        future: the PNG's path. It raises ``Cancelled``, or ``CancelledError`` before the start.
        done: share of the steps.
        preview: a data URL of what it is becoming, or None.
        notes: what to tell with the picture: words that the model does not read.
    """

    def __init__(self, picture: pictures.Picture, folder: Path) -> None:
        self.picture, self.folder = picture, folder
        self.future: Future[Path]
        self.done = 0.0
        self.preview: str | None = None
        self.notes: list[str] = []
        self.cancelled = False

    def cancel(self) -> None:
        """Ends it, unless it is finished: at once if it waits, else before the next step."""
        if self.future.done():
            return
        self.cancelled = True
        self.future.cancel()

    def progress(self, done: float, total: int) -> None:
        self.done = done / total
        if self.cancelled:
            raise Cancelled


class Studio:
    """Draws what is asked for, one picture at a time, in the order of asking.

    Args:
        folder: where the pictures are written, each into a folder of its own.
        note: see ``pictures.draw``.
        sampler: see ``pixart.diffusion.sample``; None: what suits the model.

    Raises ValueError for a sampler that there is not.
    """

    def __init__(
        self,
        pipeline: PixArtPipeline,
        limits: Limits,
        folder: Path,
        note: Mapping[str, Any],
        sampler: str | None = None,
    ) -> None:
        sampler = sampler or pipeline.sampler
        if sampler not in SAMPLERS:
            raise ValueError(f"`sampler` is {sampler!r}; accepted: {', '.join(SAMPLERS)}")
        self.pipeline, self.limits, self.folder, self.note = pipeline, limits, folder, note
        self.sampler = sampler
        # always the same thread: another would have OpenMP threads of its own
        self._thread = ThreadPoolExecutor(1, "drawing")
        self._rate = Rate(limits.rate)
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._kept: deque[Job] = deque()

    def submit(self, asked: Any, client: str) -> Job:
        """Puts a picture in line.

        Raises:
            ValueError: what is asked for is not accepted, and what would be.
            Refused: too many wait (503), or this client asked too often (429).
        """
        picture = self.limits.picture(asked, self.pipeline, self.sampler)
        with self._lock:
            if len(self._jobs) > self.limits.queue:
                raise Refused(f"{self.limits.queue} pictures wait already; try again later", 503)
            wait = self._rate.wait(client)
            if wait:
                raise Refused(
                    f"{self.limits.rate} pictures a minute are drawn for one client; try again in "
                    f"{math.ceil(wait)} s",
                    429,
                    wait,
                )
            self._rate.count(client)
            # a name that nobody else guesses
            job = Job(picture, self.folder / secrets.token_urlsafe(16))
            self._jobs.append(job)
            job.future = self._thread.submit(self._draw, job)

        def leave(future: Future[Path]) -> None:
            # else `_draw` did it, before anybody knew that the picture is finished
            if future.cancelled():
                self._jobs.remove(job)

        job.future.add_done_callback(leave)
        return job

    def ahead(self, job: Job) -> int:
        """How many are drawn before ``job`` is."""
        jobs = list(self._jobs)
        return jobs.index(job) if job in jobs else 0

    def keeps(self, job: Job) -> bool:
        return job in self._kept

    def find(self, folder: str, name: str) -> Path | None:
        """The picture of that name, in the folder of a job."""
        for job in list(self._kept):
            if job.folder.name == folder and job.future.result().name == name:
                return job.future.result()
        return None

    def keep(self, job: Job) -> None:
        """Lets ``find`` find a finished picture, until it is forgotten or many came after it."""
        self._kept.append(job)
        while len(self._kept) > KEPT_PICTURES:
            self.forget(self._kept[0])

    def forget(self, job: Job) -> None:
        """Deletes a finished picture."""
        if job in self._kept:
            self._kept.remove(job)
        shutil.rmtree(job.folder, ignore_errors=True)

    def drop(self, job: Job) -> None:
        """Nobody waits for it any more: ends it, and deletes what is not kept."""
        job.cancel()
        job.preview = None
        if job not in self._kept:
            self.forget(job)

    def close(self) -> None:
        """Ends all that is drawn or waits."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        self._thread.shutdown()

    def _draw(self, job: Job) -> Path:
        previews = Previews(self.pipeline.vae)

        def preview(latents: Tensor) -> None:
            image = previews(latents)
            if image is not None:
                job.preview = data_url(image)

        try:
            job.notes = self._lost_words(job.picture)
            (path,) = pictures.draw(
                self.pipeline,
                [job.picture],
                job.folder,
                note=self.note,
                callback=job.progress,
                preview=preview,
            )
        except Exception as error:
            if not isinstance(error, Cancelled):
                log.exception("drawing %s failed", job.picture)
            raise
        finally:
            self._jobs.remove(job)
            # it may have come too late to stop the picture
            if job.cancelled:
                self.forget(job)
        return path

    def _lost_words(self, picture: pictures.Picture) -> list[str]:
        encoder, notes = self.pipeline.text_encoder, []
        for name in ("prompt", "negative_prompt"):
            lost = "" if encoder is None else encoder.lost_words(getattr(picture, name))
            if lost:
                shown = lost if len(lost) <= LOST_WORDS else f"{lost[:LOST_WORDS]}…"
                notes.append(f"the {name.replace('_', ' ')} is too long; not read: “{shown}”")
        return notes


class Previews:
    """Small pictures of what latents are becoming, as often as a tenth of the time allows.

    Latents are themselves a small picture, of four channels or more, so that scaled down they
    decode to the same scene at a bounded price.
    """

    def __init__(self, vae: VAE, clock: Callable[[], float] = time.monotonic) -> None:
        self.vae, self.clock = vae, clock
        self._next = 0.0

    def __call__(self, latents: Tensor) -> Image.Image | None:
        """A picture of (1, C, h, w), or None where it is too early for another."""
        if self.clock() < self._next:
            return None
        if latents.is_cuda:
            # else the steps that the GPU has yet to do would count as the preview's time
            torch.cuda.synchronize(latents.device)
        start = self.clock()
        sides = latents.shape[2:]
        scale = min(1.0, PREVIEW_SIDE / max(sides))
        if scale < 1:
            rows, columns = (max(1, round(side * scale)) for side in sides)
            latents = F.interpolate(latents, (rows, columns), mode="area")
        image = to_image(self.vae.decode(latents)[0])
        end = self.clock()
        self._next = end + (end - start) * (1 / PREVIEW_SHARE - 1)
        return image


def data_url(image: Image.Image) -> str:
    """The picture as an address, without loss where each of its pixels will be seen."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85, lossless=max(image.size) <= 64)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
