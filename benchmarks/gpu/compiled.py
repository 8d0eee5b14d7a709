"""Compile the Triton kernels for a GPU that is not there, and read what the assembler made of them.

    python -m benchmarks.gpu.compiled 90            # compute capability; a line of JSON per kernel
    python -m benchmarks.gpu.compiled 90 float32    # this dtype with two temperatures
    python -m benchmarks.gpu.compiled 90 all        # all combinations of the options

Triton asks its driver which GPU to compile for and hands it the binary; the driver here has no GPU,
and launching does nothing. Everything before that is what happens on a GPU: `triton_kernels` is
called with tensors of real shapes, and Triton derives the specialisation from them. Binaries are
taken apart with the `cuobjdump` and `nvdisasm` of Triton's package.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nemo_kd.loss import triton_kernels
from nemo_kd.loss.rows import Rows
from nemo_kd.loss.shard import VocabShard

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
DTYPES = ("bfloat16", "float16", "float32")
M = 101
"""Number of gathered ids: K = 100 and the label."""


@dataclass(frozen=True)
class Shape:
    """A rank's part of a vocabulary: `valid` real columns of `width`, from column `start`."""

    name: str
    start: int
    width: int
    valid: int


PADDED = Shape("151,665 of 151,936 / TP 4", 3 * 37_984, 37_984, 37_713)
SHAPES = (
    Shape("128,256 / TP 8", 7 * 16_032, 16_032, 16_032),
    Shape("151,936 / TP 4", 37_984, 37_984, 37_984),
    PADDED,
    Shape("49,152", 0, 49_152, 49_152),
    Shape("262,144", 0, 262_144, 262_144),
    Shape("50,257", 0, 50_257, 50_257),
)


@dataclass(frozen=True)
class Options:
    dtype: str = "bfloat16"
    temperatures: int = 1
    indexed: bool = False


@dataclass(frozen=True)
class Compiled:
    """One kernel's binary; `loads` and `stores` count, by bits, those of its vocabulary loop."""

    kernel: str
    shape: Shape
    options: Options
    registers: int
    local_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    barriers: int
    """In the vocabulary loop."""
    instructions: float
    """Of the vocabulary loop, per column."""
    exponentials: float
    """The same of the special function unit's, of which an SM starts 16 per cycle, not 128."""


class NoGPU:
    """A Triton driver that collects the binaries for `capability` and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.binaries: list[tuple[str, bytes]] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.binaries.append((name, binary))
        return object(), object(), 0, 0, 1024

    def launcher_cls(self, source: object, metadata: object) -> Any:
        return lambda *arguments: None


def compile_kernels(capability: int, shape: Shape, options: Options) -> Iterator[Compiled]:
    """Both kernels as launched for this shape; those that were compiled before are left out."""
    driver.set_active(NoGPU(capability))
    dtype, temperatures = getattr(torch, options.dtype), (1.0, 2.0)[: options.temperatures]
    logits = torch.zeros(4, shape.width, dtype=dtype)
    rows = Rows.of(logits, torch.tensor([0, 2, 3]) if options.indexed else None)
    ids = torch.zeros(len(rows), M, dtype=torch.int64)
    shard = VocabShard(shape.start, shape.width, shape.valid, shape.start + shape.valid, None)
    done = triton_kernels.forward(rows, ids, shard, temperatures)
    picked = torch.zeros(ids.shape)
    triton_kernels.backward(
        rows, ids, shard, temperatures, done.top, picked, [done.top] * len(temperatures), rows
    )
    for name, binary in driver.active.binaries:
        yield read(name, binary, shape, options)


def read(name: str, binary: bytes, shape: Shape, options: Options) -> Compiled:
    """What the disassembler says of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        loop = vocabulary_loop(tool("nvdisasm", "-c", file.name))
    operations = [re.sub(r"^@\S+\s+", "", line).split()[0] for line in loop]
    exponentials = operations.count("MUFU.EX2")
    columns = elements_per_thread(operations, options.dtype)
    return Compiled(
        kernel=name,
        shape=shape,
        options=options,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        local_bytes=sum(map(int, re.findall(r"(?:LOCAL|STACK):(\d+)", usage))),
        loads=widths(operations, "LDG"),
        stores=widths(operations, "STG"),
        barriers=sum(op.startswith("BAR") for op in operations),
        instructions=round(len(loop) / columns, 1),
        exponentials=round(exponentials / columns, 2),
    )


def tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / name, *arguments], check=True, capture_output=True, text=True
    ).stdout


def vocabulary_loop(assembly: str) -> list[str]:
    """The instructions of the loop that has exponentials: from its label to the branch back."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;", line):
            code.append(instruction[1])
    for i, instruction in enumerate(code):
        back = re.search(r"\bBRA.*?(\.L_\w+)", instruction)
        if back and labels[back[1]] < i:
            loop = code[labels[back[1]] : i + 1]
            if any("MUFU.EX2" in line for line in loop):
                return loop
    raise ValueError("no loop with exponentials was found: has the disassembler's format changed?")


def widths(operations: list[str], name: str) -> dict[int, int]:
    """{bits: number} of loads (LDG) or stores (STG) of global memory."""
    found: dict[int, int] = {}
    for operation in operations:
        if operation.split(".")[0] == name:
            bits = re.search(r"\.[US]?(8|16|64|128)\b", operation)
            size = int(bits[1]) if bits else 32
            found[size] = found.get(size, 0) + 1
    return found


def elements_per_thread(operations: list[str], dtype: str) -> int:
    bits = 8 * getattr(torch, dtype).itemsize
    return sum(size * count for size, count in widths(operations, "LDG").items()) // bits


def cases(more: str) -> Iterator[tuple[Shape, Options]]:
    """All shapes with the usual options, and one of them with others; or everything."""
    if more == "all":
        options = itertools.product(DTYPES, (1, 2), (False, True))
        yield from itertools.product(SHAPES, itertools.starmap(Options, options))
        return
    yield from ((shape, Options()) for shape in SHAPES)
    yield PADDED, Options(more, 2, True)


def main() -> None:
    capability, more = (*sys.argv[1:], DTYPES[0])[:2]
    for shape, options in cases(more):
        for compiled in compile_kernels(int(capability), shape, options):
            print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
