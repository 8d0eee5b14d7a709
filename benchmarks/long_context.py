"""Measure the peak memory of the loss and of the fused LM head over the number of tokens.

    python benchmarks/long_context.py    # a table, results/long_context.json, docs/loss.md

Logits in bf16 over 152,064 ids, K = 100, forward + backward, on a CPU. Memory: the peak growth of a
separate process; for the LM head without hidden states, weight and the weight's gradient, which
are the same with and without fusion.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import loss
from benchmarks.pages import write_table

RESULT = Path(__file__).parent / "results" / "long_context.json"
TOKENS = (4_096, 8_192, 16_384, 32_768)
VOCABULARY, HIDDEN, K = 152_064, 256, 100


def measured(tokens: int) -> dict[str, Any]:
    """Return the bytes of the loss and of the fused head, and the seconds of one step of each."""
    head = [tokens, VOCABULARY, HIDDEN, True, "bfloat16"]
    logits = [tokens, VOCABULARY, K, "bfloat16"]
    return {
        "tokens": tokens,
        "logits": 2 * tokens * VOCABULARY,
        "teacher": tokens * K * (8 + 4),
        "loss": loss.run(loss.memory, [(loss.sft_kd, logits)], 1)[0],
        "fused": loss.run(loss.memory, [(loss.lm_head, head)], 1)[0] - gradient_of_weight(),
    }


def gradient_of_weight() -> int:
    """Return its bytes: a sum over the chunks in float32 and, at the end, a copy in bf16."""
    return (4 + 2) * VOCABULARY * HIDDEN


def table(result: dict[str, Any]) -> str:
    """Return the page's table, in MB."""
    lines = [
        f"{result['machine']['processor']}, torch {result['machine']['torch']}, "
        f"commit {result['machine']['commit']}, `python benchmarks/long_context.py`; MB:",
        "",
        "| tokens | bf16 logits | the teacher's rows | loss on logits | of it, beyond the logits "
        "| LM head in the loss |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        values = (
            row["logits"],
            row["teacher"],
            row["loss"],
            row["loss"] - row["logits"],
            row["fused"],
        )
        lines.append(
            f"| {row['tokens']:,} | " + " | ".join(f"{value / 1e6:,.0f}" for value in values) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    about = loss.about_this_run()
    result = {"machine": about, "vocabulary": VOCABULARY, "hidden": HIDDEN, "top_k": K, "rows": []}
    for tokens in TOKENS:
        result["rows"].append(measured(tokens))
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_table(loss.PAGE, "benchmarks/long_context.py", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
