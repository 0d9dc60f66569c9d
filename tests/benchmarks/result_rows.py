"""Rows of results such as benchmarks write, with times that are easy to divide."""

from __future__ import annotations

ABOUT = {"device": "a device", "torch": "2", "triton": "3", "commit": "abc"}


def row(shape, timings: dict[str, float], **more) -> dict:
    return {
        **ABOUT,
        **{"op": "an_op", "dtype": "float32", "pass": "forward", "shape": list(shape)},
        **{"quiet": True, "threads": 2, "bytes": 6_000_000, "incorrect": {}},
        "timings": {name: {"median": time} for name, time in timings.items()},
        **more,
    }


def gpu_rows() -> list[dict]:
    times = {"eager": 9.0, "copy": 1.8, "triton": 2.0, "cuda": 3.0, "torch.compile": 1.9}
    return [
        row((8, 4096, 1152), times, dtype="bfloat16"),
        row((1, 1024, 1152), {**times, "cuda": 1.0, "copy": 0.5}, dtype="bfloat16"),
        row((8, 4096, 384), {**times, "copy": 2.0}, dtype="bfloat16"),
    ]


def attention_rows(**more) -> list[dict]:
    """Forward and backward at two lengths, and forward with fewer keys, heads of 72; one of 64."""
    about = {**ABOUT, "cudnn": 9, "dtype": "bfloat16", "cannot": {}, "incorrect": {}}

    def one(op: str, N: int, Nk: int, d: int, which: str, **times: float) -> dict:
        timings = {name.replace("_", " "): {"median": time} for name, time in times.items()}
        row = {"op": op, "shape": [4, N, Nk, 16, d], "pass": which, "timings": timings}
        rates = {"flops": 6e9, "roof_flops": 12e9, "peak_bytes": dict.fromkeys(timings, N << 20)}
        return {**about, **row, **rates, **more}

    times = {"SDPA": 2.0, "SDPA_cuDNN": 1.0, "triton": 3.0, "matmul": 1.0}
    forward, both = "forward", "forward+backward"
    return [
        one("self_attention", 4096, 4096, 72, forward, **times),
        one("self_attention", 1024, 1024, 72, forward, SDPA=2.0, triton=1.5, matmul=1.0),
        one("attention", 1024, 256, 72, forward, SDPA=2.0, matmul=1.0),
        one("self_attention", 1024, 1024, 72, both, SDPA=6.0, triton=4.0, matmul=1.0),
        one("self_attention", 1024, 1024, 64, forward, SDPA=2.0, matmul=1.0),
    ]
