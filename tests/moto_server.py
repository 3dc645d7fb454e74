"""moto's server with the ends of ECR tokens set right, ECR Public added, and a line on stdout for each AWS call.

moto says of every ECR token that it ended in 2015. ``LIFE`` (seconds from now) replaces that; without it, it stays.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

LIFE = os.environ.get("LIFE")
_PUBLIC = "SpencerFrontendService.GetAuthorizationToken"

Start = Callable[..., Any]


def main() -> None:
    """Serve on a free port until killed."""
    inner: Any = DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        target = environ.get("HTTP_X_AMZ_TARGET", "")
        scope = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2].partition(",")[0]
        print(json.dumps({"target": target or environ["PATH_INFO"], "scope": scope}), flush=True)
        if Path(os.environ["DOWN"]).exists():
            start("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"down"]
        if target == _PUBLIC:  # moto has no ECR Public
            token = base64.b64encode(b"AWS:public-token").decode()
            end = (datetime.now(UTC) + timedelta(seconds=float(LIFE or 3600))).timestamp()
            body = json.dumps({"authorizationData": {"authorizationToken": token, "expiresAt": end}}).encode()
            start("200 OK", [("Content-Type", "application/x-amz-json-1.1"), ("Content-Length", str(len(body)))])
            return [body]
        replies: list[bytes] = []
        heads: list[Any] = []
        replies.extend(inner(environ, lambda *args: heads.append(args)))
        if LIFE and target.endswith("ContainerRegistry_V20150921.GetAuthorizationToken"):
            reply = json.loads(b"".join(replies))
            for data in reply["authorizationData"]:
                data["expiresAt"] = (datetime.now(UTC) + timedelta(seconds=float(LIFE))).timestamp()
            replies = [json.dumps(reply).encode()]
            status, headers, *rest = heads[0]
            headers = [(k, v) for k, v in headers if k.lower() != "content-length"]
            heads[0] = (status, [*headers, ("Content-Length", str(len(replies[0])))], *rest)
        start(*heads[0])
        return replies

    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
