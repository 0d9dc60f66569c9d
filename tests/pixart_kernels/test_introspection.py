"""What is said of the CUDA kernels: that it is all of them, and true as far as tools can tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pixart_kernels import _extension, doctor, introspection
from pixart_kernels.introspection import Kernel, occupancy, short_name

CUDA = _extension.build_info.get("cuda", {})
compiled = pytest.mark.skipif(
    _extension.problem is not None or not CUDA.get("built"),
    reason=f"no CUDA kernels: {_extension.problem or CUDA.get('reason')}",
)
introspected = pytest.mark.skipif(
    introspection.problem() is not None, reason=str(introspection.problem())
)


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("pixart::adaln::fold(int*)", "adaln::fold"),
        ("pixart::adaln::fold", "adaln::fold"),
        (
            "void pixart::a::(anonymous namespace)::f<float, (pixart::a::Mode)1>(pixart::a::Call)",
            "a::f<float, (a::Mode)1>",
        ),
        ("void pixart::f<3>(void (*)(int), float)", "f<3>"),
        ("_Z1fv", "_Z1fv"),
    ],
    ids=["function", "no-arguments", "template", "function-argument", "mangled"],
)
def test_short_names(signature, name):
    assert short_name(signature) == name


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_cuda_kernels_are_built_where_nvcc_is():
    """Falling back is for users: here the tests below must not be skipped."""
    if "was set during the build" in str((_extension.build_info.get("reason"), CUDA)):
        pytest.skip("the build was told to leave them out")
    assert CUDA.get("built"), CUDA.get("reason", _extension.problem)


def written_for_sm_90a() -> set[str]:
    rows = json.loads((Path(introspection.__file__).parent / "_kernels.json").read_text())
    return {short_name(row["name"]) for row in rows if row["source"].endswith("_sm90.cu")}


@compiled
def test_every_architecture_has_every_kernel():
    names: dict[str, set[str]] = {}
    for kernel in introspection.kernels():
        names.setdefault(kernel.arch, set()).add(kernel.name)
    assert sorted(names) == sorted(CUDA["archs"])
    of_all = set.union(*names.values()) - written_for_sm_90a()
    assert of_all
    for arch, found in names.items():
        assert found == (of_all | written_for_sm_90a() if arch == "sm_90a" else of_all)


@compiled
@introspected
def test_every_kernel_is_registered_with_its_launch_parameters():
    compiled_names = {kernel.name for kernel in introspection.kernels()}
    assert set(introspection._table()) == compiled_names
    for kernel in introspection.kernels():
        assert kernel.threads % 32 == 0 and 0 < kernel.threads <= 1024
        assert kernel.dynamic_shared >= 0


@compiled
def test_no_kernel_spills():
    assert [kernel for kernel in introspection.kernels() if kernel.spills] == []


@compiled
def test_registers_and_static_shared_memory_are_within_what_every_gpu_has():
    for kernel in introspection.kernels():
        assert 0 < kernel.registers <= 255, kernel
        assert 0 <= kernel.static_shared <= 48 * 1024, kernel


@compiled
@introspected
def test_every_kernel_fits_on_every_multiprocessor_it_is_built_for():
    for kernel in introspection.kernels():
        assert 0 < kernel.occupancy <= 1, kernel


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if found is None:
        pytest.skip("no cuobjdump")
    command = [found, *arguments, str(_extension.library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def reserved(kernel: Kernel) -> int:
    """From sm_90 on, machine code that has shared memory has the driver's kibibyte before it."""
    shares = kernel.static_shared or kernel.dynamic_shared
    return 1024 if shares and not kernel.arch.startswith("sm_8") else 0


@compiled
@introspected
def test_the_record_is_of_the_library_as_linked():
    """cuobjdump reads from the machine code what the build read from the compiler."""
    found, arch = set(), ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        arch = match.group(1) if (match := re.match(r"arch = (sm_\w+)", line.strip())) else arch
        if match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            found.add((arch, *map(int, match.groups())))
    recorded = {
        (k.arch, k.registers, k.local, k.static_shared + reserved(k))
        for k in introspection.kernels()
    }
    assert found == recorded


# which template argument of a family's kernels says that rows are read and written in vectors
VECTOR_ARGUMENT = {"adaln": 3, "mlp": 1}


@compiled
@pytest.mark.parametrize("arch", CUDA.get("archs", []))
def test_vector_kernels_move_16_bytes_at_once(arch):
    wide: dict[str, set[str]] = {}
    for line in cuobjdump("-sass", "-arch", arch).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            moves = wide.setdefault(match.group(1), set())
        elif match := re.search(r"\b(LDG|STG)\.E(\.\w+)*\.128\b", line):
            moves.add(match.group(1))
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    demangle = subprocess.run(["c++filt", *wide], capture_output=True, text=True, check=True)
    checked = 0
    for signature, moves in zip(demangle.stdout.splitlines(), wide.values(), strict=True):
        family, _, kernel = short_name(signature).partition("::")
        name, _, arguments = kernel.rstrip(">").partition("<")
        if (
            name in ("fwd_kernel", "bwd_kernel")
            and short_name(signature) not in written_for_sm_90a()
        ):
            vector = arguments.split(", ")[VECTOR_ARGUMENT[family]] == "true"
            assert moves == ({"LDG", "STG"} if vector else set()), signature
            checked += 1
    assert checked


@pytest.fixture(scope="module")
def sm_90a_code() -> dict[str, list[str]]:
    """The instructions of each kernel that is written for sm_90a alone."""
    if "sm_90a" not in CUDA.get("archs", []) or shutil.which("c++filt") is None:
        pytest.skip("no code for sm_90a, or no c++filt")
    functions = cuobjdump("-sass", "-arch", "sm_90a").split("Function : ")[1:]
    signatures = [function.split(maxsplit=1)[0] for function in functions]
    demangle = subprocess.run(["c++filt", *signatures], capture_output=True, text=True, check=True)
    code = {}
    for signature, function in zip(demangle.stdout.splitlines(), functions, strict=True):
        if short_name(signature) in written_for_sm_90a():
            code[short_name(signature)] = re.findall(r"/\*[0-9a-f]{4,}\*/ +(.+?) *;", function)
    assert set(code) == written_for_sm_90a()
    return code


def count(pattern: str, instructions: list[str]) -> int:
    return sum(re.search(pattern, instruction) is not None for instruction in instructions)


# What kernels for sm_90a are held to, as compiled:


@compiled
def test_sm_90a_1_tiles_come_through_tma(sm_90a_code):
    for name, code in sm_90a_code.items():
        assert count(r"UTMALDG\.4D", code) > 0 and count("LDGSTS", code) == 0, name


@compiled
def test_sm_90a_2_products_are_a_warpgroups_and_72_wide_where_the_result_is_a_head(sm_90a_code):
    for name, code in sm_90a_code.items():
        widths = set(re.findall(r"HGMMA\.64x(\d+)x16", "\n".join(code)))
        keys = re.search(r"(\d+)>$", name).group(1)
        assert widths == {keys, "72"} and count(r"\bHMMA", code) == 0, name


@compiled
def test_sm_90a_3_products_of_a_batch_do_not_wait_for_each_other(sm_90a_code):
    """Where the compiler cannot prove that registers are safe, it waits after each of them."""
    for name, code in sm_90a_code.items():
        batches = count("WARPGROUP.ARRIVE", code)
        assert count("WARPGROUP.DEPBAR", code) <= batches < count("HGMMA", code) / 4, name


@compiled
def test_sm_90a_4_nothing_lies_in_local_memory(sm_90a_code):
    for name, code in sm_90a_code.items():
        assert count(r"\b(LDL|STL)\b", code) == 0, name


@compiled
def test_sm_90a_5_registers_are_as_many_as_were_taken_and_left(sm_90a_code):
    def used(instructions: list[str]) -> int:
        numbers = re.findall(r"\bR(\d+)\b", "\n".join(instructions))
        return 1 + max(map(int, numbers))

    checked = 0
    for name, code in sm_90a_code.items():
        moves = {
            match.group(1): (i, int(match.group(2), 16))
            for i, line in enumerate(code)
            if (match := re.search(r"USETMAXREG\.(DEALLOC|TRY_ALLOC)\S* .*?(0x[0-9a-f]+)", line))
        }
        if not moves:
            continue
        begin, left = moves["DEALLOC"]
        end = begin + code[begin:].index("EXIT")
        assert count("UTMALDG", code[begin:end]) > 0 and used(code[begin:end]) <= left, name
        assert used(code) <= moves["TRY_ALLOC"][1], name
        checked += 1
    assert checked


@compiled
def test_sm_90a_6_results_leave_16_bytes_at_a_time(sm_90a_code):
    """A head's nine pieces: four times two of a thread's rows, and a quarter of the last."""
    for name, code in sm_90a_code.items():
        results = 2 if "dkdv" in name else 1
        assert count(r"STG\.E\.128", code) == 4 * results, name
        # of each of two rows, the last piece, and lse or delta
        assert count(r"STG\.E ", code) <= 4 * results, name


@compiled
def test_sm_90a_7_exponentials_are_taken_beside_products(sm_90a_code):
    for name, code in sm_90a_code.items():
        scores = int(re.search(r"(\d+)>$", name).group(1)) // 2
        beside = taken = 0
        for instruction in code:
            taken += "MUFU.EX2" in instruction
            if "HGMMA" in instruction:
                taken = 0
            elif "WARPGROUP.DEPBAR" in instruction:
                beside = max(beside, taken)
        assert beside >= scores, name


# architecture, its number, limits as in a device's properties
PROPERTIES = [
    ("sm_80", 8, 0, 2048, 164, 163),
    ("sm_86", 8, 6, 1536, 100, 99),
    ("sm_89", 8, 9, 1536, 100, 99),
    ("sm_90", 9, 0, 2048, 228, 227),
    ("sm_100", 10, 0, 2048, 228, 227),
]
REGISTERS = (16, 40, 65, 127, 168, 255)
THREADS = (32, 96, 144, 288, 512, 1024)
SHARED = (0, 1, 512, 4096, 16896, 49152)

CALCULATOR = """
#include <cstdio>
#include <cstddef>
#include <cuda_occupancy.h>
int main() {
  int major, minor, threads_per_sm, shared_kib, optin_kib, registers, threads, shared;
  while (std::scanf("%d%d%d%d%d%d%d%d", &major, &minor, &threads_per_sm, &shared_kib, &optin_kib,
                    &registers, &threads, &shared) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = threads_per_sm;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = shared_kib * 1024;
    device.sharedMemPerBlockOptin = optin_kib * 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 100;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = shared;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state,
                                                              threads, 0);
    std::printf("%d\\n", error ? -error : result.activeBlocksPerMultiprocessor);
  }
}
"""


def toolkit_include() -> Path | None:
    if nvcc() is None:
        return None
    command = [nvcc(), "--dryrun", "-x", "cu", "-c", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="-I(.+?)"', said)
    return Path(found.group(1)) if found else None


def test_occupancy_equals_the_toolkits_own_calculator(tmp_path):
    include, compiler = toolkit_include(), shutil.which("c++")
    if compiler is None or include is None or not (include / "cuda_occupancy.h").exists():
        pytest.skip("needs a C++ compiler and cuda_occupancy.h")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    command = [compiler, "-I", str(include), "calculator.cpp", "-o", "calculator"]
    subprocess.run(command, cwd=tmp_path, check=True)
    cases = [
        (*device, registers, threads, shared)
        for device in PROPERTIES
        for registers in REGISTERS
        for threads in THREADS
        for shared in SHARED
    ]
    lines = "\n".join(" ".join(map(str, case[1:])) for case in cases)
    done = subprocess.run(
        [tmp_path / "calculator"], input=lines, capture_output=True, text=True, check=True
    )
    expected = list(map(int, done.stdout.split()))
    assert len(expected) == len(cases)
    for (arch, _, _, per_sm, _, _, registers, threads, shared), blocks in zip(
        cases, expected, strict=True
    ):
        found = occupancy(arch, registers, threads, shared)
        warps = -(-threads // 32)
        assert found == blocks * warps / (per_sm // 32), (arch, registers, threads, shared)


def test_occupancy_of_an_architecture_nobody_entered_is_unknown():
    assert occupancy("sm_75", 32, 128, 0) is None
    assert occupancy("sm_90a", 32, 128, 0) == occupancy("sm_90", 32, 128, 0) == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@compiled
@introspected
def test_the_driver_agrees():
    running = {kernel.name: kernel for kernel in introspection.running_kernels()}
    arch = next(iter(running.values())).arch
    built = [kernel for kernel in introspection.kernels() if kernel.arch.rstrip("af") == arch]
    if not built:
        pytest.skip(f"the GPU runs {arch}, which was compiled on it from PTX")
    assert len(built) == len(running)
    for kernel in built:
        said = running[kernel.name]
        assert (said.registers, said.local, said.static_shared, said.occupancy) == (
            kernel.registers,
            kernel.local,
            kernel.static_shared,
            kernel.occupancy,
        ), kernel.name


def some_kernel(**changes: object) -> dict:
    row = {"name": "void pixart::f<1>(int)", "arch": "sm_80", "registers": 40, "stack": 0}
    return {**row, "spill_stores": 0, "spill_loads": 0, "shared": 512, **changes}


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> Callable[..., list[Kernel]]:
    """Kernels as if the build had recorded these rows, and the library held this table."""
    monkeypatch.setattr(introspection, "__file__", str(tmp_path / "introspection.py"))

    def record(rows: list[dict], table: dict) -> list[Kernel]:
        (tmp_path / "_kernels.json").write_text(json.dumps(rows))
        monkeypatch.setattr(introspection, "_table", lambda: table)
        return introspection.kernels()

    return record


def test_the_record_and_the_table_are_joined(recorded):
    table = {"f<1>": {"threads": 256, "dynamic_shared": 1024}}
    rows = [some_kernel(), some_kernel(arch="sm_90a", spill_stores=4, spill_loads=8)]
    first, second = recorded(rows, table)
    assert (first.name, first.threads, first.spills) == ("f<1>", 256, 0)
    assert first.occupancy == occupancy("sm_80", 40, 256, 512 + 1024)
    assert (second.arch, second.spills) == ("sm_90a", 12)


def test_without_a_table_the_record_stands_alone(recorded):
    (kernel,) = recorded([some_kernel()], {})
    assert (kernel.threads, kernel.dynamic_shared, kernel.occupancy) == (None, None, None)
    assert kernel.registers == 40


def test_doctor_summarises_and_lists(recorded):
    recorded(
        [some_kernel(), some_kernel(name="pixart::g()", registers=90, spill_loads=4)],
        {"f<1>": {"threads": 256, "dynamic_shared": 0}},
    )
    summary = doctor.report()
    share = f"{occupancy('sm_80', 40, 256, 512):.0%}"
    assert f"2 kernels, at most 90 registers, 1 spill, lowest occupancy {share}" in summary
    assert "f<1>" not in summary
    rows = [line.split() for line in doctor.report(every_kernel=True).splitlines()]
    assert ["256", "40", "0", "0", "512", share, "f<1>"] in rows
    assert ["?", "90", "4", "0", "512", "?", "g"] in rows


def test_another_pythons_module_is_named(monkeypatch):
    monkeypatch.setattr(_extension, "problem", None)
    built = {"introspection": {"built": True, "python": "cpython-399"}}
    monkeypatch.setattr(_extension, "build_info", built)
    monkeypatch.setitem(sys.modules, "pixart_kernels._introspection", None)
    assert "built for cpython-399" in introspection.problem()
    assert introspection._table() == {}
