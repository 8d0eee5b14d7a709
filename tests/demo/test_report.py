"""The report says what the files of a demo say, and nothing comes from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report
import report_data
import report_figures
import report_page

from nemo_kd.store import Sample, StoreSpec, StoreWriter
from nemo_kd.topk import TopK
from tests.browser import measure

FIGURES = {
    "teacher": (1.4712, 0.0003, 0.9991),
    "student": (6.8123, 5.4567, 0.0712),
    "sft": (2.0834, 0.9187, 0.6123),
    "kd": (1.9645, 0.6234, 0.6789),
}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The files of a finished demo, of four steps with a validation after each second."""
    for name, (loss, kl, agreement) in FIGURES.items():
        figures = {"sft_loss": loss, "kd_loss": kl, "top1_agreement": agreement, "loss": 9.0}
        write_json(
            tmp_path / f"evaluation/{name}.json", {f"heldout/{k}": v for k, v in figures.items()}
        )
    for name in ("sft", "kd"):
        lines = []
        for step in (1, 2, 3, 4):
            metrics = {"sft_loss": 7.0 - step, "top1_agreement": 0.1 * step}
            lines.append({**metrics, "train_step_timing in s": 2.0 + step, "step": step})
            if step % 2 == 0:
                keys = {"val/heldout/sft_loss": 8.0 - step, "val/heldout/kd_loss": 4.0 - step / 2}
                lines.append({**keys, "validation_loss": 1.0, "step": step})
        path = tmp_path / f"runs/{name}/metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = {"samples": 7, "modules": 3, "tokens": 4321}
    source = {"package": "sympy", "version": "1.14.0", "licence": "BSD"}
    write_json(tmp_path / "data.json", {"train": size, "heldout": size, "sources": [source]})
    write_json(tmp_path / "layers.json", {"kept": [0, 2], "influence": [0.9, 0.1, 0.5]})
    convert = {"command": "python examples/train.py name=<kd> a=1", "seconds": 61.0}
    kd = {"command": "python examples/train.py name=<kd> +model.kd.alpha=0.9", "seconds": 61.0}
    write_json(tmp_path / "steps.json", {"convert": convert, "student: KD + SFT": kd})
    completions = dict.fromkeys(("teacher", "sft", "kd"), " \n    return x < 1 & y")
    row: dict[str, Any] = {"prompt": 'def f(x):\n    """<b>&</b>"""', "reference": "\n    return 1"}
    row |= {"module": "a.b", "function": "f", "completions": completions}
    write_json(tmp_path / "completions.json", {"tokens": 64, "samples": [row]})
    exported = {"model": "out/<hf>", "sft_loss": 1.96449, "evaluated": 1.96452}
    exported |= {"same_completions": 5, "completions": 6}
    write_json(tmp_path / "exported.json", exported)
    write_store(tmp_path / "store-train")
    return tmp_path


def write_store(directory: Path) -> None:
    writer = StoreWriter(directory, StoreSpec(top_k=2, vocab_size=50))
    sample = Sample(
        row=0,
        input_ids=np.array([1, 2, 3], np.int32),
        loss_mask=np.array([0, 1, 1], np.uint8),
        topk=TopK(
            ids=np.array([[4, 5], [6, 7]]),
            logits=np.array([[-1.0, -2.0], [-1.0, -2.0]], np.float32),
            logsumexp=np.zeros((2, 1), np.float32),
        ),
    )
    with writer.shard(0) as shard:
        shard.add(sample)
    writer.finish(1)


def test_the_page_is_whole_and_loads_nothing(demo: Path) -> None:
    report.main(demo)
    html = (demo / "report.html").read_text()
    links = re.findall(r"(?:src|href)=[\"']([^\"']*)", html)
    assert all(link.startswith("#") for link in links)
    assert "<script" not in html and "@import" not in html and "url(http" not in html
    void = {"meta", "br", "hr", "img", "link"}
    open_tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in void:
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: Any) -> None: ...

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balance().feed(html)
    assert not open_tags
    assert html.count("<svg") == 5


def test_every_figure_of_the_table_is_a_file_s(demo: Path) -> None:
    table = report_page.results_table(report_data.read_demo(demo))
    cells = re.findall(r"<td[^>]*>([\d.]+)(?: %)?</td>", table)
    layers = {"teacher": 3}
    expected = [
        [str(layers.get(name, 2)), f"{loss:.3f}", f"{kl:.3f}", f"{100 * agreement:.1f}"]
        for name, (loss, kl, agreement) in FIGURES.items()
    ]
    assert cells == [cell for row in expected for cell in row]
    assert re.findall(r"class='best'>([\d.]+)", table) == ["1.964", "0.623", "67.9"]


@pytest.mark.parametrize(("kd", "word"), [(1.9645, "0.119 below"), (2.1834, "0.100 above")])
def test_the_summary_tells_either_outcome(demo: Path, kd: float, word: str) -> None:
    path = demo / "evaluation/kd.json"
    write_json(path, {**json.loads(path.read_text()), "heldout/sft_loss": kd})
    text = report_page.heading(report_data.read_demo(demo))
    assert word in text
    assert "KD + SFT (alpha 0.9) has" in text
    assert "After 4 steps" in text


def test_the_exported_student_is_compared_with_what_nemo_measured(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main(demo)
    assert "1.96449 in transformers, 1.96452 in NeMo" in capsys.readouterr().out
    text = report_page.in_transformers(report_data.read_demo(demo))
    assert "1.96449 nats per token in transformers and 1.96452 in NeMo; 5 of the 6" in text
    assert "out/&lt;hf&gt;" in text


def test_text_of_models_and_commands_is_escaped(demo: Path) -> None:
    html = report_page.page(report_data.read_demo(demo))
    assert "<b>" not in html
    assert "name=&lt;kd&gt;" in html


def test_a_run_that_was_started_again_counts_once(demo: Path) -> None:
    """NeMo moves what the first start logged; the second repeats steps after the checkpoint."""
    path = demo / "runs/kd/metrics.jsonl"
    first = report_data.read_run(path)
    lines = path.read_text().splitlines(keepends=True)
    (path.parent / "run_0").mkdir()
    lost = lines[3].replace("4.0", "4.5")
    assert lost != lines[3]
    (path.parent / "run_0/metrics.jsonl").write_text("".join([*lines[:3], lost]))
    path.write_text("".join(lines[3:]))
    again = report_data.read_run(path)
    assert again == first
    assert again.train("sft_loss").values == [6.0, 5.0, 4.0, 3.0]
    assert again.held_out("kd_loss") == report_data.Curve([2, 4], [3.0, 2.0])
    assert again.seconds_per_step == 4.5


def test_the_running_mean_looks_back_only() -> None:
    curve = report_data.Curve([1, 2, 3, 4], [4.0, 2.0, 0.0, 1.0])
    assert report_figures.running_mean(curve, 2).values == [4.0, 3.0, 1.0, 0.5]


@pytest.mark.parametrize("name", ["steps.json", "evaluation/sft.json", "runs/kd/metrics.jsonl"])
def test_a_missing_step_is_named(demo: Path, name: str) -> None:
    (demo / name).unlink()
    with pytest.raises(report_data.MissingStepError, match=re.escape(name)):
        report_data.read_demo(demo)


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_a_screen_and_its_charts_are_readable(
    demo: Path, tmp_path: Path, width: int
) -> None:
    path = demo / "completions.json"
    content = json.loads(path.read_text())
    content["samples"][0]["reference"] = "\n    return " + "a_long_name." * 20
    write_json(path, content)
    report.main(demo)
    measured = measure(demo / "report.html", width, tmp_path)
    assert measured["width"] <= width
    assert measured["inner"] == 0
    letters = [scale * report_figures.STYLE["font.size"] for scale in measured["scales"]]
    assert len(letters) == 5 and min(letters) >= 8
