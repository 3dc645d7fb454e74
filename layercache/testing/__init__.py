"""Real counterparts for tests and demonstrations, shipped with the library.

``images``
    Builds real images, layers and layouts from files on this machine, the same bytes every time.
``registry``
    An HTTP registry on a loopback port that serves them, and misbehaves on request.
``disk``, ``schedule``, ``model``, ``simulation``, ``explore``, ``machine``
    A disk that forgets what was not flushed, virtual processes that step in any order on it, and the promises they are
    held to: by seed, in every order, and as a stateful test of hypothesis.

Nothing here is imported by the library itself.
"""

from __future__ import annotations

__all__: list[str] = []
