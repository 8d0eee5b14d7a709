"""Split a domain's data by module into train.jsonl, valid.jsonl and test.jsonl.

`code`: a function's signature and docstring → its body, as in the demo. `prose`: name and summary
line of a function or class → the paragraphs that describe it. Test modules are dealt to groups,
which the bootstrap draws: samples of one module are alike. data.json describes the splits, and
counts the held-out samples whose prompt is also one of the training split: different modules may
have functions of the same signature and docstring, with other bodies.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "demo"))

import make_data
from make_data import Pair
from prose import descriptions

SHARES = {"test": 0.15, "valid": 0.06}  # of the modules; the rest is for training


def split_of(module: str) -> str:
    """A module's split, a function of its name."""
    place = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little") / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def read_pairs(domain: str, packages: list[str]) -> list[Pair]:
    """All pairs of the packages, without repeated answers."""
    found: dict[str, Pair] = {}
    for package in packages:
        for module, path in make_data.package_modules(package):
            if domain == "code":
                for pair in make_data.extract(package, module, path):
                    found.setdefault(make_data.body_key(pair), pair)
            else:
                for pair in descriptions(package, module, path):
                    found.setdefault(pair.output, pair)
    return list(found.values())


def sized(pairs: list[Pair], tokenizer: Any, max_tokens: int) -> list[Pair]:
    """The pairs of at most `max_tokens` tokens, with their lengths."""
    result = []
    for pair in pairs:
        text = make_data.TEMPLATE.format(input=pair.input, output=pair.output)
        if (tokens := len(tokenizer.tokenize(text)) + 1) <= max_tokens:
            result.append(replace(pair, tokens=tokens))
    return result


def deal(pairs: list[Pair], groups: int) -> list[int]:
    """The group of each pair: modules are assigned, largest first, to the smallest group.

    Errors: typer.BadParameter where there are fewer modules than groups.
    """
    counts = Counter(pair.module for pair in pairs)
    if len(counts) < groups:
        raise typer.BadParameter(f"{len(counts)} test modules cannot make {groups} groups")
    sizes = [0] * groups
    home = {}
    for module, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        home[module] = sizes.index(min(sizes))
        sizes[home[module]] += count
    return [home[pair.module] for pair in pairs]


def main(
    domain: Annotated[str, typer.Argument(help="code or prose")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer directory, for the token counts")],
    output_dir: Annotated[Path, typer.Option(help="where the files go")],
    packages: Annotated[str, typer.Option(help="with commas between")],
    train: Annotated[int, typer.Option(help="samples")],
    valid: Annotated[int, typer.Option(help="samples")],
    test: Annotated[int, typer.Option(help="samples")],
    groups: Annotated[int, typer.Option(help="groups of the test split")],
    max_tokens: Annotated[int, typer.Option(help="prompt, answer and end-of-sequence")],
    seed: Annotated[int, typer.Option(help="of the choice among the usable samples")] = 0,
) -> None:
    """Write the three splits, data.json and LICENSES.txt."""
    names = packages.split(",")
    encode = AutoTokenizer.from_pretrained(str(tokenizer))
    usable = sized(read_pairs(domain, names), encode, max_tokens)
    output_dir.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"domain": domain, "max_tokens": max_tokens, "usable": len(usable)}
    prompts: set[str] = set()  # of the training split, once it is chosen
    for split, count in (("train", train), ("valid", valid), ("test", test)):
        side = [pair for pair in usable if split_of(pair.module) == split]
        chosen = make_data.choose(side, count, split, seed)
        make_data.write_jsonl(output_dir / f"{split}.jsonl", chosen)
        about[split] = {
            "samples": len(chosen),
            "modules": len({pair.module for pair in chosen}),
            "tokens": sum(pair.tokens for pair in chosen),
        }
        if split == "train":
            prompts = {pair.input for pair in chosen}
        else:
            about[split]["prompts_in_training"] = sum(pair.input in prompts for pair in chosen)
        if split == "test":
            about["groups"] = deal(chosen, groups)
    sources, licences = make_data.sources(tuple(map(distribution, names)))
    about["sources"] = [{**row, "licence": short_licence(row)} for row in sources]
    about["example"] = asdict(chosen[0])
    (output_dir / "LICENSES.txt").write_text(licences, encoding="utf-8")
    (output_dir / "data.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps({key: about[key] for key in ("train", "valid", "test", "usable")}))


def short_licence(source: dict[str, str]) -> str:
    """The name of a licence, also if the package's metadata have its full text."""
    if "\n" not in source["licence"]:
        return source["licence"]
    classifiers = importlib.metadata.metadata(source["package"]).get_all("Classifier") or []
    names = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License")]
    return names[0] if names else "see LICENSES.txt"


def distribution(package: str) -> str:
    """The distribution name of an installed package."""
    return {"sklearn": "scikit-learn"}.get(package, package)


if __name__ == "__main__":
    typer.run(main)
