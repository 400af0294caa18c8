"""The tokens file: who may do what with which jobs.

One rule a line, `TOKEN RIGHT JOBS`; `#` begins a comment:

    9f6c...e1  train  gpt-*     # may train every job whose name begins with gpt-
    9f6c...e1  read   *         # the same token, which may read all others

TOKEN: 16 to 512 of the characters that a bearer token may have (RFC 6750). RIGHT: read, train or admin, each of
which includes the one before. JOBS: a name, or a pattern with `*`, `?` and `[...]`. Several lines for one token
add up.
"""

import enum
import fnmatch
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass

MIN_TOKEN_CHARS = 16

_TOKEN = re.compile(rf"[A-Za-z0-9._~+/-]{{{MIN_TOKEN_CHARS},512}}={{0,2}}")
_JOBS = re.compile(r"[A-Za-z0-9_.*?!\[\]-]{1,200}")


class Right(enum.IntEnum):
    """What a token may do with a job. Each includes the one before."""

    READ = 1
    TRAIN = 2
    ADMIN = 3


@dataclass(frozen=True)
class Rule:
    """A right on the jobs whose names match a pattern."""

    right: Right
    jobs: str

    def allows(self, right: Right, job: str) -> bool:
        return self.right >= right and fnmatch.fnmatchcase(job, self.jobs)


@dataclass(frozen=True)
class Rules:
    """What one token may do. identity: the SHA-256 of the token, which nothing here keeps itself."""

    identity: bytes
    rules: tuple[Rule, ...]

    def allows(self, right: Right, job: str) -> bool:
        return any(rule.allows(right, job) for rule in self.rules)

    def allows_some(self, right: Right) -> bool:
        """Whether there may be a job on which the token has the right."""
        return any(rule.right >= right for rule in self.rules)

    def allows_all(self, right: Right) -> bool:
        """Whether the token has the right on every job, whatever its name."""
        return any(rule.right >= right and rule.jobs == "*" for rule in self.rules)


class Tokens:
    """The tokens that a server knows."""

    def __init__(self, rules: Iterable[Rules]) -> None:
        self._by_identity = {each.identity: each for each in rules}

    def __len__(self) -> int:
        return len(self._by_identity)

    def find(self, token: str) -> Rules | None:
        """The rules of a token as it came; takes as long for one that is nearly right as for any other."""
        asked = identity_of(token)
        found = None
        for each in self._by_identity.values():
            if hmac.compare_digest(each.identity, asked):
                found = each
        return found

    def known(self, identity: bytes) -> Rules | None:
        """The rules of a token that was found before."""
        return self._by_identity.get(identity)


def identity_of(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def parse_tokens(text: str) -> Tokens:
    """Raises ValueError that names the line, and never what stands in it: it may be a token."""
    rules: dict[bytes, list[Rule]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        if len(fields) != 3:
            raise ValueError(f"line {number} has {len(fields)} fields; a rule has three: TOKEN RIGHT JOBS")
        token, right, jobs = fields
        if not _TOKEN.fullmatch(token):
            raise ValueError(
                f"line {number}: the token has to have {MIN_TOKEN_CHARS} to 512 of the characters A-Z a-z 0-9 "
                "- . _ ~ + / (as 'openssl rand -hex 32' gives them)"
            )
        if right not in ("read", "train", "admin"):
            raise ValueError(f"line {number}: the right is none of read, train, admin (the order is TOKEN RIGHT JOBS)")
        if not _JOBS.fullmatch(jobs):
            raise ValueError(f"line {number}: no job has a name that matches the pattern; write * for all jobs")
        rules.setdefault(identity_of(token), []).append(Rule(Right[right.upper()], jobs))
    if not rules:
        raise ValueError("it has no rule, so that nobody could do anything; write lines of TOKEN RIGHT JOBS")
    return Tokens(Rules(identity, tuple(some)) for identity, some in rules.items())
