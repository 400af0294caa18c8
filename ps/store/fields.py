"""Reading JSON files that others may have touched: every value is checked before it is used."""

import json
from pathlib import Path
from typing import NoReturn

from ps.store.errors import DamagedError

LARGEST = 2**62
"""No size, step or count is larger, so that they fit whatever integer they are put into."""


class Fields:
    """One JSON object of a file, read field by field.

    Every error is a DamagedError that names file and field and ends with `remedy`: what to do about it.
    """

    def __init__(self, value: object, file: Path, remedy: str, place: str = "") -> None:
        self.file = file
        self._remedy = remedy
        self._place = place
        if not isinstance(value, dict):
            self.refuse("", f"is a {type(value).__name__}, not an object")
        self._value: dict[str, object] = value

    @staticmethod
    def of_file(file: Path, remedy: str) -> "Fields":
        """The JSON object in a file."""
        try:
            return Fields(json.loads(file.read_bytes()), file, remedy)
        except OSError as error:
            raise DamagedError(f"cannot read {file}: {error.strerror or error}; {remedy}") from error
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{file} is not JSON ({error}); {remedy}") from error

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raises the DamagedError of a field."""
        raise DamagedError(f"{self.file} is damaged: {self._path(name) or 'it'} {why}; {self._remedy}")

    def names(self) -> list[str]:
        return list(self._value)

    def value(self, name: str) -> object:
        if name not in self._value:
            self.refuse(name, "is missing")
        return self._value[name]

    def integer(self, name: str, smallest: int = 0, largest: int = LARGEST) -> int:
        return self._integer(name, self.value(name), smallest, largest)

    def integers(self, name: str, largest: int = LARGEST) -> tuple[int, ...]:
        return tuple(self._integer(name, value, 0, largest) for value in self._list(name))

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            self.refuse(name, f"is {value!r}, not a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool):
            self.refuse(name, f"is {value!r}, not true or false")
        return value

    def child(self, name: str) -> "Fields":
        return Fields(self.value(name), self.file, self._remedy, self._path(name))

    def children(self, name: str) -> list["Fields"]:
        return [
            Fields(value, self.file, self._remedy, f"{self._path(name)}[{i}]")
            for i, value in enumerate(self._list(name))
        ]

    def _path(self, name: str) -> str:
        return ".".join(part for part in (self._place, name) if part)

    def _list(self, name: str) -> list[object]:
        value = self.value(name)
        if not isinstance(value, list):
            self.refuse(name, f"is a {type(value).__name__}, not a list")
        return value

    def _integer(self, name: str, value: object, smallest: int, largest: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
            self.refuse(name, f"has {value!r} where a number from {smallest} to {largest} belongs")
        return value
