"""Which repositories a pattern makes public, and which patterns are refused because they would reach strangers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercache import LayerCache, Repository
from layercache.errors import InvalidPatternError
from layercache.public import PublicRepositories

ECR = "763104351884.dkr.ecr.*.amazonaws.com"


def public(pattern: str, repository: str) -> bool:
    return Repository.parse(repository) in PublicRepositories.of([pattern])


@pytest.mark.parametrize(
    ("pattern", "repository"),
    [
        ("public.ecr.aws/lambda/*", "public.ecr.aws/lambda/python"),
        ("public.ecr.aws/lambda/py*", "public.ecr.aws/lambda/python"),
        ("public.ecr.aws/*/base", "public.ecr.aws/team/base"),
        ("PUBLIC.ecr.AWS/lambda/python", "public.ecr.aws/lambda/python"),
        ("public.ecr.aws/lambda/python", "Public.ECR.aws/lambda/python"),
        (f"{ECR}/*", "763104351884.dkr.ecr.us-west-2.amazonaws.com/djl-inference"),
        ("763104351884.dkr.ecr.*.amazonaws.com.cn/*", "763104351884.dkr.ecr.cn-north-1.amazonaws.com.cn/x"),
        ("mirror-*.example.com/**", "mirror-7.example.com/a/b/c"),
        ("registry.example.com/a/**", "registry.example.com/a/b"),
        ("127.0.0.1:5000/demo/*", "127.0.0.1:5000/demo/serving"),
        ("*.example.com:5000/x", "a.example.com:5000/x"),
        ("localhost:5000/x", "localhost:5000/x"),
        ("[::1]:5000/x", "[0:0::1]:5000/x"),
        ("docker.io/nginx", "nginx"),
        ("docker.io/*", "nginx"),
        ("index.docker.io/library/nginx", "docker.io/nginx"),
        ("docker.io/org/*", "org/image"),
    ],
)
def test_a_pattern_makes_its_repositories_public(pattern, repository):
    """Hosts and names are spelled as references spell them."""
    assert public(pattern, repository)


@pytest.mark.parametrize(
    ("pattern", "repository"),
    [
        (f"{ECR}/*", "763104351884.dkr.ecr.evil.com.amazonaws.com/x"),  # a label, not labels
        (f"{ECR}/*", "763104351884.dkr.ecr.us-west-2.amazonaws.com.evil.com/x"),
        (f"{ECR}/*", "evil.763104351884.dkr.ecr.us-west-2.amazonaws.com/x"),
        (f"{ECR}/*", "763104351884.dkr.ecr.us-west-2.amazonaws.com:8443/x"),  # another port is another service
        (f"{ECR}/*", "763104351884.dkr.ecr.us-west-2.amazonaws.com/team/x"),
        (f"{ECR}/*", "763104351885.dkr.ecr.us-west-2.amazonaws.com/x"),
        ("public.ecr.aws/lambda/*", "public.ecr.aws/lambda/a/b"),
        ("public.ecr.aws/lambda/*", "public.ecr.aws/lambda"),
        ("public.ecr.aws/lambda/*", "public.ecr.aws/lambda2/python"),
        ("public.ecr.aws/lambda/*", "public-ecr.aws/lambda/python"),  # a dot is a dot
        ("public.ecr.aws/lambda/**", "public.ecr.aws/lambda"),
        ("public.ecr.aws/lambda", "public.ecr.aws/lambda/python"),
        ("127.0.0.1:5000/demo/*", "127.0.0.1:5001/demo/serving"),
        ("127.0.0.1/demo/*", "127.0.0.1:5000/demo/serving"),
        ("docker.io/*", "org/image"),
        ("docker.io/org/*", "registry-1.docker.io/org/image"),
        ("a*a.example.com/x", "a.example.com/x"),  # what stands before and after does not overlap
    ],
)
def test_a_pattern_reaches_no_further(pattern, repository):
    """A look-alike host, another port, a deeper name: not public."""
    assert not public(pattern, repository)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "*",
        "nginx",
        "lambda/*",
        "*/lambda",
        "**/x",
        "*.com/x",
        "registry.*/x",
        "*.example.*/x",
        "123.dkr.ecr.us-west-2.*.*/x",
        "*.com.cn/x",
        "*.co.uk/x",
        "10.0.0.*/x",
        "10.*.0.1/x",
        "[fe80::*]/x",
        "example.com:*/x",
        "example.com:50*0/x",
        "*.example.com:*/x",
        "*:5000/x",
        "example.com:99999/x",
        "example.com",
        "example.com/",
        "example.com/a/",
        "example.com//a",
        "example.com/A",
        "example.com/a:tag",
        "example.com/a@sha256:" + "0" * 64,
        "example.com/a?",
        "example.com/[ab]",
        "example.com/../a",
        "https://example.com/a",
        "user@example.com/a",
        "example.com/a**",
        "example.com/**/a",
        "example.com/a*b*c",
        "*a*.example.com/x",
        "**.example.com/x",
        "exa mple.com/x",
        "example.com/x\n",
    ],
)
def test_other_patterns_are_refused_when_the_cache_is_opened(root, pattern):
    """With a typed error, before anything is asked of the disk or the network."""
    with pytest.raises(InvalidPatternError):
        LayerCache(root, public=["public.ecr.aws/lambda/*", pattern], janitor=False)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("patterns", ["public.ecr.aws/lambda/*", [7]])
def test_what_is_no_list_of_texts_is_refused(root, patterns):
    """A single text would be a list of letters."""
    with pytest.raises(InvalidPatternError):
        LayerCache(root, public=patterns, janitor=False)


LABEL = st.text("ab0-", min_size=1, max_size=4).filter(lambda text: text[0] != "-" != text[-1])
HOST = st.lists(LABEL, min_size=2, max_size=5).map(".".join)
NAME = st.lists(st.text("ab0", min_size=1, max_size=4), min_size=1, max_size=4).map("/".join)


@given(HOST, st.sampled_from(["", ":80", ":443"]), NAME, st.data())
def test_a_star_stands_for_a_part_of_one_label_or_component(host, port, name, data):
    """Whatever is matched has the pattern's port, as many labels and components, and each part but the star's."""
    where = Repository(f"{host}{port}", name)

    def starred(part: str) -> str:
        start = data.draw(st.integers(0, len(part)))
        end = data.draw(st.integers(start, len(part)))
        return part[:start] + "*" + part[end:]

    labels, components = host.split("."), name.split("/")
    patterns = [
        [starred(part) if place < len(labels) - 2 and data.draw(st.booleans()) else part]
        for place, part in enumerate(labels)
    ]
    wanted = ".".join(one for (one,) in patterns) + port
    wanted += "/" + "/".join(starred(part) if data.draw(st.booleans()) else part for part in components)
    try:
        listed = PublicRepositories.of([wanted])
    except InvalidPatternError:
        return  # such as a-* of a-b: no host ends so
    assert where in listed
    other = Repository(data.draw(HOST) + data.draw(st.sampled_from(["", ":80"])), data.draw(NAME))
    if other in listed:
        assert other.host.partition(":")[2] == where.host.partition(":")[2]
        assert len(other.host.split(".")) == len(labels)
        assert other.host.partition(":")[0].split(".")[-2:] == labels[-2:]
        assert len(other.name.split("/")) == len(components)
    for longer in (f"x.{host}{port}", f"{host}.x{port}", f"x{host}.com{port}", f"{host}:8443"):
        assert Repository(longer, name) not in listed
    assert Repository(where.host, f"{name}/x") not in listed
