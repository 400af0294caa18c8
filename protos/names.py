"""Which names a job and a parameter may have, which become folder names on every server, and which ids."""

import re

EMA = "ema"
"""The array that the moving average of weights is pulled and stored as, among those of optimizer state."""

ZARR_FILE = "zarr.json"

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_ID = re.compile(r"[0-9a-f]{1,64}")
_PARAMETER = re.compile(r"[A-Za-z0-9_][^/\\\x00-\x1f\x7f]{0,199}")


def check_job_name(name: str) -> None:
    """Raises ValueError unless `name` is 1 to 100 letters, digits, '_', '-' and '.', '.' not first."""
    _check_word("job name", name)


def check_parameter_name(name: str) -> None:
    """Raises ValueError unless `name` can be a folder: no slash, no control character, no leading '.'.

    zarr reserves names that begin with two underscores, and the name of its own files.
    """
    if name == ZARR_FILE:
        raise ValueError(f"{name!r} cannot be stored: zarr keeps its metadata in files of that name")
    if not _PARAMETER.fullmatch(name) or name.startswith("__") or len(name.encode()) > 250:
        raise ValueError(
            f"parameter name {name!r} cannot be stored: it has to begin with a letter, a digit or one "
            "underscore, and have neither slashes nor control characters and at most 200 characters"
        )


def check_tag(tag: str) -> None:
    """Raises ValueError unless `tag` can name a commit that is to be kept; the rules are those of job names."""
    _check_word("tag", tag)


def _check_word(what: str, text: str) -> None:
    if not isinstance(text, str) or not _WORD.fullmatch(text):
        raise ValueError(
            f"{what} {text!r} is not valid: use 1 to 100 letters, digits, '_', '-' and '.', beginning with a letter "
            "or a digit"
        )


def check_id(text: str) -> None:
    """Raises ValueError unless `text` can be the id of a commit or a restore: 1 to 64 of [0-9a-f]."""
    if not _ID.fullmatch(text):
        raise ValueError(f"id {text[:80]!r} is not valid: use 1 to 64 of the characters 0-9 and a-f")
