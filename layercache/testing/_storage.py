"""Object storage as strict as S3: signed URLs for one method and a while, no second kind of credentials, XML errors."""

from __future__ import annotations

import hmac
import math
import time
from calendar import timegm
from urllib.parse import parse_qsl, urlencode

from layercache.testing._reply import Reply, Request

__all__ = ["refuse", "sign", "xml_error"]

_SECRET = b"scripted storage"
_DATE = "%Y%m%dT%H%M%SZ"


def sign(method: str, path: str, *, now: float, expires: float, session: bool) -> str:
    """Return the query that makes ``path`` good for ``method`` until ``expires`` seconds from ``now``."""
    lifetime = max(1, math.ceil(expires))
    date = time.strftime(_DATE, time.gmtime(now + expires - lifetime))
    query = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"AKIASCRIPTED/{date[:8]}/us-west-2/s3/aws4_request",
        "X-Amz-Date": date,
        "X-Amz-Expires": str(lifetime),
        "X-Amz-SignedHeaders": "host",
    }
    if session:
        query["X-Amz-Security-Token"] = "scripted-session"
    return urlencode({**query, "X-Amz-Signature": _signature(method, path, query)})


def refuse(request: Request, now: float) -> Reply | None:
    """Return the error S3 gives to ``request``, or nothing where it may have the object."""
    query = dict(parse_qsl(request.query))
    signature = query.pop("X-Amz-Signature", "")
    if not signature:
        return xml_error(403, "AccessDenied", "Access Denied")
    if "authorization" in request.headers:
        return xml_error(
            400,
            "InvalidArgument",
            "Only one auth mechanism allowed; only the X-Amz-Algorithm query parameter, Signature query string "
            "parameter or the Authorization header should be specified",
        )
    if not hmac.compare_digest(signature, _signature(request.method, request.path, query)):
        return xml_error(403, "SignatureDoesNotMatch", "The request signature we calculated does not match")
    end = timegm(time.strptime(query["X-Amz-Date"], _DATE)) + int(query["X-Amz-Expires"])
    if now >= end:
        if "X-Amz-Security-Token" in query:
            return xml_error(400, "ExpiredToken", "The provided token has expired.")
        return xml_error(403, "AccessDenied", "Request has expired")
    return None


def xml_error(status: int, code: str, message: str) -> Reply:
    """Return an error as S3 words it."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message><RequestId>SCRIPTED</RequestId></Error>"
    ).encode()
    headers = (("Content-Type", "application/xml"), ("x-amz-request-id", "SCRIPTED"))
    return Reply(status, (*headers, ("Content-Length", str(len(body)))), (body,), len(body))


def _signature(method: str, path: str, query: dict[str, str]) -> str:
    text = "\n".join((method, path, urlencode(sorted(query.items()))))
    return hmac.digest(_SECRET, text.encode(), "sha256").hex()
