"""What the commands of a page read and write, in their order."""

from __future__ import annotations

import re
from pathlib import Path

from tests.distribution.blocks import blocks_of, commands

READS = re.compile(r"\+{0,2}(?:.*\.restore_from_path|data\.file_path|.*\.store)=(.+)")
WRITES = re.compile(r"(?:output_dir|exp_manager\.explicit_log_dir|output)=(.+)")
LOOKS = ("stats", "show", "inspect", "verify")  # of nemo-kd, at one store


def reads_and_writes(words: list[str]) -> tuple[list[str], list[str]]:
    """Paths that a command reads, and those that it makes; of a list `[a,b]` each."""
    if ">" in words:
        return [words[words.index(">") - 1]], [words[-1]]
    if words[:2] == ["nemo-kd", "export"]:
        return [words[2]], [words[3]]
    if words[0] == "nemo-kd":
        return ([words[2]] if words[1] in LOOKS else []), []
    if "examples/convert_hf_to_nemo.py" in words:
        source, output = words[words.index("examples/convert_hf_to_nemo.py") + 1 :][:2]
        return [source], [output]
    if not any(word.startswith("examples/") for word in words):
        return [], []
    reads = [match[1] for word in words if (match := READS.fullmatch(word))]
    writes = [match[1] for word in words if (match := WRITES.fullmatch(word))]
    return [path for read in reads for path in read.strip("[]").split(",")], writes


def missing(page: Path, given: set[str]) -> list[str]:
    """What a command of the page reads before another has made it, unless it is `given`."""
    made, absent = set(given), []
    for block in blocks_of(page):
        for words in commands(block.text) if block.language == "bash" else ():
            reads, writes = reads_and_writes(words)
            absent += [path for path in reads if path.partition("/")[0] not in made]
            made |= {path.partition("/")[0] for path in writes}
    return absent
