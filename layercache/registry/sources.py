"""Where a registry's content may come from: mirrors, then the origin; each with its own certificates. Pure values."""

from __future__ import annotations

from dataclasses import dataclass, field

from layercache.errors import InvalidError
from layercache.registry._url import Url, UrlError, Zone, zone_of

__all__ = ["Mirror", "Tls"]


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates for one registry: ``ca`` are PEM files trusted beside the system's.

    ``cert`` (PEM) and ``key`` (PEM; may be in ``cert``) are shown to the registry itself and to no host it leads to.
    ``verify=False`` believes whoever answers at the registry's own address, and only there.
    """

    ca: tuple[str, ...] = ()
    cert: str = ""
    key: str = ""
    verify: bool = True


@dataclass(frozen=True, slots=True)
class Mirror:
    """A host to ask before the registry itself. ``url`` is ``[http[s]://]host[:port][/path]``.

    Without a scheme it is https, http on loopback. ``resolve`` lets it say what a tag means, ``pull`` lets it give
    manifests and blobs by digest. ``/v2`` is added to its path unless ``override_path``. ``headers`` go to it alone.
    """

    url: str
    resolve: bool = True
    pull: bool = True
    override_path: bool = False
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: Tls = Tls()
    dial_timeout: float | None = None

    @property
    def base(self) -> Url:
        """Its URL, parsed.

        :raises InvalidError: if it is none.
        """
        text = self.url
        try:
            base = Url.parse(text if "://" in text else f"https://{text}")
            if "://" not in text and (base.host == "localhost" or zone_of(base.host) is Zone.LOOPBACK):
                base = Url.parse(f"http://{text}")
        except UrlError as error:
            raise InvalidError(f"not a mirror: {error}") from None
        return base

    @property
    def prefix(self) -> str:
        """Path before the repository's name."""
        path = self.base.path.rstrip("/")
        return path if self.override_path or path.endswith("/v2") else f"{path}/v2"
