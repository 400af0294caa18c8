"""Addresses as people write them."""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of 'host:port' or '[::1]:port'. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{address!r} is not an address: an IPv6 address goes in brackets, [{host}]:{port}")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address: write HOST:PORT")
    return host, int(port)
