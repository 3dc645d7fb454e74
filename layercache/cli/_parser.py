"""What can be typed: commands, options and their help. docs/cli.md repeats it, held by a test."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any, NoReturn

__all__ = ["UsageError", "build_parser"]

_EPILOG = """\
exit codes:
  0  done                          3  not found
  1  failed                        4  integrity: bytes are not what their digest says
  2  wrong usage                   5  partly done (see the command's help)
  130  interrupted with Ctrl-C     141  the reader of standard output went away

Data goes to standard output, everything else to standard error. With --json standard output is one JSON document:
sizes in bytes, times as RFC 3339. After an error it is empty; verify, doctor, rm, purge and a pull that could not keep
everything print their document whatever the exit code.

environment:
  LAYERCACHE_ROOT         the same as --root
  LAYERCACHE_NO_PROGRESS  not empty: the same as --no-progress (so does CI)
  LAYERCACHE_KMS_KEY      id, ARN or alias of the AWS KMS key of namespaces with --seal kms
  LAYERCACHE_KEYS         directory on a tmpfs for the keys of namespaces with --seal ephemeral
  NO_COLOR                not empty: progress bars without colours
"""


class UsageError(Exception):
    """The command line is wrong; the text says what and where to look."""


class _Parser(argparse.ArgumentParser):
    """Errors are one line, raised as :class:`UsageError`; options and arguments may come in any order."""

    _inside = False

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, then look at what argparse cannot say of options and arguments in any order."""
        parsed = super().parse_args(args, namespace)
        ways = ("namespace", "match", "resume", "of_public") if getattr(parsed, "command", "") == "purge" else ()
        if ways and sum(getattr(parsed, way) not in (None, False) for way in ways) != 1:
            raise UsageError(f"exactly one of NS, --match, --resume and --public; see {self.prog} purge --help")
        if ways and parsed.resume and parsed.trim:
            raise UsageError("--trim goes with NS or --match: what --resume finishes may be gone already")
        return parsed

    def print_help(self, file: Any = None) -> None:
        """Print the help, and fail where it cannot be printed: the inherited method ignores that."""
        print(self.format_help(), end="", file=file)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Let options stand between arguments (``rm A -n NS B``) in commands; the top level has the commands."""
        if self._subparsers is not None or self._inside:
            return super().parse_known_args(args, namespace)
        if "--" in (args or ()):
            return super().parse_known_args(args, namespace)  # argparse cannot do both
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """The same help on every Python: ``-n, --namespace NS``, arguments beside their meaning."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=32, **options)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        if action.nargs == 0:
            return names
        return f"{names} {self._format_args(action, action.dest.upper())}"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # noqa: PLC0415 - 20 ms that no other option needs

        print(f"layercache {version('layercache')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="layercache",
        usage="layercache COMMAND [arguments] [options]",
        description="Keep OCI image layers by digest, in namespaces, on this host's disk.",
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.set_defaults(root=None, json=False, quiet=False, verbose=False, no_progress=False)
    _add_globals(parser)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(
        title="commands", prog="layercache", dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )

    verb = _add(commands, "pull", "REF -n NS [options]", "fetch an image into a namespace", _PULL)
    verb.add_argument("reference", metavar="REF", help="HOST/NAME:TAG or HOST/NAME@DIGEST")
    _add_namespace(verb)
    _add_platform(verb)
    verb.add_argument("--jobs", metavar="N", type=_count, help="blobs fetched at a time")
    verb.add_argument("--fresh", action="store_true", help="fail if the tag cannot be resolved now")
    verb.add_argument("--timeout", metavar="S", type=_seconds, help="give up after S seconds")
    _add_access(verb)
    verb.add_argument(
        "--public",
        metavar="PATTERN",
        dest="patterns",
        action="append",
        default=[],
        help="blobs of such repositories are kept once for all: 'public.ecr.aws/lambda/*'; may be repeated",
    )
    _add_seal(verb)

    verb = _add(
        commands,
        "ls",
        "[-n NS | --public] [options]",
        "list namespaces, or what one of them holds",
        _LS,
        aliases=["list"],
    )
    _add_namespace(verb, required=False, public=True)
    _add_no_trunc(verb)

    verb = _add(commands, "inspect", "DIGEST (-n NS | --public) [options]", "show what is known of one blob", "")
    _add_digest(verb)
    _add_namespace(verb, public=True)

    verb = _add(
        commands,
        "cat",
        "DIGEST (-n NS | --public) [options]",
        "write a blob's verified bytes to standard output",
        _CAT,
    )
    _add_digest(verb)
    _add_namespace(verb, public=True)
    verb.add_argument("--uncompressed", action="store_true", help="decompress a layer, checking its DiffID at the end")

    verb = _add(
        commands, "export", "REF_OR_DIGEST -n NS DIR [options]", "write an image as an OCI image layout", _EXPORT
    )
    verb.add_argument("target", metavar="REF_OR_DIGEST", help="an image of the namespace")
    _add_namespace(verb)
    verb.add_argument("directory", metavar="DIR", help="absent, empty, or a layout to add to")

    verb = _add(commands, "put", "FILE -n NS [options]", "put a local file into a namespace, print its digest", "")
    verb.add_argument("file", metavar="FILE", help="the file")
    _add_namespace(verb)
    verb.add_argument("--media-type", metavar="T", help="its media type (default: application/octet-stream)")
    _add_seal(verb)

    verb = _add(
        commands,
        "verify",
        "[DIGEST] (-n NS | --public) [options]",
        "hash everything again, one line a finding",
        _VERIFY,
    )
    verb.add_argument("digest", metavar="DIGEST", nargs="?", help="only this blob")
    _add_namespace(verb, public=True)
    verb.add_argument(
        "--repair", action="store_true", help="fetch the damaged chunks again from where the blob came from"
    )
    verb.add_argument("--plain-http", action="store_true", help="with --repair: talk HTTP without TLS")

    verb = _add(commands, "rm", "DIGEST... (-n NS | --public) [options]", "drop blobs or images", _RM)
    verb.add_argument("targets", metavar="DIGEST", nargs="+", help="a blob's digest, or an image's reference")
    _add_namespace(verb, public=True)
    verb.add_argument("--ignore-missing", action="store_true", help="what is not there is no error")

    verb = _add(
        commands,
        "purge",
        "(NS | --match PATTERN | --resume | --public) [options]",
        "remove namespaces for good, print the receipts",
        _PURGE,
    )
    verb.add_argument("namespace", metavar="NS", nargs="?", help="the namespace")
    verb.add_argument("--match", metavar="PATTERN", help="every namespace of such a name: 'acme/*'")
    verb.add_argument("--resume", action="store_true", help="finish every purge of this root that is not at its end")
    _add_public(verb)
    verb.add_argument(
        "--wait", metavar="S", type=_seconds, default=5.0, help="seconds to wait for its users (default: 5)"
    )
    verb.add_argument("--trim", action="store_true", help="also hand the freed blocks to the device (root; ext4, xfs)")

    verb = _add(commands, "df", "[options]", "show what the root takes, and how much of that could go", _DF)

    verb = _add(commands, "prune", "[-n NS | --public] [options]", "evict what is neither open nor pinned", _PRUNE)
    _add_namespace(verb, required=False, public=True)
    verb.add_argument("--to", metavar="SIZE", type=_amount, help="only until the root uses so much: 50GiB, 40%%")
    verb.add_argument(
        "--older-than", metavar="T", type=_span, default=0.0, help="only what was not used for so long: 90s, 12h, 7d"
    )
    verb.add_argument("--dry-run", action="store_true", help="remove nothing, print what would go and why")
    verb.add_argument("-y", "--yes", action="store_true", help="do not ask")
    _add_no_trunc(verb)

    verb = _add(commands, "janitor", "[options]", "do one round of housekeeping", _JANITOR)
    verb.add_argument(
        "--timeout", metavar="S", type=_seconds, help="end the reading after S seconds; the next round goes on there"
    )

    verb = _add(commands, "pin", "NAME REF -n NS [options]", "keep an image from being evicted", _PIN)
    verb.add_argument("name", metavar="NAME", help="of the pin")
    verb.add_argument("reference", metavar="REF", help="an image of the namespace, with all its blobs here")
    _add_namespace(verb)

    verb = _add(commands, "unpin", "NAME... -n NS [options]", "let go of what pins keep", "")
    verb.add_argument("names", metavar="NAME", nargs="+", help="of a pin")
    _add_namespace(verb)

    verb = _add(commands, "pins", "[-n NS] [options]", "list pins", "")
    _add_namespace(verb, required=False)
    _add_no_trunc(verb)

    verb = _add(commands, "receipts", "[verify] [options]", "list the receipts of purges, or examine them", _RECEIPTS)
    verb.add_argument("action", metavar="verify", nargs="?", choices=("verify",), help="examine the chain")
    verb.add_argument("--after", metavar="HASH", help="with verify: a hash it printed before must be among them")

    verb = _add(
        commands, "doctor", "REF [options]", "explain step by step what a pull would do, and where it fails", _DOCTOR
    )
    verb.add_argument("reference", metavar="REF", help="HOST/NAME:TAG or HOST/NAME@DIGEST")
    _add_platform(verb)
    verb.add_argument(
        "--timeout", metavar="S", type=_seconds, default=60.0, help="give up after S seconds (default: 60)"
    )
    _add_access(verb)
    return parser


_PULL = """
Prints the image's digest, then a line a blob: digest, size, hit, miss or bypass (and why). A bypass could not be kept
here: who opens the image reads that blob from the registry. Exit 5 if that is so of every layer. A tag whose registry
does not answer gives the digest it last had, and standard error says so; --fresh makes that an error. With -q only the
image's digest. Of a repository that --public lists, what all share is marked "public" (docs/public.md).
"""
_LS = """
"(public)" is the public namespace. With -n: images first (reference, digest, size, age, whether complete), then blobs
that belong to no image. With -q one name a line: namespaces, or digests of all blobs.
"""
_CAT = """
Each chunk is checked before it is written. If a later one is damaged the exit code is 4 and what was written is right
but cut. With --json the bytes are base64 in the member "data".
"""
_EXPORT = """
Other tools open the result, for example: skopeo inspect oci:DIR:TAG. It has the tag of REF as its name; an image of
the same name in DIR is replaced, others stay. A Docker schema 2 manifest stays and gets an OCI form beside it, of
another digest, which is what the layout names: tools look for nothing else there.
"""
_VERIFY = """
Exit 4 if anything was found, also if it was repaired. A damaged blob is moved aside, so that the next pull fetches it
again.
"""
_RM = """
A reference drops the image: its name, and the blobs no other image of the namespace needs. Exit 3 if something was
not there (the rest is dropped), 5 if something is in use while other things were dropped. What a namespace borrows of
the public one stays there; rm --public drops that, for all.
"""
_PURGE = """
From the first moment on nobody can open any of it. No namespace's purge touches the public one: --public purges that,
for everybody. Exit 5 where somebody still has files of it open at the end of the
wait: the next command on this root removes what they leave. Nothing, or nothing left, to purge is no error.
"""
_DF = """
Everything below the root counts. RESERVED is for what is being written, and held back for purges. A blob that is both
pinned and open is in both columns.
"""
_PRUNE = """
Worth least first, as in an eviction for room. Asks before it does, unless -y; where nobody can answer that is wrong
usage. WHY is quota (its namespace is over its quota), image (the rest of an image that lost a blob) or value (it was
worth least).
"""
_JANITOR = """
For a timer where no process has the root open all the time: sweeps what crashes left, finishes purges, evicts where the
root is too full, and reads what was not compared with its digest for fifteen days, at 16 MiB/s at most. What another
process is at is left to it. Exit 4 if a blob was found damaged; it was moved aside.
"""
_PIN = """
Prints the image's digest. The pin survives restarts and blocks eviction, not rm and not purge. It keeps the image that
REF means here now; one of the same name is replaced.
"""
_RECEIPTS = """
A line a receipt: number, slot, generation, level, blobs, bytes. verify finds receipts that were changed, dropped, moved
or added, and purged generations without one, one a line (exit 4); its last line has the hash of the last receipt. Who
can write the root can forge a whole chain: keep that hash elsewhere, and give it with --after.
"""
_DOCTOR = """
One line a step: ok, warn (a pull goes on) or FAIL (it ends here: exit 1), the step, what was found. Of credentials it
says where they are from, never what they are. Fetches no blob, keeps nothing.
"""


def _add(commands: Any, name: str, usage: str, summary: str, more: str, **options: Any) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=f"layercache {name} {usage}",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n{more}".strip(),
        formatter_class=_Formatter,
        allow_abbrev=False,
        **options,
    )
    verb.set_defaults(command=name)  # not the alias that was typed
    _add_globals(verb)
    return verb


def _add_globals(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("everywhere, before or after the command")
    default = argparse.SUPPRESS  # a command must not undo what was given before it
    group.add_argument("--root", metavar="DIR", default=default, help="where the cache is [env: LAYERCACHE_ROOT]")
    group.add_argument("--json", action="store_true", default=default, help="one JSON document on standard output")
    group.add_argument("-q", "--quiet", action="store_true", default=default, help="say less")
    group.add_argument("-v", "--verbose", action="store_true", default=default, help="say more; traceback of an error")
    group.add_argument(
        "--no-progress", action="store_true", default=default, help="no bars [env: LAYERCACHE_NO_PROGRESS]"
    )


def _add_namespace(verb: argparse.ArgumentParser, *, required: bool = True, public: bool = False) -> None:
    if not public:
        verb.add_argument("-n", "--namespace", metavar="NS", required=required, default=None, help="the namespace")
        return
    group = verb.add_mutually_exclusive_group(required=required)
    group.add_argument("-n", "--namespace", metavar="NS", default=None, help="the namespace")
    _add_public(group)


def _add_public(verb: argparse._ActionsContainer) -> None:
    verb.add_argument("--public", dest="of_public", action="store_true", help="the public namespace")


def _add_platform(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", help="of an index, take this one (default: this host's)"
    )
    verb.add_argument("--plain-http", action="store_true", help="speak HTTP without TLS (default: on loopback only)")


def _add_access(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--auth-file", metavar="FILE", help="credentials as docker and podman keep them; no others count")
    verb.add_argument("--ca", metavar="FILE", action="append", default=[], help="trust this authority (PEM), too")
    verb.add_argument("--cert", metavar="FILE", help="show this client certificate, with its key in the file (PEM)")
    verb.add_argument(
        "--mirror", metavar="URL", action="append", default=[], help="ask this one first; may be repeated"
    )
    verb.add_argument("--hosts-dir", metavar="DIR", help="mirrors and certificates as containerd has them (hosts.toml)")


def _add_seal(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--seal",
        choices=("ephemeral", "kms"),
        help="encrypt the namespace, if it is begun now: under a key that a reboot takes, or that AWS KMS wraps",
    )


def _add_digest(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("digest", metavar="DIGEST", help="sha256:... or sha512:...")


def _add_no_trunc(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--no-trunc", action="store_true", help="whole digests on a terminal, too")


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _amount(text: str) -> str:
    from layercache.store import Amount  # noqa: PLC0415 - --version and --help need none of it

    try:
        Amount.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _span(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a span of time: 90s, 15m, 12h, 7d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
