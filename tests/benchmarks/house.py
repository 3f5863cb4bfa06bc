"""The size, language and structure of both packages, counted from their source.

python -m tests.benchmarks.house [--json] [--details NAME]

Nothing is timed and nothing is imported: Python is read with `ast` and `tokenize`, documents and the page as text.
tests/test_house.py holds every figure of the summary against its limit.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.report import ROOT, environment, show

PACKAGES = ("gns_controller", "trainer_hooks")
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS, FEWEST_WORDS = 400, 60, 8, 4

FRAGMENT_OPENERS = frozenset(
    [
        "what",
        "whether",
        "of",
        "for",
        "who",
        "whom",
        "whose",
        "in",
        "which",
        "how",
        "where",
        "when",
        "why",
        "with",
        "without",
        "as",
        "at",
        "by",
        "from",
        "to",
        "on",
        "if",
        "so",
        "than",
        "that",
        "because",
        "since",
        "until",
        "while",
        "but",
        "and",
        "or",
        "nor",
        "also",
        "under",
        "over",
        "between",
        "among",
    ]
)
"""A docstring that begins with one of these leans on its neighbour, and documentation tools print it alone."""

BANNED = {
    "verbs of people for programs": r"\b(hears?|heard|tells?|told|speaks?|spoken?|obeys?|obeyed|knows|wants|says)\b",
    "persons where a part is meant": r"\b(nobody|somebody|everybody|whoever)\b",
    "is no": r"\b(is|are|was|were|be) no (?!longer\b|more\b|less\b|matter\b|\w+er\b)(?=[a-z])",
    "words for orders": r"\b(the word back|gives? the word|operators?' words?|an operator's (word|order)s?)\b",
}
"""Patterns for docstrings, comments and messages of the packages; see `banned_words` for what is read."""

BANNED_IN_DOCUMENTS = {
    "verbs of people for programs": r"\b(hears|heard|told|speaks|spoke|spoken|obeys?|obeyed)\b",
    "persons where a part is meant": BANNED["persons where a part is meant"],
    "is no": BANNED["is no"],
    "words for orders": BANNED["words for orders"],
}
"""Patterns for documents and the page, whose readers may well know, want, say and tell."""

VAGUE_LOCALS = frozenset({"found", "each", "told", "wanted", "asked", "strange", "strangers", "everybody", "mine"})

Place = tuple[str, int, str]
"""Path, line and what stands there."""


class Source(NamedTuple):
    """One module, parsed."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Path from the root."""
        return str(self.path.relative_to(ROOT))


def sources() -> list[Source]:
    """All modules of both packages."""
    return [
        Source(path, _module_of(path), text, ast.parse(text))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for text in [path.read_text(encoding="utf-8")]
    ]


def documents() -> list[Path]:
    """What users read: README, docs without evidence and decisions' dates, the page, the forge's files."""
    markdown = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]
    page = ROOT / "gns_controller" / "web" / "page"
    return [*markdown, *sorted(p for p in page.glob("*") if p.suffix in (".html", ".js"))]


def _module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# ---------------------------------------------------------------------------- sizes


def files_over_limit(modules: list[Source]) -> list[Place]:
    """Files of more than 400 lines."""
    lengths = [(source, source.text.count("\n")) for source in modules]
    return [(source.name, lines, f"{lines} lines") for source, lines in lengths if lines > MOST_LINES]


def _functions(source: Source) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(source.tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield owner + child.name, child


def functions_over_limit(modules: list[Source]) -> list[Place]:
    """Functions of more than 60 lines, docstring included."""
    return [
        (source.name, node.lineno, f"{name}: {lines} lines")
        for source in modules
        for name, node in _functions(source)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_FUNCTION_LINES
    ]


def functions_over_parameters(modules: list[Source]) -> list[Place]:
    """Functions with more than eight parameters, self and cls not counted."""
    rows = []
    for source in modules:
        for name, node in _functions(source):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
            if count > MOST_PARAMETERS:
                rows.append((source.name, node.lineno, f"{name}: {count} parameters"))
    return rows


# ---------------------------------------------------------------------------- language


def docstrings(source: Source) -> Iterator[tuple[int, str]]:
    """Docstrings of the module, its classes and functions, and the ones that stand under a field or a constant."""
    for node in ast.walk(source.tree):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield child.lineno, child.value.value


def fragments(modules: list[Source]) -> list[Place]:
    """Docstrings that do not stand alone: by their first word, or with fewer than four words."""
    rows = []
    for source in modules:
        for line, text in docstrings(source):
            first_line = text.strip().split("\n")[0]
            words = re.findall(r"[^\s]+", first_line)
            opener = re.sub(r"\W", "", words[0]).lower() if words else ""
            if opener in FRAGMENT_OPENERS or len(words) < FEWEST_WORDS:
                rows.append((source.name, line, first_line))
    return rows


def _comments(source: Source) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT and not re.match(r"# (noqa|type:|fmt:|pragma)", token.string):
            yield token.start[0], token.string


def _prose(source: Source) -> Iterator[tuple[int, str]]:
    """Docstrings, comments, and every other string with a space in it: messages, help texts, log lines."""
    yield from _comments(source)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def banned_words(modules: list[Source]) -> list[Place]:
    """Phrases that STYLE bans, in the prose of the packages, in documents and on the page."""
    rows: list[Place] = []
    for source in modules:
        for line, text in _prose(source):
            rows += [(source.name, line, hit) for hit in _hits(text, BANNED)]
    for path in documents():
        for number, text in enumerate(_without_code(path).split("\n"), start=1):
            rows += [(str(path.relative_to(ROOT)), number, hit) for hit in _hits(text, BANNED_IN_DOCUMENTS)]
    return rows


def _without_code(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        return text
    return re.sub(r"^```.*?^```", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.MULTILINE | re.DOTALL)


def _hits(text: str, patterns: dict[str, str]) -> list[str]:
    return [
        f"{kind}: {match.group(0)!r} in {text[max(match.start() - 40, 0) : match.end() + 30]!r}"
        for kind, pattern in patterns.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]


def vague_locals(modules: list[Source]) -> list[Place]:
    """Variables and parameters with names that fit anything."""
    rows = []
    for source in modules:
        for node in ast.walk(source.tree):
            name = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else ""
            name = node.arg if isinstance(node, ast.arg) else name
            if name in VAGUE_LOCALS:
                rows.append((source.name, getattr(node, "lineno", 0), name))
    return rows


def code_lines(source: Source) -> int:
    """Lines with code on them: no blank lines, docstrings or lines that hold a comment only."""
    in_docstrings: set[int] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            in_docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT)
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in layout:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - in_docstrings)


# ---------------------------------------------------------------------------- structure


def top_level_modules(package: str) -> list[Place]:
    """Modules that lie beside the packages of one distribution package."""
    paths = sorted((ROOT / package).glob("*.py"))
    return [(str(path.relative_to(ROOT)), 1, path.stem) for path in paths]


def imports_of(source: Source, known: frozenset[str]) -> set[str]:
    """Modules of ours that one imports when it is imported itself; imports inside functions come later."""
    targets: set[str] = set()
    waiting: list[ast.AST] = list(source.tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            targets |= {f"{node.module}.{alias.name}" for alias in node.names}
            if any(f"{node.module}.{alias.name}" not in known for alias in node.names):
                targets.add(node.module)
        waiting += ast.iter_child_nodes(node)
    return (targets & known) - {source.module}


def import_circles(modules: list[Source]) -> list[Place]:
    """Sets of modules that import each other, in a circle of any length (strongly connected components)."""
    known = frozenset(source.module for source in modules)
    arrows = {source.module: imports_of(source, known) for source in modules}
    reach: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        waiting = list(arrows[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += arrows[module]
        reach[start] = seen
    circles = {frozenset(other for other in reach[m] if m in reach[other]) for m in arrows if m in reach[m]}
    return [(min(circle), 1, " <-> ".join(sorted(circle))) for circle in sorted(circles, key=sorted)]


def rooms(modules: list[Source]) -> tuple[dict[str, int], set[tuple[str, str]]]:
    """First-level packages with their number of modules, and the arrows between them."""
    known = frozenset(source.module for source in modules)

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    sizes: dict[str, int] = {}
    arrows: set[tuple[str, str]] = set()
    for source in modules:
        sizes[room(source.module)] = sizes.get(room(source.module), 0) + 1
        arrows |= {
            (room(source.module), room(target))
            for target in imports_of(source, known)
            if room(target) != room(source.module)
        }
    return sizes, arrows


# ---------------------------------------------------------------------------- all of it


def measure() -> tuple[dict[str, float], dict[str, list[Place]], list[dict[str, Any]]]:
    """The summary, the places behind each figure, and one row per package."""
    modules = sources()
    places = {
        "files_over_400": files_over_limit(modules),
        "functions_over_60": functions_over_limit(modules),
        "functions_over_8_parameters": functions_over_parameters(modules),
        "docstrings_opening_with_a_fragment": fragments(modules),
        "banned_words": banned_words(modules),
        "vague_local_names": vague_locals(modules),
        "top_level_modules_trainer_hooks": top_level_modules("trainer_hooks"),
        "top_level_modules_gns_controller": top_level_modules("gns_controller"),
        "import_circles": import_circles(modules),
    }
    rows = []
    for package in PACKAGES:
        own = [source for source in modules if source.module.split(".")[0] == package]
        rows.append(
            {
                "package": package,
                "modules": len(own),
                "code_lines": sum(map(code_lines, own)),
                "comments": sum(len(list(_comments(source))) for source in own),
                "docstrings": sum(len(list(docstrings(source))) for source in own),
                "rooms": len([room for room in rooms(own)[0] if room != package]),
                "arrows_between_rooms": len(rooms(own)[1]),
            }
        )
    num_docstrings = sum(row["docstrings"] for row in rows)
    summary: dict[str, float] = {name: len(found) for name, found in places.items()}
    summary["docstrings_opening_with_a_fragment"] /= num_docstrings
    summary["comments_per_100_lines"] = (
        100 * sum(row["comments"] for row in rows) / sum(row["code_lines"] for row in rows)
    )
    return summary, places, rows


def main() -> None:
    """Print the counts, or with --details the places behind one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--details", metavar="NAME", help="print the places behind this figure of the summary")
    parser.add_argument("--under", default="", metavar="PATH", help="with --details: only places below this path")
    options = parser.parse_args()
    summary, places, rows = measure()
    if options.details is None:
        show({"environment": environment(), "rows": rows, "summary": summary}, as_json=options.json)
        return
    if options.details not in places:
        parser.error(f"--details {options.details!r} is not one of {', '.join(places)}")
    for path, line, text in places[options.details]:
        if path.startswith(options.under):
            print(f"{path}:{line}: {text}")


if __name__ == "__main__":
    sys.exit(main())
