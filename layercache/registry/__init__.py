"""Registries of the OCI distribution specification: resolve a name, get a document, fetch a blob."""

from layercache.registry._flow import Document
from layercache.registry._registry import Registry
from layercache.registry.auth import Anonymous, Credential, Credentials, DockerConfig, Password

__all__ = ["Anonymous", "Credential", "Credentials", "DockerConfig", "Document", "Password", "Registry"]
