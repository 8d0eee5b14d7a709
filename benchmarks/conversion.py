"""Measure peak memory and time of converting a model of 1.2 billion parameters, in and out.

    python benchmarks/conversion.py      # a table, and results/conversion.json

The checkpoint has random weights in bfloat16 and the shapes of Llama 3.2 1B: its largest tensor,
the embedding, has 525 MB. Each conversion runs in a process of its own, which reads `RssAnon` and
`VmRSS` every 5 ms; both are given above their value before the conversion, with all modules loaded.

    anonymous   memory that only the process can free. Target: at most 1.2 times the largest tensor
    resident    with the pages of memory-mapped files, which the system drops when it needs memory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu.sizes import GPU
from benchmarks.machine import machine
from nemo_kd.checkpoints import open_checkpoint, write_nemo
from nemo_kd.checkpoints.config_json import read_model
from nemo_kd.checkpoints.families import shapes_of

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "conversion.json"
CACHE = ROOT / "outputs" / "benchmarks" / "conversion"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **GPU.model,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def make(directory: Path) -> None:
    """Write the random checkpoint, with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({one: i for i, one in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)
    torch.manual_seed(1)
    shapes = shapes_of(read_model(CONFIG))
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def convert_in() -> None:
    checkpoint = open_checkpoint(CACHE / "source")
    write_nemo(checkpoint, CACHE / "model.nemo", range(checkpoint.model.num_layers))


def convert_out() -> None:
    from nemo_kd.checkpoints.export import export, open_student

    export(open_student(CACHE / "model.nemo"), CACHE / "exported", overwrite=True)


WAYS: dict[str, Callable[[], None]] = {"in": convert_in, "out": convert_out}


def memory() -> dict[str, int]:
    """Anonymous and resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    names = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {name: int(status[key].split()[0]) << 10 for name, key in names.items()}


def measured(convert: Callable[[], None]) -> dict[str, float]:
    """Run a conversion; return its seconds and its peaks of memory above what was there before."""
    from transformers import AutoTokenizer

    source = str(CACHE / "source")  # loads transformers' modules
    AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    before, peak, ended = memory(), memory(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            now = memory()
            peak.update({name: max(peak[name], now[name]) for name in now})

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        convert()
    finally:
        ended.set()
        watcher.join()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, **{name: float(peak[name] - before[name]) for name in peak}}


def in_process(way: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--only", way], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"largest tensor: {result['largest_tensor'] / 1e6:.0f} MB")
    for name in ("conversion", "seconds", "anonymous MB", "times the largest", "resident MB"):
        table.add_column(name)
    for way, row in result["ways"].items():
        numbers = (row["anonymous"] / 1e6, row["resident"] / 1e6)
        times = row["anonymous"] / result["largest_tensor"]
        cells = f"{row['seconds']:.1f}", f"{numbers[0]:.0f}", f"{times:.2f}", f"{numbers[1]:.0f}"
        table.add_row(way, *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    only = parser.parse_args().only
    if only is not None:
        print(json.dumps(measured(WAYS[only])))
        return
    if not (CACHE / "source/config.json").exists():
        make(CACHE / "source")
    shapes = shapes_of(read_model(CONFIG)).values()
    sizes = [torch.Size(shape).numel() for shape in shapes]
    result = {
        "machine": machine(),
        "parameters": sum(sizes),
        "dtype": "bfloat16",
        "largest_tensor": max(sizes) * torch.bfloat16.itemsize,
        "ways": {way: in_process(way) for way in WAYS},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)


if __name__ == "__main__":
    main()
