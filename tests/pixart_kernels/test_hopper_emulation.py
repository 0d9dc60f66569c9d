"""The emulation of Hopper's units: that it finds faults, and that CuTe means the same by its terms.

What neither shows: how a GPU reads an operand that is 72 wide in panels of 64, 32 or 16 columns.
The last panel is then used in part, which CuTe never does. The manual's rule for it is the one for
whole panels, by which the emulation goes.
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
from emulated import EMULATED, EMULATION, compile_cpp, needs_compiler
from test_introspection import toolkit_include

PANELS = (64, 32, 16)
CUTLASS = importlib.util.find_spec("cutlass_library")

pytestmark = needs_compiler


@pytest.fixture(scope="module", params=PANELS, ids=lambda panel: f"panel {panel}")
def panel(request: pytest.FixtureRequest) -> int:
    return request.param


def emulated_program(name: str, panel: int, folder: Path) -> Path:
    define = f"-DPIXART_ATTENTION_PANEL={panel}"
    return compile_cpp(EMULATION / f"{name}.cpp", folder / name, *EMULATED, define)


@pytest.fixture(scope="module")
def probe(panel: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_program("hopper_probe", panel, tmp_path_factory.mktemp("probe"))


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def test_products_of_copied_tiles(probe: Path) -> None:
    done = run(probe, "none")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no-wait-for-copy", "memory whose copy was not waited for"),
        ("no-wait-for-product", "must name the registers of the products that have ended"),
        ("early-release", "a copy to where a product may still be reading"),
        ("early-overwrite", "more arrivals at a barrier than its phase takes"),
        ("too-few-bytes", "wait for each other"),
        ("too-many-bytes", "wait for each other"),
        ("too-many-arrivals", "more arrivals at a barrier than its phase takes"),
        ("no-arrival", "wait for each other"),
        ("no-fence", "without fence_products()"),
        ("late-registers", "registers were written after fence_products()"),
        ("operand-in-flight", "an operand was written while under way"),
        ("accumulators-in-flight", "accumulators were written while under way"),
        ("unlisted", "must name the registers of the products that have ended"),
        ("leading", "wrong result"),
        ("stride", "wrong result"),
        ("swizzle", ""),
        ("different-products", "threads of a warpgroup start different products"),
        ("part-of-warpgroup", "wait for each other"),
    ],
)
def test_faults_are_found(probe: Path, fault: str, message: str) -> None:
    done = run(probe, fault)
    assert done.returncode != 0
    assert "CUDA emulation: " in done.stderr
    assert message in done.stderr


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[str]]:
    """What CuTe says, by name and bytes of a swizzled row."""
    if CUTLASS is None:
        pytest.skip("nvidia-cutlass is not installed")
    toolkit = toolkit_include()
    if toolkit is None:
        pytest.skip("CuTe needs the CUDA toolkit's headers")
    headers = Path(str(CUTLASS.origin)).parent / "source" / "include"
    includes = [f"-isystem{folder}" for folder in (headers, toolkit, toolkit / "cccl")]
    source, output = EMULATION / "cute_layouts.cpp", tmp_path_factory.mktemp("cute") / "cute"
    done = run(compile_cpp(source, output, "-std=c++20", "-w", *includes))
    assert done.returncode == 0, done.stderr
    # CuTe complains that a host has no shared memory, whose address it then takes to be 0
    lines = [line.split() for line in done.stdout.splitlines() if "ERROR" not in line]
    return {(name, int(span)): values for name, span, *values in lines}


@pytest.fixture(scope="module")
def emulated(panel: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    done = run(emulated_program("hopper_layouts", panel, tmp_path_factory.mktemp("layouts")))
    assert done.returncode == 0, done.stderr
    return {name: values for name, *values in map(str.split, done.stdout.splitlines())}


def test_copies_put_elements_where_cute_does(cute, emulated, panel) -> None:
    assert emulated["places"] == cute["columns_of", 2 * panel]
    assert emulated["places"] == cute["rows_of", 2 * panel]


@pytest.mark.parametrize("operand", ["columns_a", "columns_b", "rows_b"])
def test_descriptors_are_cutes(cute, emulated, panel, operand) -> None:
    # CuTe contracts whole panels, of which the kernels leave out steps past column 80
    found, expected = emulated[operand], cute[operand, 2 * panel]
    assert len(found) <= len(expected)
    assert [int(word, 16) for word in found] == [int(w, 16) for w in expected[: len(found)]]


def test_registers_hold_what_cute_says(cute, emulated) -> None:
    accumulators = emulated["accumulators"]
    assert accumulators == cute["accumulators", 0]
    # an operand's eight elements are where a thread's first eight accumulators are
    threads = [accumulators[i : i + 36] for i in range(0, len(accumulators), 36)]
    assert [place for thread in threads for place in thread[:8]] == cute["operand", 0]
