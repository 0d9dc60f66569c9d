"""What a visitor, or a program that calls the page's API, may ask for."""

from __future__ import annotations

import ipaddress
import reprlib
import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from pixart.diffusion import defaults
from pixart.generation import PixArtPipeline
from pixart.generation.pictures import Picture, Request, resolve

MAX_GUIDANCE_SCALE = 30
# what a number field of a browser holds exactly
MAX_SEED = 2**53 - 1


class Refused(Exception):
    """What was asked for may be right, but not now; with an HTTP status, and seconds to wait."""

    def __init__(self, message: str, status: int, retry_after: float = 1) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Limits:
    """Bounds of what is asked for.

    Args:
        side: pixels of a picture's longer side.
        steps: steps of the sampler.
        prompt: characters of a prompt, and of a negative one.
        queue: pictures that wait while one is drawn.
        rate: pictures in any minute for one client.
    """

    side: int
    steps: int = 100
    prompt: int = 2000
    queue: int = 16
    rate: int = 30

    def picture(self, values: Any, pipeline: PixArtPipeline, sampler: str) -> Picture:
        """All that decides a picture, from an object that somebody sent; without a seed, any.

        Raises ValueError naming each argument, what was got and what is accepted.
        """
        try:
            asked = self._model.model_validate(values).model_dump()
        except ValidationError as error:
            raise ValueError("; ".join(map(_problem, error.errors()))) from None
        sides = (asked.pop(key) for key in ("height", "width", "aspect_ratio"))
        height, width = pipeline.size(*sides)
        for name, pixels in (("height", height), ("width", width)):
            if pixels > self.side:
                raise ValueError(f"`{name}` is {pixels}; accepted: up to {self.side}")
        if asked["seed"] is None:
            asked["seed"] = random_seed()
        if asked["steps"] is None:
            asked["steps"] = min(defaults(sampler)[0], self.steps)
        request = Request(**asked, height=height, width=width)
        (picture,) = resolve([request], pipeline, sampler=sampler)
        return picture

    @cached_property
    def _model(self) -> type[BaseModel]:
        text = Annotated[str, Field(max_length=self.prompt)]
        # not `Request` itself: a line of a file of prompts may name files, a visitor may not
        return create_model(
            "Asked",
            __config__=ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True),
            prompt=(Annotated[text, Field(min_length=1)], ...),
            negative_prompt=(text, ""),
            height=(Annotated[int, Field(gt=0)] | None, None),
            width=(Annotated[int, Field(gt=0)] | None, None),
            aspect_ratio=(Annotated[str, Field(max_length=20)] | None, None),
            seed=(Annotated[int, Field(ge=0, le=MAX_SEED)] | None, None),
            steps=(Annotated[int, Field(ge=1, le=self.steps)] | None, None),
            guidance_scale=(Annotated[float, Field(ge=1, le=MAX_GUIDANCE_SCALE)] | None, None),
        )


class Rate:
    """At most ``per_minute`` in any minute for each client: an address, or a /64 of IPv6."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._times: dict[str, deque[float]] = {}

    def wait(self, client: str) -> float:
        """Seconds until ``client`` may go on; 0: now."""
        times = self._times.get(_network(client), deque())
        if len(times) < self.per_minute:
            return 0
        return max(0.0, times[0] + 60 - time.monotonic())

    def count(self, client: str) -> None:
        """``client`` went on."""
        now = time.monotonic()
        self._times = {who: times for who, times in self._times.items() if times[-1] > now - 60}
        newest = deque[float](maxlen=self.per_minute)
        self._times.setdefault(_network(client), newest).append(now)


def _network(client: str) -> str:
    """What one household has of IPv6 addresses is one client."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    return client if address.version == 4 else f"{int(address) >> 64:x}::/64"


def random_seed() -> int:
    return secrets.randbelow(2**32)


def _problem(problem: Mapping[str, Any]) -> str:
    name = ".".join(map(str, problem["loc"])) or "the body"
    if problem["type"] == "extra_forbidden":
        return f"`{name}` is not known"
    if problem["type"] == "missing":
        return f"`{name}` is missing"
    accepted = problem["msg"].removeprefix("Input should be ")
    return f"`{name}` is {reprlib.repr(problem['input'])}; accepted: {accepted}"
