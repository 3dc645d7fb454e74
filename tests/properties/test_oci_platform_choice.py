"""Laws of the choice from an index."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from layercache import oci
from layercache.errors import NotFoundError
from layercache.oci import Descriptor, Digest, Index, MediaType, Platform, select

platforms = st.builds(
    Platform,
    st.sampled_from(["linux", "windows", "unknown"]),
    st.sampled_from(["amd64", "arm", "arm64", "s390x", "unknown"]),
    st.sampled_from(["", "v1", "v2", "v3", "v5", "v6", "v7", "v8", "v8.2", "v9", "odd"]),
    os_version=st.sampled_from(["", "10.0.1.5", "10.0.1.9", "10.0.2.1"]),
    os_features=st.frozensets(st.sampled_from(["a", "b"])),
)
types = st.sampled_from([oci.OCI_MANIFEST, oci.DOCKER_MANIFEST, oci.OCI_INDEX, MediaType("application/x-new")])


@st.composite
def entries(draw: st.DrawFn) -> list[Descriptor]:
    """Entries with digests of their own."""
    pairs = draw(st.lists(st.tuples(types, st.none() | platforms), max_size=8))
    return [Descriptor(t, Digest.of(bytes([n])), n, platform=p) for n, (t, p) in enumerate(pairs)]


def choice(found: list[Descriptor], platform: Platform, *, allow_unspecified: bool = True) -> Descriptor | None:
    try:
        return select(Index(oci.OCI_INDEX, tuple(found), raw=b""), platform, allow_unspecified=allow_unspecified)
    except NotFoundError:
        return None


@given(entries(), platforms)
def test_choice_fits_and_none_fits_better(found: list[Descriptor], platform: Platform) -> None:
    """What is chosen runs on the platform, nothing better is there, and nothing as good stands before it."""
    chosen = choice(found, platform)
    fitting = [
        e for e in found if e.platform and platform.matches(e.platform) and not e.media_type.value.endswith("new")
    ]
    fitting = [e for e in fitting if e.platform and (e.platform.os, e.platform.architecture) != ("unknown", "unknown")]
    if chosen is not None and chosen.platform is not None:
        ranks = [platform.rank(e.platform) for e in fitting if e.platform]
        assert chosen in fitting
        assert platform.rank(chosen.platform) == min(r for r in ranks if r is not None)
        assert fitting.index(chosen) == ranks.index(platform.rank(chosen.platform))
    else:
        assert not fitting


@given(entries(), platforms, st.data())
def test_entries_that_do_not_fit_change_nothing(
    found: list[Descriptor], platform: Platform, data: st.DataObject
) -> None:
    """Adding or taking away what the platform cannot run leaves the choice as it is."""
    chosen = choice(found, platform, allow_unspecified=False)
    strange = Descriptor(oci.OCI_MANIFEST, Digest.of(b"strange"), 7, platform=Platform("plan9", "mips"))
    place = data.draw(st.integers(0, len(found)))
    assert choice([*found[:place], strange, *found[place:]], platform, allow_unspecified=False) == chosen
    kept = [e for e in found if e == chosen or (e.platform is not None and platform.matches(e.platform))]
    if chosen is not None and chosen.platform is not None:
        assert choice(kept, platform, allow_unspecified=False) == chosen


@given(platforms)
def test_a_platform_runs_its_own_images_best(platform: Platform) -> None:
    """An image made for exactly this platform is of the best rank."""
    assert platform.rank(platform) == 0
    assert len(set(platform.candidates())) == len(platform.candidates())


@given(platforms, platforms, platforms)
def test_running_is_transitive_where_versions_are_left_out(a: Platform, b: Platform, c: Platform) -> None:
    """What runs on an older variant of a host runs on the host."""
    a, b, c = (Platform(p.os, p.architecture, p.variant, os_features=p.os_features) for p in (a, b, c))
    if a.matches(b) and b.matches(c):
        assert a.matches(c)
