"""Pages of the site that are made when it is built, so that they can't lag behind: mkdocs calls `on_files`."""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from pretrain.config import Config
from pretrain.explain import Setting, default_of, kind_of

ROOT = Path(__file__).resolve().parents[1]
INTRODUCTION = """\
# Configuration

Every setting there is, in the words of the code, which are also those of `python pretrain/run.py --explain KEY`. A
recipe is a YAML file with those that differ from the defaults; `key=value` behind it on the command line wins over it.
A key that does not exist is refused, with the nearest one that does. `NAME` is a name of your choice.
"""
_BESIDE = re.compile(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)")
_SPECIAL = re.compile(r"(`[^`]*`)|([*_<\[\\])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages to those that lie in ``docs/``."""
    for name, text in {"configuration.md": reference(), "benchmarks.md": benchmarks()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def benchmarks() -> str:
    """What stands beside the scripts in ``benchmarks/``; of links to files there, which the site lacks, the text."""
    return _BESIDE.sub(r"\1", (ROOT / "benchmarks" / "README.md").read_text())


def reference() -> str:
    """All settings as Markdown: a heading per section, an entry per setting."""
    return INTRODUCTION + "\n".join(_section(Setting("", Config, None, "")))


def _section(section: Setting) -> Iterator[str]:
    """A section's own settings, and after them the sections in it."""
    if section.key:
        # Deeper ones would be too small to be seen, and the table of contents too long.
        yield f"\n{'#' * min(2 + section.key.count('.'), 4)} {section.key}\n"
        yield f"{escaped(section.doc)}\n"
        if type_of(section).endswith(" or null"):
            yield "May be `null`.\n"
    else:
        yield "\n## The run\n"
    below = section.children()
    for setting in below:
        if setting.section is None:
            yield f"- **`{setting.key}`** ({type_of(setting)})<br>{escaped(setting.doc)}"
    for setting in below:
        if setting.section is not None:
            # Sections by names of the user's choice are shown as one of them.
            yield from _section(setting.children()[0] if setting.named else setting)


def type_of(setting: Setting) -> str:
    """Its type and default, in the words of ``--explain``."""
    default = "" if setting.section is not None else default_of(setting)
    return kind_of(setting.hint) + (f", default `{default}`" if default else "")


def escaped(text: str) -> str:
    """Plain text as Markdown that shows the same; what stands between backticks stays."""
    return _SPECIAL.sub(lambda match: match[1] or f"\\{match[2]}", text)
