"""Predict the time of loss, fused head, top-K and dump on an H100, for docs/gpu.md.

    python -m benchmarks.gpu.predict        # results/roofline.json and the tables of docs/gpu.md

Bytes are those that the code asks for: each tensor of vocabulary width counts once per read and
write. Instructions are those of the compiled loops (`compiled`). The time is the longest of memory,
instructions and exponentials, plus the matrix products where there are some.
Specifications: NVIDIA's data sheet of the H100 SXM; the clock is about what it sustains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_kd.loss.topk import BLOCK

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/roofline.json"
PAGE = ROOT / "docs/gpu.md"
BEGIN, END = "<!-- benchmarks/gpu/predict.py writes this -->", "<!-- end of the tables -->"

BYTES_PER_S = 0.8 * 3.35e12
FLOP_PER_S = 0.6 * 989e12
SM_CYCLES_PER_S = 132 * 1.7e9
INSTRUCTIONS, EXPONENTIALS = 128, 16
"""Started by an SM per cycle, over all its threads."""
K = 100
SECTOR = 32
"""Bytes of memory that one element read or written on its own moves."""
LOGIT = 2
N = 8192
VOCABULARIES = (49_152, 128_256, 151_936, 262_144)
HEADS = ((49_152, 576), (128_256, 4096), (151_936, 5120), (262_144, 5376))
"""(V, H) of SmolLM2-135M, Llama 3.1 8B, Qwen3-14B, Gemma 3 27B."""
CHUNK = 1 << 27
TOPK_COLUMN = {"largest of each block": LOGIT, "log-sum-exp": LOGIT}
"""Bytes per column of the logits that `vocab_parallel_topk` reads."""
ENCODE = {
    "to float32": 6,
    "add 0": 8,
    "shift": 8,
    "and": 8,
    "xor": 12,
    "to int64": 12,
    "shift left": 16,
}
TOPK_BLOCK = {"maximum": LOGIT, **ENCODE, "or": 16, "topk": 8}
"""Bytes per block of columns."""
TOPK_CANDIDATE = {
    "ids": 8,
    "gather": 8 + 2 * LOGIT,
    "ids of the shard": 16,
    **ENCODE,
    "subtract": 16,
    "or": 24,
    "topk": 8,
}
"""Bytes per column of the K blocks that are searched. `torch.topk` reads more than once, from the
cache."""
TEACHERS = ((1.2e9, 128_256), (8e9, 128_256), (70.6e9, 128_256), (405e9, 128_256))
"""(parameters, V)"""

Loops = dict[str, dict[str, float]]
"""{"forward 1": {"instructions": …, "exponentials": …}, …}, per column."""


def loss_bytes(v: int, columns: int = 3) -> int:
    """Per token: the logits three times (read, read, written), ids, and single elements.

    Single elements: forward reads them, writes two values in turn; backward writes.
    """
    m = K + 1
    return columns * v * LOGIT + m * (4 * SECTOR + 3 * 8 + 2 * 4)


def kernel_seconds(v: int, loops: Loops, temperatures: int) -> dict[str, float]:
    """Per token, of forward and backward together."""
    both = [loops[f"{name} {temperatures}"] for name in ("forward", "backward")]
    cycles = {key: sum(loop[key] for loop in both) for key in ("instructions", "exponentials")}
    return {
        "memory": loss_bytes(v) / BYTES_PER_S,
        "instructions": v * cycles["instructions"] / (SM_CYCLES_PER_S * INSTRUCTIONS),
        "exponentials": v * cycles["exponentials"] / (SM_CYCLES_PER_S * EXPONENTIALS),
    }


def loss_rows(loops: Loops) -> list[list[str]]:
    rows = []
    for v in VOCABULARIES:
        for temperatures in (1, 2):
            seconds = kernel_seconds(v, loops, temperatures)
            operations = sum(
                v * loops[f"{name} {temperatures}"]["instructions"]
                for name in ("forward", "backward")
            )
            cells = [f"{v:,}", str(temperatures), f"{loss_bytes(v) / 1e3:,.0f}"]
            cells += [f"{operations / 1e6:.2f}"]
            cells += [f"{N * seconds[key] * 1e3:.2f}" for key in seconds]
            rows.append([*cells, f"**{N * max(seconds.values()) * 1e3:.2f}**", "not run yet"])
    return rows


def head_rows(loops: Loops) -> list[list[str]]:
    """Chunks of tokens: logits written, the loss, read by two products; the weight's gradient."""
    rows = []
    for v, h in HEADS:
        chunks = -(-N * v // CHUNK)
        per_token = loss_bytes(v) + 3 * v * LOGIT + 4 * h * LOGIT
        per_chunk = v * h * (2 * LOGIT + 2 * LOGIT + 2 * 4)
        moved = N * per_token + chunks * per_chunk
        products = 6 * v * h * N
        memory, product = moved / BYTES_PER_S, products / FLOP_PER_S
        cells = [f"{v:,}", f"{h:,}", f"{moved / N / 1e3:,.0f}", f"{products / N / 1e9:.2f}"]
        cells += [f"{memory * 1e3:.2f}", f"{product * 1e3:.2f}"]
        peak = f"{2 * CHUNK / 1e9:.2f} / {N * v * LOGIT / 1e9:.2f}"
        rows.append([*cells, f"**{(memory + product) * 1e3:.2f}**", peak, "not run yet"])
    return rows


def topk_bytes(v: int) -> int:
    counted = ((v, TOPK_COLUMN), (v // BLOCK, TOPK_BLOCK), (K * BLOCK, TOPK_CANDIDATE))
    return sum(count * sum(moved.values()) for count, moved in counted)


def topk_rows(loops: Loops) -> list[list[str]]:
    rows = []
    for v in VOCABULARIES:
        moved = topk_bytes(v)
        cells = [f"{v:,}", f"{moved / 1e3:,.0f}", f"{v * LOGIT / 1e3:,.0f}"]
        rows.append([*cells, f"**{N * moved / BYTES_PER_S * 1e3:.2f}**", "not run yet"])
    return rows


def dump_rows(loops: Loops) -> list[list[str]]:
    rows = []
    for parameters, v in TEACHERS:
        model = 2 * parameters / FLOP_PER_S
        topk = topk_bytes(v) / BYTES_PER_S
        stored = K * (8 + 4) + 4
        cells = [
            f"{parameters / 1e9:g}",
            f"{2 * parameters / 1e9:,.1f}",
            f"{topk_bytes(v) / 1e3:,.0f}",
        ]
        cells += [f"{stored:,}", f"{model * 1e6:.2f}", f"{topk * 1e6:.2f}"]
        rows.append([*cells, f"**{1 + topk / model:.3f}**", "not run yet"])
    return rows


TABLES: tuple[tuple[str, str, Any], ...] = (
    (
        f"**Loss**, forward + backward, bf16 logits, K = {K}, {N:,} tokens. Two temperatures: "
        "the cross-entropy's, which is 1, and another.",
        "V | temperatures | kB / token | M instructions / token | memory, ms | instructions, ms | "
        "exponentials, ms | predicted, ms | measured",
        loss_rows,
    ),
    (
        f"**LM head fused with the loss**, both gradients, bf16, {N:,} tokens in chunks of "
        "2²⁷ logits, products at 60 % of 989 TFLOP/s. Peak: GB of logits, fused / separate.",
        "V | H | kB / token | GFLOP / token | memory, ms | products, ms | predicted, ms | "
        "peak, GB | measured",
        head_rows,
    ),
    (
        f"**Top-K of the teacher** (`vocab_parallel_topk`), bf16 logits, one temperature, {N:,} "
        "tokens.",
        "V | kB / token | of one read | predicted, ms | measured",
        topk_rows,
    ),
    (
        "**Dump**: the teacher's forward pass at 60 % of 989 TFLOP/s, and the top-K; "
        "V = 128,256. To the host: K ids and logits per answer token.",
        "parameters, 10⁹ | GFLOP / token | top-K, kB / token | to the host, B / token | "
        "model, GPU µs | top-K, GPU µs | dump / forward pass | measured",
        dump_rows,
    ),
)


def tables(loops: Loops) -> str:
    parts = []
    for title, header, rows in TABLES:
        columns = header.count("|") + 1
        lines = [title, "", f"| {header} |", "|" + "---:|" * columns]
        lines += ["| " + " | ".join(cells) + " |" for cells in rows(loops)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def with_tables(page: str, loops: Loops) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{tables(loops)}\n{END}{rest.split(END)[1]}"


def compiled_loops() -> Loops:
    from benchmarks.gpu.compiled import SHAPES, Options, compile_kernels

    loops = {}
    for temperatures in (1, 2):
        for kernel in compile_kernels(90, SHAPES[0], Options("bfloat16", temperatures)):
            name = kernel.kernel.removeprefix("_").removesuffix("_kernel")
            loops[f"{name} {temperatures}"] = {
                "instructions": kernel.instructions,
                "exponentials": kernel.exponentials,
            }
    return loops


def main() -> None:
    loops = compiled_loops()
    RESULT.write_text(json.dumps(loops, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), loops))


if __name__ == "__main__":
    main()
