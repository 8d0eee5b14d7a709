"""A dump with every collective noted: `torchrun … moved.py RESULT OVERRIDES`, one file a rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.configuration import configuration


def main(result: str, *overrides: str) -> None:
    from nemo_kd.cli.teacher import load, read

    cfg = configuration("dump_teacher_topk", *overrides)
    teacher = load(read(cfg), cfg)
    import torch
    from torch.profiler import profile

    from nemo_kd.teacher.dump import dump

    with profile(record_shapes=True) as recorded:
        dump(read(cfg), teacher)
    moved = [
        {"name": event.name, "shapes": event.input_shapes}
        for event in recorded.events() or []
        if event.name.startswith("gloo:")
    ]
    Path(f"{result}.{torch.distributed.get_rank()}").write_text(json.dumps(moved))


if __name__ == "__main__":
    main(*sys.argv[1:])
