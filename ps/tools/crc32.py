"""The CRC-32 of bytes that become known piece by piece, in any order.

As in zlib's `crc32_combine`: what follows multiplies a CRC, as a polynomial over GF(2), by x^8 for each
byte, modulo the CRC's own polynomial. So a piece contributes its CRC times x^(8 × bytes after it), and
contributions add up, which over GF(2) is exclusive or.
"""

import zlib

# Polynomials are written as zlib has them: the highest bit is the coefficient of x^0.
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_X8 = 1 << 23


def contribution(piece: memoryview, bytes_after: int) -> int:
    """What `piece` adds to the CRC-32 of a whole in which `bytes_after` bytes follow it.

    The exclusive or over pieces that make up the whole is the CRC-32 of the whole.
    """
    return _times(zlib.crc32(piece), _x8_to(bytes_after))


def _x8_to(power: int) -> int:
    result, square = _ONE, _X8
    while power:
        if power & 1:
            result = _times(result, square)
        square = _times(square, square)
        power >>= 1
    return result


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
