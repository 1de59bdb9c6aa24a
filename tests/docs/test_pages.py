"""What the pages say of this checkout is there: files and headings that they link, commands, targets, messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from sglang_sm120_launch.cli import COMMANDS

ROOT = Path(__file__).parents[2]
FOLDERS = (
    ".github", "bench", "configs", "docs", "evals", "launch", "overlay", "patches", "reference", "results", "tests",
)  # fmt: skip
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
FORMS = sorted((ROOT / ".github").rglob("*.yml"))
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^(?: {4}|\t).*$", re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
NAMED = re.compile(r"(?<![\w/.-])(?:docs|results)/[\w.-]+(?:/[\w.-]+)*")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def anchors(page: Path) -> set[str]:
    """The names GitHub gives to the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        plain = LINK.sub(lambda link: link.group()[1:].partition("](")[0], heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def prose(page: Path) -> str:
    """The text of a page without its code."""
    return CODE.sub("", INDENTED.sub("", FENCED.sub("", page.read_text(encoding="utf-8"))))


def code(page: Path) -> str:
    """The code of a page: blocks and what stands in backticks; of a form the latter alone."""
    text = page.read_text(encoding="utf-8")
    kinds = (FENCED, INDENTED, CODE) if page.suffix == ".md" else (CODE,)
    return "\n".join(part for pattern in kinds for part in pattern.findall(text))


def broken(page: Path) -> Iterator[str]:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists():
            yield f"{target}: no such file"
        elif anchor and (place.suffix != ".md" or anchor not in anchors(place)):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path):
    assert not list(broken(page))


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n[1](#a-b-c) [2](#a) [3](b.md) [4](https://example.org) `[5](c.md)`\n    [6](d.md)\n")
    assert list(broken(page)) == ["#a: no such heading", "b.md: no such file"]


def texts() -> Iterator[tuple[Path, str]]:
    """Every text of the checkout that may name a page."""
    loose = (path for pattern in ("*.md", "*.toml", "Makefile") for path in ROOT.glob(pattern))
    for path in [*loose, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]:
        if path.is_file() and path.suffix in (".md", ".py", ".yaml", ".yml", ".toml", ".patch", ""):
            yield path, path.read_text(encoding="utf-8", errors="replace")


def test_every_page_that_a_source_names_is_there():
    """`docs/…` and `results/…` in comments, docstrings, messages and the Makefile, as seen from the root."""
    lost = [
        f"{name(path)}: {found}"
        for path, text in texts()
        for found in NAMED.findall(text)
        if not (ROOT / found.rstrip(".")).exists()
    ]
    assert not lost, "\n".join(lost)


def test_every_target_and_command_is_there():
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    targets = phony.group(1).split()
    lost = []
    for page in [*PAGES, *FORMS]:
        text = code(page)
        for words in re.findall(r"\bmake((?: (?:\w+=\S+|[a-z][a-z0-9-]*))+)", text):
            lost += [f"{name(page)}: make {word}" for word in words.split() if "=" not in word and word not in targets]
        lost += [
            f"{name(page)}: sglang-sm120 {word}"
            for word in re.findall(r"(?<![\w./-])sglang-sm120 ([a-z]+)\b", text)
            if word not in COMMANDS
        ]
    assert not lost, "\n".join(lost)


def test_every_yaml_block_can_be_read():
    blocks = [block for page in PAGES for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert blocks and all(isinstance(yaml.safe_load(block), dict) for block in blocks)


def test_the_messages_of_the_faq_are_ours():
    """What a heading begins with in backticks is a part of a sentence that this project prints."""
    sentences = re.findall(r"^### `([^`]+)`", (ROOT / "docs/faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    sources = [text for path, text in texts() if path.suffix in (".py", ".patch") or path.name == "Makefile"]
    assert sentences
    assert not [sentence for sentence in sentences if not any(sentence in text for text in sources)]


@pytest.mark.parametrize("form", [form for form in FORMS if form.name != "config.yml"], ids=name)
def test_a_form_is_one_that_github_takes(form: Path):
    found = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= found.keys()
    kinds = {"markdown": {"value"}, "input": {"label"}, "textarea": {"label"}, "dropdown": {"label", "options"}}
    for part in found["body"]:
        assert kinds[part["type"]] <= part["attributes"].keys()
    names = [part["id"] for part in found["body"] if part["type"] != "markdown"]
    assert len(names) == len(set(names))
