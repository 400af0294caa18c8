"""What of a memory limit is for whom, and what can therefore never fit."""

from protos.sizes import format_bytes
from ps.errors import OutOfBudget
from ps.store.direct import page_aligned


class Shares:
    """How `limit_bytes` are divided: a quarter for data on its way in, the rest for leases and what is reserved.

    reserved_bytes: of what never leaves memory. leased_bytes: of all leases together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.incoming_limit_bytes = limit_bytes // 4
        self.reserved_bytes = 0
        self.leased_bytes = 0

    @property
    def lease_limit_bytes(self) -> int:
        return self.limit_bytes - self.incoming_limit_bytes - self.reserved_bytes

    @property
    def left_to_reserve_bytes(self) -> int:
        """What leases are for is not all to be taken away for good."""
        return max(0, (self.limit_bytes - self.incoming_limit_bytes) // 2 - self.reserved_bytes)

    def check_fits(self, size: int, what: str) -> None:
        """Raises OutOfBudget if `size` bytes can never be in use together."""
        if size > self.lease_limit_bytes:
            least = -(-(size + self.reserved_bytes) * 4 // 3)
            raise OutOfBudget(
                f"{what} needs {format_bytes(size)} in memory at once, and this server has "
                f"{format_bytes(max(0, self.lease_limit_bytes))} for that: of its --memory of "
                f"{format_bytes(self.limit_bytes)}, {format_bytes(self.incoming_limit_bytes)} are for data on its way "
                f"in and {format_bytes(self.reserved_bytes)} for what is too small to spill; start it with --memory "
                f"{least} ({format_bytes(least)}) or more"
            )

    def check_arrives(self, size: int, what: str) -> None:
        """Raises OutOfBudget if `size` bytes can never come in together."""
        if page_aligned(size) > self.incoming_limit_bytes:
            least = 4 * page_aligned(size)
            raise OutOfBudget(
                f"{what} comes in {format_bytes(size)} at once, and this server takes in "
                f"{format_bytes(self.incoming_limit_bytes)}, a quarter of its --memory of "
                f"{format_bytes(self.limit_bytes)}; start it with --memory {least} ({format_bytes(least)}) or more"
            )
