"""How sizes in bytes are written, in flags and in messages."""

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes of '8GiB', '500 MB' or '1048576'. ValueError for anything else."""
    text = text.strip()
    number = text.rstrip("BbIiKkMmGgTt ")
    factor = _UNITS.get(text[len(number) :].strip().upper())
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if factor is None or not 0 < value * (factor or 1) < 1 << 62:
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with KiB, MiB, GiB or TiB")
    return int(value * factor)


def format_bytes(size: float) -> str:
    """'8.0 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
