"""Addresses as people write them."""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of 'host:port' or '[::1]:port'. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address: write HOST:PORT")
    return host, int(port)
