"""The file `zero-ps.json` of a data folder: whose it is."""

from dataclasses import dataclass
from pathlib import Path

from ps.store import durable
from ps.store.arrays import encode_document
from ps.store.errors import check_format
from ps.store.fields import Fields

FORMAT = 2
"""1 for the only folder of a server, 2 for one of several: older versions would take it for the only one."""

CLAIM_FILE = "zero-ps.json"


@dataclass(frozen=True)
class Claim:
    """disk: which of how many data folders of this shard's server, from 0."""

    shard: int
    num_shards: int
    disk: int = 0
    disks: int = 1

    @staticmethod
    def read(folder: Path) -> "Claim | None":
        """What the folder says; None if it says nothing. Raises DamagedError and NewerFormatError."""
        file = folder / CLAIM_FILE
        if not file.exists():
            return None
        fields = Fields.of_file(file, "put back the file, or choose another --data-dir")
        check_format(fields.integer("format", smallest=1), FORMAT, file)
        num_shards = fields.integer("num_shards", smallest=1)
        shard = fields.integer("shard", largest=num_shards - 1)
        if "disks" not in fields.names():
            return Claim(shard, num_shards)
        disks = fields.integer("disks", smallest=1, largest=1 << 20)
        return Claim(shard, num_shards, fields.integer("disk", largest=disks - 1), disks)

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        document: dict[str, object] = {"format": 1, "shard": self.shard, "num_shards": self.num_shards}
        if self.disks > 1:
            document |= {"format": FORMAT, "disk": self.disk, "disks": self.disks}
        durable.replace_file(folder / CLAIM_FILE, encode_document(document))


def read_claim(folder: Path) -> tuple[int, int] | None:
    """Whose data folder this is, as (shard, num_shards); None if it is nobody's. Raises as `Claim.read` does."""
    claim = Claim.read(folder)
    return None if claim is None else (claim.shard, claim.num_shards)
