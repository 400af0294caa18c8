"""From the names in a checkpoint to the names in a model."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ps.tools.errors import ToolError

_LISTED = 10


@dataclass(frozen=True)
class Rule:
    """`OLD=NEW`: one name; `OLD*=NEW*`: a prefix; `re:PATTERN=NEW`: all of a name, with \\1 for its groups."""

    text: str
    pattern: re.Pattern[str]
    replacement: str

    @staticmethod
    def parse(text: str) -> "Rule":
        """Raises ValueError, saying what is wrong."""
        old, equals, new = text.rpartition("=")
        if not equals or not old or not new:
            raise ValueError(f"{text!r} is not OLD=NEW")
        if old.startswith("re:"):
            try:
                rule = Rule(text, re.compile(old.removeprefix("re:")), new)
                rule.pattern.sub(new, "")  # complains of groups that the pattern does not have
            except (re.error, IndexError) as error:
                raise ValueError(f"{text!r} is not a regular expression and its replacement: {error}") from None
            return rule
        literal = new.replace("\\", "\\\\")
        if old.endswith("*") and new.endswith("*"):
            return Rule(text, re.compile(re.escape(old[:-1]) + "(.*)", re.DOTALL), literal[:-1] + r"\g<1>")
        if "*" in old:
            raise ValueError(f"{text!r}: write OLD*=NEW* for names that begin with OLD, or re:PATTERN=NEW")
        return Rule(text, re.compile(re.escape(old)), literal)

    def new_name(self, name: str) -> str | None:
        """What `name` becomes; None if the rule is not about it."""
        match = self.pattern.fullmatch(name)
        return None if match is None else match.expand(self.replacement)


def read_rules(file: Path) -> list[str]:
    """The rules of a file: one a line; empty lines and those that begin with # are left out. Raises ToolError."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ToolError(
            f"cannot read {file}: {error}; --map-file takes a text file with OLD=NEW in each line"
        ) from error
    return [line for line in lines if line and not line.startswith("#")]


def rename(names: Sequence[str], rules: Iterable[Rule]) -> dict[str, str]:
    """The new name of each name, by the first rule that is about it; one without a rule keeps its name.

    Raises ToolError, listing them, for rules that are about no name, and for names that become the same.
    """
    rules = list(rules)
    unused = dict.fromkeys(rules)
    result: dict[str, str] = {}
    for name in names:
        result[name] = name
        for rule in rules:
            new = rule.new_name(name)
            if new is not None:
                unused.pop(rule, None)
                result[name] = new
                break
    if unused:
        raise ToolError(
            f"no tensor is left for {listed(rule.text for rule in unused)}; the first rule that fits a name is the one "
            f"that is used. The names are {listed(names)}"
        )
    sources: dict[str, list[str]] = {}
    for old, new in result.items():
        sources.setdefault(new, []).append(old)
    twice = [f"{new!r} (from {', '.join(map(repr, olds))})" for new, olds in sources.items() if len(olds) > 1]
    if twice:
        raise ToolError(
            f"several tensors would get one name: {listed(twice, quote=False)}; change --map, or --skip one of them"
        )
    return result


def listed(names: Iterable[str], *, quote: bool = True) -> str:
    """The first few, and how many more there are."""
    every = [repr(name) if quote else name for name in names]
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more
