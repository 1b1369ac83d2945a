"""Texts of Debian packages: what lies in /usr/share/doc, and manual pages."""

from __future__ import annotations

import gzip
import html.parser
import re
from collections.abc import Iterator
from pathlib import Path

from fourfold.train.data.texts import UNKNOWN_LICENCE, Package, Text, named_licence

_HTML = (".html", ".htm")
_DOCUMENTS = (".txt", ".md", ".rst", *_HTML)
_PLAIN_NAMES = ("README", "NEWS", "FAQ", "HACKING", "INSTALL", "TODO", "AUTHORS", "HISTORY")
_LICENCE = re.compile(r"^License: *(\S.*)$", re.MULTILINE)
_MOST_LICENCES = 3
_DROPPED_TAGS = frozenset({"script", "style", "head"})
_BLOCKS = frozenset(
    {"p", "div", "br", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "table"}
)


def debian_texts(share: Path) -> Iterator[Text]:
    """The texts below a folder like /usr/share: `doc/PACKAGE/...`, then `man/man?/...`, English
    only, in an order that does not depend on the disk."""
    packages: dict[str, Package] = {}
    for folder in sorted((share / "doc").glob("*/")):
        package = packages[folder.name] = _package(folder)
        for path in sorted(folder.rglob("*")):
            name = path.name.removesuffix(".gz")
            wanted = name.endswith(_DOCUMENTS) or name.startswith(_PLAIN_NAMES)
            if not wanted or path.is_symlink() or not path.is_file():
                continue
            if (text := _read(path)) is not None:
                plain = _html_text(text) if name.endswith(_HTML) else text
                yield Text(package, path.relative_to(share).as_posix(), plain)
    owners = _owners(share)
    for path in sorted((share / "man").glob("man?/*")):
        if path.is_symlink() or not path.is_file() or (text := _read(path)) is None:
            continue
        owner = owners.get(path.as_posix(), "")
        unowned = Package("debian", owner or "manual pages", "", UNKNOWN_LICENCE)
        yield Text(
            packages.get(owner, unowned), path.relative_to(share).as_posix(), manual_text(text)
        )


def _read(path: Path) -> str | None:
    """A file's text, unpacked; None for what is none."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError, ValueError):
        return None


def _package(folder: Path) -> Package:
    """A package by its folder of documents."""
    told = _read(folder / "copyright") or ""
    names = list(dict.fromkeys(name.strip() for name in _LICENCE.findall(told)))
    licence = ", ".join(names[:_MOST_LICENCES]) + (", ..." if len(names) > _MOST_LICENCES else "")
    return Package("debian", folder.name, "", licence or named_licence(told))


def _owners(share: Path) -> dict[str, str]:
    """Which package a manual page belongs to, as far as dpkg knows."""
    owners = {}
    pages = (share / "man").as_posix() + "/"
    for listing in sorted(Path("/var/lib/dpkg/info").glob("*.list")):
        package = listing.stem.partition(":")[0]
        for line in (_read(listing) or "").splitlines():
            if line.startswith(pages):
                owners[line] = package
    return owners


class _Reader(html.parser.HTMLParser):
    """What a page shows, a line for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._dropped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._dropped += tag in _DROPPED_TAGS
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._dropped = max(0, self._dropped - (tag in _DROPPED_TAGS))
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self.parts.append(data)


def _html_text(text: str) -> str:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return _without_gaps("".join(reader.parts))


_ESCAPES = {
    r"\-": "-",
    r"\&": "",
    r"\e": "\\",
    r"\ ": " ",
    r"\~": " ",
    r"\0": " ",
    r"\|": "",
    r"\^": "",
    r"\%": "",
    r"\/": "",
    r"\,": "",
    r"\:": "",
    r"\'": "'",
    r"\`": "`",
    r"\c": "",
    r"\(cq": "'",
    r"\(oq": "'",
    r"\(aq": "'",
    r"\(lq": '"',
    r"\(rq": '"',
    r"\(dq": '"',
    r"\(bu": "*",
    r"\(em": "--",
    r"\(en": "-",
    r"\(mi": "-",
    r"\(co": "(c)",
    r"\(ga": "`",
    r"\(ha": "^",
    r"\(ti": "~",
    r"\(rs": "\\",
}
_ESCAPE = re.compile(
    r'\\".*$|\\f(?:\(..|\[[^\]]*\]|.)|\\s[-+]?\d+|\\[*n](?:\(..|\[[^\]]*\]|.)|'
    r"\\[hvwud]'[^']*'|\\m\[[^\]]*\]|\\\(..|\\\[[^\]]*\]|\\.",
    re.MULTILINE,
)
_HEADINGS = (".SH", ".SS", ".Sh", ".Ss", ".TP", ".PP", ".LP", ".P", ".IP", ".HP", ".Pp", ".sp")
_SPOKEN = re.compile(
    r"^\.(?:SH|SS|Sh|Ss|B|I|BR|RB|IR|RI|BI|IB|SM|SB|IP|Nm|Nd|Fl|Ar|Op|It|Pa|Xr|Ic|Cm|Li|Dq|Sq|Em|Sy|"
    r"Ql|Va|Fn|Ft|Fa|Dv|Ev|Er|UR|MT)\s+(.*)$"
)
_SILENT_BLOCK = re.compile(r"^\.(?:de|ig|TS)\b")


def manual_text(source: str) -> str:
    """The words of a manual page in roff, without layout, tables and macros' definitions."""
    lines: list[str] = []
    ends_with: str | None = None
    for line in source.splitlines():
        if ends_with is not None:
            ends_with = None if line.startswith(ends_with) else ends_with
        elif _SILENT_BLOCK.match(line):
            ends_with = ".TE" if line.startswith(".TS") else ".."
        elif line.startswith((".", "'")):
            if line.split(" ", 1)[0] in _HEADINGS:
                lines.append("")
            if spoken := _SPOKEN.match(line):
                alternating = re.match(r"^\.(?:BR|RB|IR|RI|BI|IB)\b", line) is not None
                lines.append(_unescaped(_arguments(spoken[1], "" if alternating else " ")))
        else:
            lines.append(_unescaped(line))
    return _without_gaps("\n".join(lines))


def _arguments(text: str, between: str) -> str:
    """The arguments of a macro, which quotes may hold together."""
    found = re.findall(r'"((?:[^"]|"")*)"|(\S+(?:(?<=\\) \S+)*)', text)
    return between.join(quoted or plain for quoted, plain in found)


def _unescaped(line: str) -> str:
    return _ESCAPE.sub(lambda match: _ESCAPES.get(match[0], ""), line)


def _without_gaps(text: str) -> str:
    """At most one empty line in a row, none at the ends, and no blanks before a line's end."""
    lines = (line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"
