"""Nothing is written through a link that somebody planted."""

from __future__ import annotations

from pathlib import Path

from tests.cli.test_cli import nemo_kd
from tests.store.samples import spec, store


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    source, victim = store(tmp_path / "s", spec()), tmp_path / "victim"
    victim.write_text("precious")
    for name in ("out.jsonl", "part-0.jsonl", "part-1.jsonl", "page.html"):
        (tmp_path / f".{name}.tmp").symlink_to(victim)
    nemo_kd("convert", source, tmp_path / "out.jsonl")
    nemo_kd("convert", source, tmp_path / "part-CHUNK_ID.jsonl", "--samples-per-chunk", 4)
    nemo_kd("show", source, 3, "--ids", "--html", tmp_path / "page.html")
    assert victim.read_text() == "precious"
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl").symlink_to(victim)  # the target itself: replaced, not followed
    nemo_kd("convert", source, tmp_path / "out.jsonl", "--overwrite")
    assert victim.read_text() == "precious" and not (tmp_path / "out.jsonl").is_symlink()
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert all((tmp_path / name).is_symlink() for name in hidden)
