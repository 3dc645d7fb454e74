"""Registries of the OCI distribution specification: resolve a name, get a document, fetch a blob."""

from layercache.registry._flow import Document
from layercache.registry._registry import Registry
from layercache.registry.auth import Anonymous, Credential, Credentials, DockerConfig, Password
from layercache.registry.ecr import EcrCredentials

__all__ = [
    "Anonymous",
    "Credential",
    "Credentials",
    "DockerConfig",
    "Document",
    "EcrCredentials",
    "Password",
    "Registry",
]
