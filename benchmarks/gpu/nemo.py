"""NeMo on a GPU: make a tiny model, dump it, train a few steps from the store, in bf16.

The product's own scripts run, each a process, with the model and data of the tests.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.suite import outcome
from benchmarks.gpu.timing import Row

STEPS = 6


def rows(sizes: Sizes) -> Iterator[Row]:
    if find_spec("nemo") is None:
        yield {"what": "NeMo", "not run": "nemo_toolkit is not installed"}
        return
    with tempfile.TemporaryDirectory() as directory:
        for what, command in commands(Path(directory)).items():
            start = time.monotonic()
            result = outcome([sys.executable, *command])["result"]
            failed = result.startswith("failed")
            seconds = round(time.monotonic() - start)
            yield {"what": what, "result": result if failed else "done", "s": seconds}
            if failed:
                break  # the next ones need it


def commands(directory: Path) -> dict[str, list[str]]:
    store, run = directory / "store", directory / "run"
    dump = [
        f"model.restore_from_path={directory}/untrained.nemo",
        f"data.file_path={directory}/train.jsonl",
        f"output_dir={store}",
        "data.max_seq_length=128",
        "dump.top_k=20",
        "trainer.precision=bf16",
    ]
    train = [
        f"model.restore_from_path={directory}/student.nemo",
        f"model.data.train_ds.store={store}",
        "model.data.train_ds.max_seq_length=128",
        f"exp_manager.explicit_log_dir={run}",
        "exp_manager.checkpoint_callback_params.save_top_k=0",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS}",
        "trainer.enable_progress_bar=false",
        "trainer.precision=bf16",
        "model.global_batch_size=4",
        "model.micro_batch_size=2",
    ]
    return {
        "a tiny model": ["-m", "tests.tiny", str(directory)],
        "dump": ["examples/dump_teacher_topk.py", *dump],
        f"{STEPS} steps": ["examples/train_gpt_sft_kd.py", *train],
        f"{STEPS} steps, fused head": [
            "examples/train_gpt_sft_kd.py",
            *[one.replace(str(run), f"{run}-fused") for one in train],
            "+model.kd.fused_lm_head=true",
        ],
    }
