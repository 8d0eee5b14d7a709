"""Settings that change a teacher's logits are part of the store's spec."""

from __future__ import annotations

from pathlib import Path

from nemo_kd.store import Store
from tests.processes import run_script
from tests.teacher.conftest import SETTINGS


def test_a_setting_of_the_model_that_changes_the_logits_is_another_teacher(
    world: Path, tmp_path: Path
) -> None:
    def dump(*more: str, fails: bool = False) -> str:
        arguments = [
            *SETTINGS,
            f"model.restore_from_path={world}/llama.nemo",
            f"data.file_path={world}/train.jsonl",
            f"output_dir={tmp_path}/store",
            *more,
        ]
        return str(run_script("dump_teacher_topk.py", *arguments, fails=fails).stderr)

    dump()
    recorded = Store(tmp_path / "store").spec.teacher
    assert set(recorded) == {"name", "fingerprint", "precision"}
    said = dump("+model.rotary_base=500", fails=True)
    assert "teacher.model.rotary_base: None in the store, 500 now" in said
    said = dump("+model.seed=5", "model.micro_batch_size=2", "+model.masked_softmax_fusion=false")
    assert "the store is complete; nothing is dumped" in said
    dump("+model.rotary_base=500", "overwrite=true")
    assert Store(tmp_path / "store").spec.teacher == {**recorded, "model": {"rotary_base": 500}}


def test_weights_held_in_the_precision_are_another_teacher(world: Path, tmp_path: Path) -> None:
    settings = [each for each in SETTINGS if "precision" not in each]
    arguments = [
        *settings,
        "trainer.precision=bf16",
        f"model.restore_from_path={world}/llama.nemo",
        f"data.file_path={world}/train.jsonl",
        f"output_dir={tmp_path}/store",
    ]
    run_script("dump_teacher_topk.py", *arguments)
    assert set(Store(tmp_path / "store").spec.teacher) == {"name", "fingerprint", "precision"}
    done = run_script("dump_teacher_topk.py", *arguments, "model.megatron_amp_O2=true", fails=True)
    assert "teacher.weights: None in the store, 'bf16' now" in done.stderr
