"""Evidence: claims written down first, runs over seeds, paired statistics, a page that reports what held."""

from dyncomp.evidence.claims import Claim, digest, read_claims
from dyncomp.evidence.reproduce import reproduce

__all__ = ["Claim", "digest", "read_claims", "reproduce"]
