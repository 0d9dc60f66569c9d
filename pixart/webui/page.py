"""The page: what it asks, and how a picture comes to be on it."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import torch

from pixart.diffusion import defaults
from pixart.generation.pictures import Picture
from pixart.webui.limits import MAX_GUIDANCE_SCALE, Refused, random_seed
from pixart.webui.studio import Job, Studio

CSS = Path(__file__).with_name("page.css")
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="slate",
    radius_size="md",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    # white letters on the hue's own 500 are too faint
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)
# what happens is read aloud, the picture's every step is not
SCRIPT = "() => document.getElementById('status')?.setAttribute('aria-live', 'polite')"
SHAPES = {
    "1:1": "Square",
    "4:3": "Landscape",
    "3:2": "Landscape",
    "16:9": "Wide",
    "3:4": "Portrait",
    "2:3": "Portrait",
    "9:16": "Tall",
}
EXACT = "Other…"
REFRESH_S = 0.1


@dataclass
class Visit:
    """An open page: what is drawn for it, and its pictures, the newest first."""

    job: Job | None = None
    drawn: list[Job] = field(default_factory=list)


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio; mount it with ``CSS``, ``THEME`` and ``SCRIPT``."""
    limits, visits = studio.limits, dict[str, Visit]()
    sizes = _sizes(studio)
    usual_steps, usual_scale = defaults(studio.sampler, studio.pipeline.guidance_scale)

    def empty(visit: Visit) -> bool:
        return visit.job is None and not any(map(studio.keeps, visit.drawn))

    async def draw(
        prompt: str,
        negative_prompt: str,
        size: str,
        width: float | None,
        height: float | None,
        steps: float,
        guidance_scale: float,
        seed: float | None,
        new_seed: bool,
        request: gr.Request,
    ) -> AsyncIterator[dict[Any, Any]]:
        # not every client says that it leaves
        for session in [key for key, visit in visits.items() if empty(visit)]:
            del visits[session]
        visit = visits.setdefault(request.session_hash or "", Visit())
        height, width = sizes.get(size, (height, width))
        asked = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "height": _whole(height),
            "width": _whole(width),
            "steps": _whole(steps),
            "guidance_scale": guidance_scale,
            "seed": random_seed() if new_seed or seed is None else _whole(seed),
        }
        try:
            job = visit.job = studio.submit(asked, request.client.host)
        except (ValueError, Refused) as error:
            yield {status_out: _alert(str(error))}
            return
        try:
            shown = None
            while not job.future.done():
                now = studio.ahead(job), job.done, job.preview
                if now != shown:
                    shown = now
                    yield {
                        stage_out: _stage(job.picture, job.preview, job.done),
                        status_out: _waiting(studio.ahead(job)),
                        seed_in: job.picture.seed,
                        draw_button: gr.update(interactive=False),
                        cancel_button: gr.update(interactive=True),
                    }
                await asyncio.sleep(REFRESH_S)
            idle = {
                draw_button: gr.update(interactive=True),
                cancel_button: gr.update(interactive=False),
            }
            if job.cancelled:
                yield {stage_out: _stage(None), status_out: _status("<p>Cancelled</p>"), **idle}
            elif (failure := job.future.exception()) is not None:
                yield {stage_out: _stage(None), status_out: _alert(told(failure)), **idle}
            else:
                studio.keep(job)
                visit.drawn = [job, *filter(studio.keeps, visit.drawn)]
                yield {
                    stage_out: _stage(job.picture, _address(job)),
                    status_out: _caption(job),
                    gallery_out: _gallery(visit.drawn),
                    seed_in: job.picture.seed,
                    **idle,
                }
        finally:
            # Gradio closes this where nobody is left to see it
            studio.drop(job)
            visit.job = None

    def cancel(request: gr.Request) -> None:
        visit = visits.get(request.session_hash or "")
        if visit is not None and visit.job is not None:
            visit.job.cancel()

    def leave(request: gr.Request) -> None:
        cancel(request)
        for job in visits.pop(request.session_hash or "", Visit()).drawn:
            studio.forget(job)

    with gr.Blocks(title="PixArt", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f'<div class="head"><h1>PixArt</h1><p>{html.escape(studio.note["model"])}</p></div>',
            elem_id="head",
            apply_default_css=False,
        )
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="ask"):
                prompt_in = gr.Textbox(
                    label="Prompt",
                    placeholder="What to draw (Shift + Enter begins)",
                    lines=3,
                    max_length=limits.prompt,
                    autofocus=True,
                )
                with gr.Row(elem_id="buttons"):
                    draw_button = gr.Button("Draw", variant="primary")
                    cancel_button = gr.Button("Cancel", interactive=False)
            with gr.Column(elem_id="settings"), gr.Group():
                negative_in = gr.Textbox(
                    label="Negative prompt",
                    placeholder="What to steer away from",
                    max_length=limits.prompt,
                )
                size_in = gr.Dropdown([*sizes, EXACT], label="Size", filterable=False)
                with gr.Row(visible=not sizes) as exact_row:
                    height, width = studio.pipeline.size()
                    multiple = studio.pipeline.vae.factor * studio.pipeline.model.config.patch_size
                    width_in = gr.Number(width, label="Width", step=multiple, min_width=0)
                    height_in = gr.Number(height, label="Height", step=multiple, min_width=0)
                steps_in = gr.Slider(
                    1, limits.steps, min(usual_steps, limits.steps), step=1, label="Steps"
                )
                guidance_in = gr.Slider(
                    1, MAX_GUIDANCE_SCALE, usual_scale, step=0.1, label="Guidance"
                )
                seed_in = gr.Number(label="Seed", placeholder="any")
                new_seed_in = gr.Checkbox(True, label="New seed for each picture")
            with gr.Column(elem_id="results"):
                stage_out = gr.HTML(_stage(None), elem_id="stage", apply_default_css=False)
                status_out = gr.HTML("", elem_id="status", apply_default_css=False)
            gallery_out = gr.HTML("", elem_id="gallery", apply_default_css=False)

        size_in.change(
            lambda size: gr.update(visible=size == EXACT),
            size_in,
            exact_row,
            api_visibility="private",
        )
        gr.on(
            [draw_button.click, prompt_in.submit],
            draw,
            [
                prompt_in,
                negative_in,
                size_in,
                width_in,
                height_in,
                steps_in,
                guidance_in,
                seed_in,
                new_seed_in,
            ],
            [stage_out, status_out, gallery_out, seed_in, draw_button, cancel_button],
            trigger_mode="once",
            # the studio's line is the only one
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        cancel_button.click(cancel, concurrency_limit=None, api_visibility="private")
        page.unload(leave)
    return page


def _sizes(studio: Studio) -> dict[str, tuple[int, int]]:
    """Height and width for each shape that is offered, by what the page calls it."""
    sizes = {ratio: studio.pipeline.size(aspect_ratio=ratio) for ratio in SHAPES}
    return {
        f"{SHAPES[ratio]} {ratio} · {width} × {height}": (height, width)
        for ratio, (height, width) in sizes.items()
        if max(height, width) <= studio.limits.side
    }


def _whole(number: float | None) -> int | float | None:
    """A browser's numbers are all floats."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _address(job: Job) -> str:
    return f"pictures/{job.folder.name}/{quote(job.future.result().name)}"


def _image(picture: Picture, source: str) -> str:
    return (
        f'<img src="{source}" alt="{html.escape(picture.prompt)}"'
        f' width="{picture.width}" height="{picture.height}"'
        # a few pixels, enlarged: each is to be seen
        f"{' class=pixels' if max(picture.width, picture.height) <= 128 else ''}>"
    )


def _stage(picture: Picture | None, source: str | None = None, done: float | None = None) -> str:
    """The picture, or what it is becoming; ``done`` is the share of steps while it is drawn."""
    if picture is None:
        return '<div class="frame empty"></div>'
    inside = "" if source is None else _image(picture, source)
    if done is not None:
        inside += f'<progress value="{done:.3f}" aria-label="Steps done"></progress>'
    ratio = picture.width / picture.height
    return f'<div class="frame" style="--ratio: {ratio:.4f}">{inside}</div>'


def _alert(message: str) -> str:
    return _status(f'<p class="problem" role="alert">{html.escape(message)}</p>')


def _status(inside: str) -> str:
    return f'<div class="status">{inside}</div>'


def _waiting(ahead: int) -> str:
    return _status(f"<p>{f'Waiting: {ahead} before this one' if ahead else 'Drawing…'}</p>")


def _settings(picture: Picture) -> str:
    return (
        f"{picture.width} × {picture.height} · {picture.steps} steps · "
        f"guidance {picture.guidance_scale:g} · seed {picture.seed}"
    )


def _download(job: Job) -> str:
    name = html.escape(job.future.result().name)
    return f'<a class="download" href="{_address(job)}" download="{name}">Download PNG</a>'


def _caption(job: Job) -> str:
    notes = "".join(f'<p class="problem">{html.escape(note)}</p>' for note in job.notes)
    return _status(f"<p>{_settings(job.picture)}</p>{_download(job)}{notes}")


def _gallery(drawn: list[Job]) -> str:
    figures = "".join(
        f'<li><a href="{_address(job)}" target="_blank">{_image(job.picture, _address(job))}</a>'
        f"<p>{html.escape(job.picture.prompt)}</p>"
        f"<small>seed {job.picture.seed}</small>{_download(job)}</li>"
        for job in drawn
    )
    return f"<h2>This visit</h2><ul>{figures}</ul>"


def told(error: BaseException) -> str:
    """What a visitor is told of an error while drawing; the log has the rest."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory: ask for a smaller picture"
    return "drawing failed; the server's log says why"
