"""Attention's providers are held to the truth, one by one and gradient by gradient."""

from __future__ import annotations

import json
import types
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import attention, attention_providers, cuda
from benchmarks import run as run_module
from benchmarks.attention import (
    AttentionCase,
    H,
    by_hand,
    calls_of_a_replay,
    cases,
    problems,
    time_case,
    truth_of,
)
from benchmarks.attention_providers import (
    HEADS_FIRST,
    LIBRARIES,
    OURS,
    SDPA,
    TOKENS_FIRST,
    Provider,
    _sdpa,
    for_cpu,
    for_gpu,
    packed,
)
from benchmarks.environment import read
from benchmarks.timing import Measurement, Timing

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
SELF = AttentionCase("self_attention", 2, 5, 5, 24, BF16)
CROSS = AttentionCase("attention", 2, 7, 3, 24, BF16)
both = pytest.mark.parametrize("case", [SELF, CROSS], ids=lambda case: case.op)


@pytest.fixture(autouse=True)
def fast(monkeypatch) -> None:
    def once(calls, seconds) -> Measurement:
        for call in calls.values():
            call()
        return Measurement(1, {name: Timing(1.0, 1.0, 1.0, 1) for name in calls})

    monkeypatch.setattr(attention, "measure", once)
    # FlexAttention runs without being compiled as well, if slowly
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)


def both_problems(provider: Provider, case: AttentionCase):
    tensors = case.inputs(CPU)
    return problems(provider, tensors, truth_of(tensors))


@pytest.mark.parametrize("at_once", [2**26, 12], ids=["whole", "in chunks of rows"])
def test_by_hand_is_attention(monkeypatch, at_once: int) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    q, k, v, dout = (torch.randn(N, 8, dtype=torch.float64) for N in (7, 5, 5, 7))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves)
    expected = [out, *torch.autograd.grad(out, leaves, dout)]
    with torch.no_grad():
        found = by_hand(q, k, v, dout)
    assert list(found) == ["out", "dq", "dk", "dv"]
    for name, tensor in zip(found, expected, strict=True):
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


def test_by_hand_in_16_bits_is_as_far_off_as_eager_pytorch() -> None:
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(256, 32).to(BF16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    p = torch.softmax(q @ k.T * 32**-0.5, -1)
    out = p @ v
    eager = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))
    eager["out"] = out
    with torch.no_grad():
        exact, found = by_hand(q, k, v, dout), by_hand(q, k, v, dout, low=BF16)
        for name, tensor in eager.items():
            results = (tensor, found[name])
            error, ours = (float((x.double() - exact[name]).square().mean()) for x in results)
            assert found[name].dtype == FP32 and torch.equal(found[name], found[name].to(BF16))
            assert ours == pytest.approx(error, rel=0.05), name


def test_where_heads_are_too_many_scores_the_first_and_last_are_compared(monkeypatch) -> None:
    tensors = CROSS.inputs(CPU)
    assert len(truth_of(tensors).heads) == 2 * H
    monkeypatch.setattr(attention, "CHECKED_SCORES", 4 * 7 * 3)
    truth = truth_of(tensors)
    assert truth.samples.tolist() == [0, 0, 1, 1] and truth.heads.tolist() == [0, 10, 5, 15]
    assert torch.equal(truth.of(tensors[0])[-1], tensors[0][1, :, 15])
    monkeypatch.setattr(attention, "CHECKED_SCORES", 1)
    truth = truth_of(tensors)
    assert truth.samples.tolist() == [0, 1] and truth.heads.tolist() == [0, 15]


@pytest.mark.parametrize(
    "layout", [TOKENS_FIRST, HEADS_FIRST, packed(H)], ids=["tokens first", "heads first", "packed"]
)
def test_layouts_are_undone(layout) -> None:
    *inputs, dout = SELF.inputs(CPU)
    dense = layout.pack(*inputs)
    assert all(tensor.is_contiguous() for tensor in [*dense, layout.like_output(dout)])
    for given, back in zip(inputs, layout.unpack(*dense), strict=True):
        assert torch.equal(given, back)
    assert torch.equal(layout.heads(layout.like_output(dout)), dout)


def doubled_gradient(x: torch.Tensor) -> torch.Tensor:
    return 2 * x - x.detach()


@both
def test_each_result_is_checked_by_itself(case) -> None:
    assert both_problems(Provider(TOKENS_FIRST, _sdpa), case) == (None, None)
    for i, name in enumerate(("dq", "dk", "dv")):

        def bad(*tensors, i=i):
            return _sdpa(*(doubled_gradient(x) if i == j else x for j, x in enumerate(tensors)))

        forward, backward = both_problems(Provider(TOKENS_FIRST, bad), case)
        assert forward is None
        assert backward.kind == "incorrect" and backward.text.startswith(f"{name}: error")
        assert ";" not in backward.text
    forward, backward = both_problems(Provider(TOKENS_FIRST, lambda *x: 1.125 * _sdpa(*x)), case)
    assert forward == backward and forward.text.startswith("out: error")


def test_a_head_that_is_not_compared_must_be_finite(monkeypatch) -> None:
    monkeypatch.setattr(attention, "CHECKED_SCORES", 1)

    def bad(*tensors):
        out = _sdpa(*tensors).clone()
        out[0, 0, 1] = float("nan")
        return out

    forward, _ = both_problems(Provider(TOKENS_FIRST, bad), CROSS)
    assert forward.text == "out: not finite in a head that is not compared"


@pytest.mark.parametrize("backward", [False, True])
def test_one_that_cannot_run_says_why(backward: bool) -> None:
    def refuses(*tensors):
        if torch.is_grad_enabled() or not backward:
            raise RuntimeError("no kernel. The other backends here: all of them\nand a long trace")
        return _sdpa(*tensors)

    found = both_problems(Provider(TOKENS_FIRST, refuses), CROSS)
    assert (found[0] is None) == backward
    assert found[1].kind == "cannot" and found[1].text == "RuntimeError: no kernel."


def test_pytorch_s_warnings_are_the_reason(monkeypatch) -> None:
    def refuses(*tensors):
        for _ in range(2):
            warnings.warn("head_dim must be 64 (Triggered internally at a.cpp:1.)", stacklevel=2)
        raise RuntimeError("No available kernel.")

    (forward, _) = both_problems(Provider(TOKENS_FIRST, refuses), CROSS)
    assert forward.text == "RuntimeError: No available kernel. head_dim must be 64"


@both
def test_on_a_cpu_auto_is_beside_a_direct_call(case) -> None:
    rows = time_case(case, CPU, 0.0)
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert list(row["timings"]) == [SDPA, "auto"]  # speed-ups are over the first
        assert row["incorrect"] == row["cannot"] == {}
        assert row["flops"] == case.flops(row["pass"])
        assert row["default_sdpa"] == "FLASH_ATTENTION" and row["checked_heads"] == 2 * H
        assert row["shape"] == [2, case.Nq, case.Nk, H, 24] and row["dtype"] == "bfloat16"
    heads = case.inputs(CPU)[:3]
    found = [provider.run(*provider.layout.pack(*heads)) for provider in for_cpu(case, H).values()]
    assert torch.equal(*found)


def test_one_that_is_wrong_backward_is_timed_forward(monkeypatch) -> None:
    real = attention.for_cpu

    def bad(q, k, v):
        return _sdpa(doubled_gradient(q), k, v)

    more = {"bad": Provider(TOKENS_FIRST, bad), "absent": "absent is not installed"}
    monkeypatch.setattr(attention, "for_cpu", lambda *arguments: {**real(*arguments), **more})
    forward, both_passes = time_case(SELF, CPU, 0.0)
    assert list(forward["timings"]) == [SDPA, "auto", "bad"] and forward["incorrect"] == {}
    assert list(both_passes["timings"]) == [SDPA, "auto"]
    assert both_passes["incorrect"]["bad"].startswith("dq: error")
    for row in (forward, both_passes):
        assert row["cannot"] == {"absent": "absent is not installed"}


def test_one_that_fails_while_it_is_prepared_is_named_with_those_that_could_not_start(
    monkeypatch,
) -> None:
    failed = {"auto": attention.Problem("cannot", "cannot be captured")}

    def timer(case, able, passes, device, seconds):
        return {which: {"timings": {}} for which in passes}, failed

    monkeypatch.setattr(attention, "_time_on_cpu", timer)
    assert [row["cannot"] for row in time_case(SELF, CPU, 0.0)] == [
        {"auto": "cannot be captured"}
    ] * 2


def test_flops_are_those_of_the_products() -> None:
    case = AttentionCase("attention", 2, 7, 3, 72, BF16)
    product = 2 * 2 * H * 7 * 3 * 72
    found = [case.flops(which) for which in attention.PASSES]
    assert found == [2 * product, 5 * product, 7 * product]


def test_cases_are_those_of_the_targets() -> None:
    found = cases("cuda")
    assert len({json.dumps(case.about()) for case in found}) == len(found)
    plain = {(case.d, case.Nq): case for case in found if case.op == "self_attention"}
    lengths = (256, 1024, 4096, 16384, 65536)
    assert set(plain) == {(d, N) for d in (64, 72, 80, 96, 128) for N in lengths}
    assert all(c.B * c.Nq == max(16384, c.Nq) and c.Nq == c.Nk for c in plain.values())
    compressed = [case for case in found if case.op == "attention"]
    assert [(c.Nq, c.Nk, c.d) for c in compressed] == [
        *((4096, 1024, 72), (1024, 256, 72), (16384, 4096, 72))
    ]
    assert found[0] == AttentionCase("self_attention", 4, 4096, 4096, 72, BF16)
    assert all(case.d == 72 for case in found[:8])
    on_cpu = {(c.op, c.B, c.Nq, c.Nk, c.d, c.dtype) for c in cases("cpu")}
    for N in (64, 256, 1024):
        for dtype in (FP32, BF16):
            assert ("self_attention", 2, N, N, 72, dtype) in on_cpu
            assert ("attention", 2, N, N // 4, 72, dtype) in on_cpu
    rivals = attention.FAMILIES["attention-rivals"]("cuda")
    assert [case.about() for case in rivals] == [case.about() for case in found]
    assert not any(case.ours for case in rivals)


def stand_in(name: str):
    functions = {
        "flash_attn": {"flash_attn_func": _sdpa},
        # with the softmax's statistics, as some versions return them
        "flash_attn_interface": {"flash_attn_func": lambda q, k, v: (_sdpa(q, k, v), None)},
        "xformers.ops": {"memory_efficient_attention": _sdpa},
    }
    if name == "flash_attn.cute":
        raise ImportError("built for another GPU")
    return types.SimpleNamespace(**functions[name])


def test_everyone_on_a_gpu_by_name(monkeypatch) -> None:
    found = for_gpu(SELF, H)
    assert [found[name] for name in LIBRARIES] == [
        *("flash_attn is not installed", "flash_attn_interface is not installed"),
        *("flash_attn is not installed", "xformers is not installed"),
    ]
    importer = types.SimpleNamespace(import_module=stand_in)
    monkeypatch.setattr(attention_providers, "importlib", importer)
    found = for_gpu(SELF, H)
    assert list(found)[-2:] == list(OURS)
    assert list(for_gpu(replace(SELF, ours=False), H)) == list(found)[:-2]
    assert found.pop("flash-attn 4") == ("cannot be imported: ImportError: built for another GPU")
    # what a CPU has some form of; the rest refuses
    able = ("SDPA", "SDPA flash", "SDPA math", "xformers", "flash-attn 2", "flash-attn 3")
    for case in (SELF, CROSS):
        found = {name: both_problems(for_gpu(case, H)[name], case) for name in able}
        assert found == dict.fromkeys(able, (None, None))
        forward, backward = both_problems(for_gpu(case, H)["FlexAttention"], case)
        assert forward is None and "backward on CPU" in backward.text
        forward, _ = both_problems(for_gpu(case, H)["SDPA cuDNN"], case)
        assert forward.kind == "cannot"


@both
def test_ours_read_packed_projections(case) -> None:
    provider = attention_providers.ours(case, H, "reference")
    assert both_problems(provider, case) == (None, None)
    assert len(provider.layout.pack(*case.inputs(CPU)[:3])) == (1 if case is SELF else 3)


def test_a_library_without_the_function_is_not_the_library(monkeypatch) -> None:
    importer = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace())
    monkeypatch.setattr(attention_providers, "importlib", importer)
    assert "has no attribute" in for_gpu(SELF, H)["flash-attn 2"]


@pytest.mark.parametrize("passes", [attention.PASSES[:1], attention.PASSES[1:]], ids=str)
def test_gpu_timing_with_a_stand_in_for_the_gpu(fake_gpu, monkeypatch, passes) -> None:
    monkeypatch.setattr(attention, "gpu_state", lambda device: {"clocks.sm": "1 MHz"})
    monkeypatch.setattr(attention, "ROOF_SIZE", 8)
    monkeypatch.setattr(attention, "REPLAY_FLOPS", 2.5 * CROSS.flops("forward"))
    called: list[int] = []

    def fails_later(*tensors):
        called.append(1)
        if len(called) > 1:
            raise RuntimeError("cannot be captured\nat all")
        return _sdpa(*tensors)

    able = {
        "good": Provider(TOKENS_FIRST, _sdpa),
        "heads": Provider(HEADS_FIRST, F.scaled_dot_product_attention),
        "fails": Provider(TOKENS_FIRST, fails_later),
    }
    measured, failed = attention._time_on_gpu(CROSS, able, passes, CPU, 0.0)
    assert list(measured) == list(passes)
    assert failed == {"fails": attention.Problem("cannot", "RuntimeError: cannot be captured")}
    calls = calls_of_a_replay(CROSS, 2**10)
    assert calls == 3
    for which, row in measured.items():
        assert set(row["timings"]) == {"good", "heads", "matmul"}
        # a replay's events are 6 ms apart: with the forward before it, a backward takes 12
        whole = 12.0 if which == "forward+backward" else 6.0
        assert row["timings"]["good"]["median"] == whole / calls
        assert row["timings"]["good"]["calls"] == cuda.MIN_REPLAYS
        assert row["roof_flops"] == 2 * 8**3
        assert row["peak_bytes"] == {"good": 7, "heads": 7}
        assert row["gpu"]["after"] == {"clocks.sm": "1 MHz"}


@both
def test_a_case_on_a_gpu_with_a_stand_in_for_it(fake_gpu, monkeypatch, case) -> None:
    inputs, matmul = AttentionCase.inputs, cuda.matmul_replay
    monkeypatch.setattr(
        AttentionCase, "inputs", lambda self, device, seed=0: inputs(self, CPU, seed)
    )
    monkeypatch.setattr(cuda, "matmul_replay", lambda size, dtype, device: matmul(8, dtype, CPU))
    monkeypatch.setattr(attention, "gpu_state", lambda device: {})
    monkeypatch.setattr(attention, "REPLAY_FLOPS", 1)
    rows = time_case(replace(case, ours=False), torch.device("cuda"), 0.0)
    assert [row["pass"] for row in rows] == list(attention.PASSES)
    for row in rows:
        able = {"SDPA", "SDPA flash", "SDPA math"}
        if row["pass"] == "forward":
            able.add("FlexAttention")
        assert set(row["timings"]) == able | {"matmul"}
        assert set(row["cannot"]) == set(for_gpu(case, H)) - set(OURS) - able
        assert row["incorrect"] == {} and set(row["peak_bytes"]) == able
        assert row["flops"] == case.flops(row["pass"]) and row["default_sdpa"]
        json.dumps(row)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_what_a_graph_reads_lives_as_long_as_it(fake_gpu, which: str) -> None:
    read: list[weakref.ref] = []

    def copied(x: torch.Tensor) -> torch.Tensor:
        copy = x.clone()
        read.append(weakref.ref(copy.untyped_storage()))
        return copy

    def pack(*qkv: torch.Tensor) -> list[torch.Tensor]:
        return [copied(x) for x in qkv]

    layout = replace(TOKENS_FIRST, pack=pack, like_output=copied)
    replay, _ = attention.replay_of(Provider(layout, _sdpa), [CROSS.inputs(CPU)], which)
    needed = read if which == "backward" else read[:3]
    assert len(read) == 4 and all(storage() is not None for storage in needed)
    del replay
    assert all(storage() is None for storage in read)


def test_what_does_not_fit_is_not_tried(fake_gpu, monkeypatch) -> None:
    tensors = [CROSS.inputs(CPU)] * 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20, 2**30))
    with pytest.raises(MemoryError, match="3 calls of 0.0 GiB"):
        attention.replay_of(Provider(TOKENS_FIRST, _sdpa), tensors, "forward")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (21, 2**30))
    attention.replay_of(Provider(TOKENS_FIRST, _sdpa), tensors, "forward")


@pytest.mark.parametrize(
    "B, N, calls", [(1, 65536, 2), (4, 4096, 2), (64, 256, 11), (1, 4096, 3)], ids=str
)
def test_replays_are_long_and_their_inputs_exceed_twice_the_cache(B, N, calls) -> None:
    case, cache = AttentionCase("self_attention", B, N, N, 72, BF16), 50 << 20
    assert calls_of_a_replay(case, cache) == calls
    assert calls * 4 * B * N * H * 72 * BF16.itemsize > 2 * cache
    assert calls * case.flops("forward") >= attention.REPLAY_FLOPS


def test_a_run_resumes_where_it_was_stopped(tmp_path, monkeypatch) -> None:
    asked: list[AttentionCase] = []

    def timed(case, device, seconds):
        asked.append(case)
        if case is CROSS and not resumed:
            raise KeyboardInterrupt
        return [{**case.about(), "pass": "forward", "incorrect": {}, "timings": {}}]

    monkeypatch.setattr(run_module, "time_case", timed)
    monkeypatch.setitem(run_module.FAMILIES, "attention", lambda device: [SELF, CROSS])
    monkeypatch.setattr(
        run_module, "environment", lambda device: {"commit": commit, "device": "a CPU"}
    )
    arguments = ["--op", "attention", "--output", str(tmp_path)]

    def rows() -> list[dict]:
        return read(tmp_path / "attention.jsonl")

    commit, resumed = "abc", False
    with pytest.raises(KeyboardInterrupt):
        run_module.main(arguments)
    resumed = True
    assert [row.get("not_measured") for row in rows()] == [None, "was stopped"]
    with pytest.raises(SystemExit):
        run_module.main([*arguments, "--resume"])
    assert asked == [SELF, CROSS, CROSS]
    assert [row["op"] for row in rows()] == [SELF.op, CROSS.op]
    assert all("timings" in row for row in rows())
    # what is of another commit is measured again, and so is everything without --resume
    commit = "def"
    for resume in ([], ["--resume"]):
        asked.clear()
        with pytest.raises(SystemExit):
            run_module.main([*arguments, *resume])
        assert asked == ([] if resume else [SELF, CROSS])
    commit = "ghi"
    with pytest.raises(SystemExit):
        run_module.main([*arguments, "--resume"])
    assert asked == [SELF, CROSS]
    assert {row["commit"] for row in rows()} == {"ghi"}
