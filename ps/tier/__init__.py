"""The storage tier: what a server holds stays under its memory limit, and what does not fit is on disk.

`Tier` is the memory of a server, `Part` what is counted and moved, `Area` a folder of spill files.
"""

from ps.tier.area import Area
from ps.tier.incoming import Incoming
from ps.tier.leases import Lease
from ps.tier.lent import Lent
from ps.tier.part import NEVER, SMALL_BYTES, Part
from ps.tier.policy import FarthestNextUse, LeastRecentlyUsed, Policy, policy_named
from ps.tier.read_ahead import ReadAhead
from ps.tier.tier import Tier

__all__ = [
    "NEVER",
    "SMALL_BYTES",
    "Area",
    "FarthestNextUse",
    "Incoming",
    "Lease",
    "LeastRecentlyUsed",
    "Lent",
    "Part",
    "Policy",
    "ReadAhead",
    "Tier",
    "policy_named",
]
