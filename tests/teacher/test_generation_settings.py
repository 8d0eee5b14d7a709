"""Settings of a generation: what has no effect is said, what changes the answers is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from nemo_kd.cli.teacher import load, read
from nemo_kd.errors import NemoKDError
from nemo_kd.sft import RowError
from nemo_kd.store import Store
from nemo_kd.teacher.config import GenerateConfig
from nemo_kd.teacher.generation.generate import generate
from nemo_kd.teacher.generation.step import GenerationError
from tests.processes import ROOT
from tests.teacher.typist import write_typist

SHARED = [
    "teacher.kind=hf",
    "trainer.precision=32",
    "trainer.devices=1",
    "data.prompt_template='{input}{output}'",
    "data.max_seq_length=64",
    "dump.top_k=3",
    "generation.max_new_tokens=5",
    "generation.keep_unfinished=true",
]


@pytest.fixture(scope="module")
def typist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("typist")
    write_typist(directory)
    return directory


def run(typist: Path, tmp_path: Path, *more: str, rows: list[Any] | None = None) -> Store:
    """Generate answers in this process; return the store."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or [{"input": "abc"}]))
    paths = [f"model.restore_from_path={typist}", f"data.file_path={data}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        overrides = [*SHARED, *paths, f"output_dir={tmp_path}/store", *more]
        cfg = compose("generate_with_teacher", overrides)
    config = read(cfg)
    assert isinstance(config, GenerateConfig)
    generate(config, load(config, cfg))
    return Store(tmp_path / "store")


def test_settings_without_effect_are_said(
    typist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["data.train_on=last_assistant", "data.add_eos=false", "data.no_answer=drop"]
    assert len(run(typist, tmp_path, *more)) == 1
    said = capsys.readouterr().err
    assert "data.train_on=last_assistant has no effect on rows read as prompt" in said
    assert "data.add_eos=false has no effect on generated answers" in said
    assert "data.no_answer=drop has no effect on a generation" in said


def test_a_seed_of_greedy_answers_is_said_and_does_not_make_another_store(
    typist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run(typist, tmp_path)
    assert before.spec.template["generation"]["seed"] == 1234  # as earlier versions recorded it
    assert "generation.seed" not in capsys.readouterr().err
    assert run(typist, tmp_path, "generation.seed=7").fingerprint == before.fingerprint
    said = capsys.readouterr().err
    assert "generation.seed=7 has no effect with generation.temperature=0" in said
    with pytest.raises(NemoKDError, match=r"template\.generation\.temperature"):
        run(typist, tmp_path, "generation.seed=7", "generation.temperature=1")


def test_greedy_answers_of_an_earlier_version_are_resumed_whatever_their_seed(
    typist: Path, tmp_path: Path
) -> None:
    """It recorded the seed that was given."""
    store = run(typist, tmp_path).directory
    for name in ("spec.json", "manifest.json"):
        text = (store / name).read_text()
        (store / name).write_text(re.sub(r'"seed":( ?)1234', r'"seed":\g<1>7', text))
    before = Store(store).spec
    assert before.template["generation"]["seed"] == 7
    for seed in ([], ["generation.seed=7"]):
        assert run(typist, tmp_path, *seed).spec == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("generation.samples_per_prompt=2", "would generate the same answer each time"),
        ("generation.top_p=0.9", "top_p=0.9 with temperature 0 has no effect"),
        (
            "generation.filter.pattern='(a'",
            r"pattern='\(a' is not a regular expression: missing \)",
        ),
        ("generation.filter.pattern=5", "pattern=5 is not a regular expression"),
        ("generation.filter.function=checks", "expected module:function, such as checks:is_right"),
        (
            "+dump.profile_options={seed: 1.9}",
            r"dump\.profile_options has seed=1\.9: expected a who",
        ),
        ("+dump.profile_options={seed: abc}", r"dump\.profile_options has seed='abc'"),
        ("+dump.profile_options={seed: null}", r"dump\.profile_options has seed=None"),
        ("+dump.profile_options={seed: true}", r"dump\.profile_options has seed=True"),
        ("+dump.profile_options={seed: -1}", r"dump\.profile_options has seed=-1"),
    ],
)
def test_what_needs_no_teacher_is_checked_before_it_is_loaded(
    tmp_path: Path, more: str, message: str
) -> None:
    draws = ["dump.profile=sampled"] if "seed" in more else []
    paths = [f"model.restore_from_path={tmp_path}/none", f"data.file_path={tmp_path}/none.jsonl"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        overrides = [*SHARED, *paths, f"output_dir={tmp_path}/store", *draws, more]
        cfg = compose("generate_with_teacher", overrides)
    with pytest.raises(NemoKDError, match=message):
        read(cfg)


def test_another_size_of_segments_of_a_complete_store_is_said(
    typist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(typist, tmp_path, "segment_bytes=1000")
    assert "segment_bytes" not in capsys.readouterr().err
    before = (tmp_path / "store/manifest.json").read_bytes()
    run(typist, tmp_path, "segment_bytes=2000")
    assert (
        "segment_bytes=2000 has no effect on a complete store; for other segments use `nemo-kd "
        f"convert {tmp_path}/store NEW --segment-bytes 2000`"
    ) in capsys.readouterr().err
    run(typist, tmp_path, "rows_per_shard=1")  # of the work in progress only
    assert (tmp_path / "store/manifest.json").read_bytes() == before
    assert "rows_per_shard" not in capsys.readouterr().err


def test_an_answer_ends_where_the_teachers_configuration_says(
    typist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chat model's end of a turn is another token than its tokenizer's end of sequence."""
    own = shutil.copytree(typist, tmp_path / "typist")
    (end,) = run(typist, tmp_path)[0].input_ids[3:4].tolist()
    assert "generation_config.json" not in capsys.readouterr().err
    settings = json.loads((own / "generation_config.json").read_text())
    del settings["_from_model_config"]
    ends = {"eos_token_id": [0, end]}
    (own / "generation_config.json").write_text(json.dumps({**settings, **ends}))
    store = run(own, tmp_path, "overwrite=true")
    assert store[0].input_ids[3:].tolist() == [end]
    assert store.spec.template["generation"]["stop_ids"] == [end]
    assert "answers also end at " in capsys.readouterr().err


def test_fields_that_the_default_template_does_not_read_are_refused(
    typist: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": "Say it.", "input": "abc", "output": ""}]
    with pytest.raises(NemoKDError, match=r"rows have instruction, which the default data.prompt"):
        run(typist, tmp_path, "data.prompt_template='{input} {output}'", rows=rows)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("model.answer_only_loss=false", "stores the top-K of generated tokens only"),
        ("generation.stop_ids=[0,96]", r"stop_ids has 96, but .* ids up to 94"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(
    typist: Path, tmp_path: Path, more: str, message: str
) -> None:
    with pytest.raises(NemoKDError, match=message):
        run(typist, tmp_path, more)
    assert not (tmp_path / "store").exists()


def test_a_field_with_half_of_a_surrogate_pair_is_kept(typist: Path, tmp_path: Path) -> None:
    rows = [{"input": "abc", "note": "ł"}, {"input": "def", "note": "cut \ud83d"}]
    run(typist, tmp_path, rows=rows)
    lines = (tmp_path / "store/answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert '"ł"' in lines[0] and "\\ud83d" in lines[1]
    assert [json.loads(line)["note"] for line in lines] == ["ł", "cut \ud83d"]


def test_another_filter_under_the_same_name_is_refused(
    typist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    checks = tmp_path / "checks_of_answers.py"
    checks.write_text("def keeps(answer, row):\n    return True\n")
    filtered = "generation.filter.function=checks_of_answers:keeps"
    assert len(run(typist, tmp_path, filtered)) == 1
    run(typist, tmp_path, filtered)
    checks.write_text("def keeps(answer, row):\n    return False\n")
    message = r"template\.generation\.filter\.function_sha256: '\w+' in the store, '\w+' now"
    with pytest.raises(NemoKDError, match=message):
        run(typist, tmp_path, filtered)


CUT = "generation.keep_unfinished=false"
UNFINISHED = (
    r"no store is written, because none of 1 answers was kept: 1 had not ended within "
    r"generation.max_new_tokens=5 \(raise it, or keep them with generation.keep_unfinished=true\)$"
)
FILTERED = r"none of 1 answers was kept: 1 were dropped by generation.filter \(change its pattern"


@pytest.mark.parametrize(
    ("more", "message"),
    [([CUT], UNFINISHED), (["generation.filter.pattern='^$'"], FILTERED)],
)
def test_a_generation_that_keeps_nothing_writes_no_store(
    typist: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    for _ in range(2):  # the same command says the same
        with pytest.raises(RowError, match=message):
            run(typist, tmp_path, *more)
        assert not (tmp_path / "store/manifest.json").exists()
    store = run(typist, tmp_path, "generation.max_new_tokens=6")  # the corrected command
    assert len(store) == 1 and store.spec.template["generation"]["max_new_tokens"] == 6


def test_a_generation_that_replaces_a_store_by_nothing_keeps_it(
    typist: Path, tmp_path: Path
) -> None:
    before = run(typist, tmp_path).fingerprint
    with pytest.raises(RowError, match=UNFINISHED):
        run(typist, tmp_path, CUT, "overwrite=true")
    assert Store(tmp_path / "store/.replaced").fingerprint == before
    run(typist, tmp_path, "overwrite=true")
    assert not (tmp_path / "store/.replaced").exists()


def test_other_files_beside_an_unused_spec_are_refused(typist: Path, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=UNFINISHED):
        run(typist, tmp_path, CUT)
    spec = (tmp_path / "store/spec.json").read_bytes()
    (tmp_path / "store/notes").touch()
    with pytest.raises(NemoKDError, match="holds notes, which is not part of a store"):
        run(typist, tmp_path)
    assert (tmp_path / "store/spec.json").read_bytes() == spec


def test_a_filter_that_fails_names_row_and_setting(
    typist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    checks = tmp_path / "failing_checks.py"
    checks.write_text("def keeps(answer, row):\n    return row['known'] or answer\n")
    (tmp_path / "broken_checks.py").write_text("1 / 0\n")
    rows = [{"input": "abc", "known": 1}, {"input": "abc"}]
    function = "generation.filter.function=failing_checks:keeps"
    message = rf"^{tmp_path}/prompts.jsonl, row 1: {function} failed with KeyError: 'known'$"
    with pytest.raises(GenerationError, match=message) as caught:
        run(typist, tmp_path, function, rows=rows)
    chain = [caught.value.__cause__, getattr(caught.value.__cause__, "__cause__", None)]
    assert isinstance(chain[1], KeyError)  # which NEMO_KD_TRACEBACK=1 shows
    function = "generation.filter.function=broken_checks:keeps"
    with pytest.raises(GenerationError, match="importing broken_checks failed with ZeroDivisionEr"):
        run(typist, tmp_path, function, rows=rows)
