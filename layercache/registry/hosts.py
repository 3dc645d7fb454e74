"""containerd's and docker's directories of registry hosts (``hosts.toml``, ``certs.d``), read as they are."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from layercache.errors import InvalidError
from layercache.registry.sources import Mirror, Tls

__all__ = ["read_hosts"]

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def read_hosts(directory: str | os.PathLike[str], host: str) -> tuple[tuple[Mirror, ...], Mirror | None]:
    """Mirrors of the registry ``host``, in order, and its ``server`` or certificates where the directory names them.

    Looked for in ``HOST_PORT_``, ``HOST`` and ``_default`` below ``directory``; the first that exists counts. Without a
    ``hosts.toml`` its ``*.crt`` and ``*.cert`` with ``*.key`` are the certificates, as docker has them.

    :raises InvalidError: if the file is not as containerd describes it.
    """
    name, colon, port = host.rpartition(":")
    names = ([f"{name}_{port}_"] if colon and port.isdigit() else []) + [host, "_default"]
    for candidate in names:
        place = Path(directory) / candidate
        file = place / "hosts.toml"
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            if place.is_dir():
                return (), _certificates(place)
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidError(f"{file} cannot be read ({type(error).__name__})") from error
        try:
            return _parse(tomllib.loads(text), place)
        except (tomllib.TOMLDecodeError, InvalidError) as error:
            raise InvalidError(f"{file}: {error}") from error
        except RecursionError:
            raise InvalidError(f"{file}: nested too deeply") from None
    return (), None


def _parse(config: Mapping[str, object], place: Path) -> tuple[tuple[Mirror, ...], Mirror | None]:
    hosts = config.get("host", {})
    if not isinstance(hosts, dict):
        raise InvalidError("'host' is not a table")
    mirrors = []
    for url, table in hosts.items():
        if not isinstance(table, dict):
            raise InvalidError("an entry of 'host' is not a table")
        mirrors.append(_mirror(url, table, place))
    server = config.get("server", "")
    if not isinstance(server, str):
        raise InvalidError("'server' is not a text")
    tuned = {key for key in config if key not in ("host", "server")}
    return tuple(mirrors), _mirror(server, config, place) if server or tuned else None


def _mirror(url: str, table: Mapping[str, object], place: Path) -> Mirror:
    abilities = table.get("capabilities", ["pull", "resolve"])
    headers = table.get("header", {})
    if not isinstance(abilities, list) or not isinstance(headers, dict):
        raise InvalidError("'capabilities' is not a list, or 'header' no table")
    pairs: list[tuple[str, str]] = []
    for name, value in headers.items():
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str) or not re.fullmatch(r"[A-Za-z0-9-]+", name) or re.search(r"[\x00-\x1f]", one):
                raise InvalidError("an entry of 'header' is not a text for a header")
            pairs.append((name, one))
    cert, key = _client(table.get("client"), place)
    mirror = Mirror(
        url,
        resolve="resolve" in abilities,
        pull="pull" in abilities,
        override_path=table.get("override_path") is True,
        headers=tuple(pairs),
        tls=Tls(_paths(table.get("ca"), place), cert, key, table.get("skip_verify") is not True),
        dial_timeout=_seconds(table.get("dial_timeout")),
    )
    if url:
        _ = mirror.base  # says now if it is none
    return mirror


def _paths(value: object, place: Path) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise InvalidError("'ca' is neither a path nor a list of paths")
    return tuple(str(place / one) for one in values)


def _client(value: object, place: Path) -> tuple[str, str]:
    """The first pair: one identity is shown."""
    if value is None:
        return "", ""
    first = value[0] if isinstance(value, list) and value else value
    pair = [first] if isinstance(first, str) else first
    if not isinstance(pair, list) or not pair or not all(isinstance(one, str) for one in pair) or len(pair) > 2:
        raise InvalidError("'client' is neither a path nor pairs of paths")
    return str(place / pair[0]), str(place / pair[1]) if len(pair) == 2 and pair[1] else ""


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else ""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InvalidError("'dial_timeout' is not a duration such as 3s")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _certificates(place: Path) -> Mirror | None:
    ca = tuple(sorted(str(path) for path in place.glob("*.crt")))
    cert = next(iter(sorted(place.glob("*.cert"))), None)
    key = None if cert is None else cert.with_suffix(".key")
    if not ca and cert is None:
        return None
    return Mirror("", tls=Tls(ca, "" if cert is None else str(cert), "" if key is None else str(key)))
