"""Registries of the OCI distribution specification: resolve a name, get a document, fetch a blob."""

from layercache.registry._flow import Document
from layercache.registry._pace import Pace
from layercache.registry._registry import Registry
from layercache.registry.auth import Anonymous, Credential, Credentials, DockerConfig, Password
from layercache.registry.ecr import EcrCredentials
from layercache.registry.hosts import read_hosts
from layercache.registry.sources import Mirror, Tls

__all__ = [
    "Anonymous",
    "Credential",
    "Credentials",
    "DockerConfig",
    "Document",
    "EcrCredentials",
    "Mirror",
    "Pace",
    "Password",
    "Registry",
    "Tls",
    "read_hosts",
]
