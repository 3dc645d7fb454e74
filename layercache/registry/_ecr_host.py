"""Host names of Amazon ECR: which they are, and which region, partition and kind they say. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["PUBLIC_HOSTS", "EcrHost", "parse_ecr_host"]

PUBLIC_HOSTS = frozenset({"public.ecr.aws", "ecr-public.aws.com"})
"""ECR Public: one registry for the world, which everybody may read."""

# Suffix -> partition and the prefix that its regions have.
_SUFFIXES = {
    "amazonaws.com": ("aws", ""),
    "on.aws": ("aws", ""),
    "amazonaws.com.cn": ("aws-cn", "cn-"),
    "on.amazonwebservices.com.cn": ("aws-cn", "cn-"),
    "amazonaws.eu": ("aws-eusc", "eusc-"),
    "c2s.ic.gov": ("aws-iso", "us-iso-"),
    "sc2s.sgov.gov": ("aws-iso-b", "us-isob-"),
    "cloud.adc-e.uk": ("aws-iso-e", "eu-isoe-"),
    "csp.hci.ic.gov": ("aws-iso-f", "us-isof-"),
}
_DUAL = frozenset({"on.aws", "on.amazonwebservices.com.cn"})
_HOST = re.compile(
    r"(?P<account>[0-9]{12})\.dkr[.-]ecr(?P<fips>-fips)?\.(?P<region>[a-z]+(?:-[a-z0-9]+)+)\.(?P<suffix>[a-z0-9.-]+)"
)


@dataclass(frozen=True, slots=True)
class EcrHost:
    """A private registry of ECR. A token is good for all accounts of its region, so ``account`` is no part of a key."""

    account: str
    region: str
    partition: str
    fips: bool = False
    dual_stack: bool = False


def parse_ecr_host(host: str) -> EcrHost | None:
    """What a host name says, ``None`` for one that is not a private registry of ECR.

    The whole name is matched: a token must not go to a look-alike such as ``....amazonaws.com.example.com``.
    """
    match = _HOST.fullmatch(host.lower())
    if match is None or match["suffix"] not in _SUFFIXES:
        return None
    region, (partition, prefix) = match["region"], _SUFFIXES[match["suffix"]]
    if not region.startswith(prefix) or (not prefix and region.startswith(("cn-", "eusc-"))):
        return None
    if partition == "aws" and region.startswith("us-gov-"):
        partition = "aws-us-gov"
    return EcrHost(match["account"], region, partition, match["fips"] is not None, match["suffix"] in _DUAL)
