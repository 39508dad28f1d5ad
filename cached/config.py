"""The operator's TOML file as typed settings: defaults, bounds, and errors that say where and how to mend.

Owns every key, its default and its bounds. Reads the one file it is given and the environment that
is passed in; writes nothing, constructs nothing else, and knows nothing of what the settings do.

Keys are the fields below. A key that counts bytes takes a number or a size with its unit: ``"80 GB"``,
``"10GiB"``, ``"125 MB/s"``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from cached.model import MAX_REF_CHARS, CachedError, ErrorKind, parse_device, parse_ref, permanent

MAX_CONFIG_BYTES = 1024 * 1024
MAX_BYTES = 2**60
SLOWEST_SCRUB = 64 * 1024

_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_BYTES)]
# Below this a chunk takes minutes, and every range would run into its timeout.
_Rate = Annotated[int, msgspec.Meta(ge=64 * 1024, le=MAX_BYTES)]


_Seconds = Annotated[float, msgspec.Meta(ge=0, le=10 * 365 * 86400)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How much of the disk is used, and for how long what is not needed stays.

    ``capacity_bytes``: the most that models may take (None: no bound of their own). Whatever it says, and
    whoever fills the file system, ``keep_free`` of it (a share) and ``keep_free_bytes`` stay free. Above
    ``high_watermark`` (a share of what may be taken) unclaimed models leave until ``low_watermark``. Contents
    in quarantine and the leftovers of transfers that nobody wants are removed after their ``_keep_s``. All of
    it is read again every ``scrub_every_s``, at no more than ``scrub_bytes_per_s`` (0: never).
    """

    capacity_bytes: _Size | None = None
    keep_free: Annotated[float, msgspec.Meta(ge=0, le=0.95)] = 0.2
    keep_free_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)] = 0
    high_watermark: _Share = 0.95
    low_watermark: _Share = 0.85
    scrub_bytes_per_s: Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)] = 20 * 10**6
    scrub_every_s: Annotated[float, msgspec.Meta(ge=1, le=10 * 365 * 86400)] = 7 * 86400.0
    quarantine_keep_s: _Seconds = 7 * 86400.0
    leftovers_keep_s: _Seconds = 86400.0


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """How origins are asked.

    ``workers`` transfers at once, each over ``connections`` at most, and all of them over ``max_connections``
    and at ``rate_bytes_per_s`` (None: no cap); ``attempts`` for each range; ``timeout_s`` to connect, and
    between two reads; ``resolve_timeout_s`` for all of asking an origin what a ref is.
    """

    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    connections: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    rate_bytes_per_s: _Rate | None = None
    attempts: Annotated[int, msgspec.Meta(ge=1, le=20)] = 5
    timeout_s: Annotated[float, msgspec.Meta(ge=0.1, le=600)] = 30.0
    max_connections: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16
    resolve_timeout_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 300.0


_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_REF_CHARS)]
_Globs = Annotated[tuple[_Name, ...], msgspec.Meta(max_length=64)]


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """What holds for the refs that begin with ``prefix``. Secrets stand here by reference only.

    ``endpoint`` replaces the scheme's usual server (hf, oci, s3). ``region``, ``addressing`` and ``profile``
    are S3's. The token is read from the variable ``token_env`` or the file ``token_file``; ``anonymous``
    sends none, not even one that is found where tools usually look. ``access`` says who may have the daemon
    fetch from there: of what is the operators', replicas get only what operators brought here.
    ``require_digest`` refuses a revision with a file that the origin does not attest. Files that match none
    of ``include`` (when there are any) or one of ``exclude`` are left out; pickled weights are, unless
    ``allow_pickle``. ``options`` go to fsspec; a value ``env:NAME`` or ``file:/path`` is read from there.
    ``rate_bytes_per_s`` and ``connections`` are the most for all transfers from here together.
    """

    prefix: _Name
    endpoint: str | None = None
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    profile: str | None = None
    token_env: _Name | None = None
    token_file: _Name | None = None
    anonymous: bool = False
    access: Literal["all", "operators"] = "all"
    require_digest: bool = False
    include: _Globs = ()
    exclude: _Globs = ()
    allow_pickle: bool = False
    options: dict[str, str] = field(default_factory=dict)
    rate_bytes_per_s: _Rate | None = None
    connections: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None

    def covers(self, ref: str) -> bool:
        """Whether ``ref`` lies under the prefix: a longer name than the prefix's last is another's."""
        rest = ref.removeprefix(self.prefix)
        if not ref.startswith(self.prefix):
            # A folder's prefix may be written without its last slash, and may be the ref itself.
            return ref == self.prefix.removesuffix("/")
        # A tag follows a repository's name; behind a registry's alone a colon makes it another.
        tagged = self.prefix.startswith("oci://") and "/" in self.prefix.removeprefix("oci://")
        return not rest or self.prefix.endswith("/") or rest[0] in ("/@#:" if tagged else "/@#")


def source_for(sources: tuple[SourceSettings, ...], ref: str) -> SourceSettings:
    """The settings of the longest prefix that covers ``ref``; the defaults where none does."""
    covering = [source for source in sources if source.covers(ref)]
    return max(covering, key=lambda source: len(source.prefix), default=SourceSettings(ref))


@dataclass(frozen=True, slots=True)
class StandbySettings:
    """How much memory models may take, and whose it is.

    ``host_capacity_bytes``: the most that may stand in RAM; None leaves it to the standby's limits.
    ``gpu_capacity_bytes``: the same on each GPU; of its memory ``gpu_reserve_bytes`` stay free in any case.
    While an engine starts with room that was made for it, nothing is loaded beside it until it says that it
    is ready, for ``starting_s`` at most. What nobody leases leaves a GPU ``claimed_grace_s`` after the
    orchestrator has given it to somebody. ``pod_resources`` is kubelet's socket, which tells of that; None
    takes the usual one where it exists, an empty text none.
    """

    host_capacity_bytes: _Size | None = None
    gpu_capacity_bytes: _Size | None = None
    gpu_reserve_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)] = 2**30
    starting_s: Annotated[float, msgspec.Meta(ge=1, le=86400)] = 600.0
    claimed_grace_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 10.0
    pod_resources: str | None = None


@dataclass(frozen=True, slots=True)
class PinSettings:
    """One model that is kept on a device for as long as it stands in this file.

    ``on``: ``disk``, ``host``, ``cuda:<uuid>``, ``cuda:any`` (on ``copies`` of the GPUs) or ``cuda:all``.
    Pins of a higher ``priority`` are met first. On a GPU that the orchestrator has given to nobody it stands
    only where it is ``unclaimed``.
    """

    ref: _Name
    on: str = "disk"
    copies: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    priority: Annotated[int, msgspec.Meta(ge=-1000, le=1000)] = 0
    unclaimed: bool = False


_Percent = Annotated[float, msgspec.Meta(gt=0, le=100)]


@dataclass(frozen=True, slots=True)
class PressureSettings:
    """Above which part of the last seconds, in percent, that somebody had to wait for CPU, I/O or memory,
    background work stands back. 100: never. Seen on two cores: a prefetch at full speed and its origin
    together make 45 to 73 for CPU and up to 24 for I/O, a node that is busy otherwise 89 to 97 for CPU."""

    cpu_percent: _Percent = 80.0
    io_percent: _Percent = 60.0
    memory_percent: _Percent = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the daemon can be told. Directories are absolute."""

    data_dir: str = "/var/lib/cached"
    run_dir: str = "/run/cached"
    store: StoreSettings = field(default_factory=StoreSettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    pressure: PressureSettings = field(default_factory=PressureSettings)
    standby: StandbySettings = field(default_factory=StandbySettings)
    source: Annotated[tuple[SourceSettings, ...], msgspec.Meta(max_length=256)] = ()
    pin: Annotated[tuple[PinSettings, ...], msgspec.Meta(max_length=1024)] = ()


_ELEMENTS = {"source": SourceSettings("any"), "pin": PinSettings("any")}
"""Of each key that holds a list of tables, one such table with its defaults."""


def load(path: Path | None, env: Mapping[str, str]) -> Settings:
    """The settings of the file ``path``, or of ``CACHED_CONFIG``, or the defaults.

    ``CACHED_DATA_DIR`` and ``CACHED_RUN_DIR`` win over the file. Raises CachedError (INVALID,
    ``BAD_CONFIG``) naming the file and the key.
    """
    path = file_of(path, env)
    settings = Settings() if path is None else _load_file(path)
    return dataclasses.replace(
        settings,
        data_dir=_directory(env.get("CACHED_DATA_DIR"), settings.data_dir),
        run_dir=_directory(env.get("CACHED_RUN_DIR"), settings.run_dir),
    )


def file_of(path: Path | None, env: Mapping[str, str]) -> Path | None:
    """The file that holds: ``path``, or that of ``CACHED_CONFIG``, or none."""
    return Path(env["CACHED_CONFIG"]) if path is None and env.get("CACHED_CONFIG") else path


def _directory(from_env: str | None, otherwise: str) -> str:
    # A shell may give a relative one, as for any command; a file has no directory to be relative to.
    return str(Path(from_env).absolute()) if from_env else otherwise


def _load_file(path: Path) -> Settings:
    table = _read_toml(path)
    _refuse_unknown(path, table, Settings(), "")
    values = _with_sizes(path, table, "")
    try:
        settings = msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        key = where.strip("`").removeprefix("$.")
        # In TOML's words: it has tables, and no null.
        what = what.replace("Expected", "expected").replace("`object`", "a table").replace(" | null", "")
        what = what.replace("`array`", "a list of tables" if key in _ELEMENTS else "a list")
        what = re.sub(r"Object missing required field `(\w+)`", r"it has no \1", what)
        raise _bad(path, f"{key}: {what}", "correct the value") from error
    for key, directory in (("data_dir", settings.data_dir), ("run_dir", settings.run_dir)):
        if not directory.startswith("/"):
            raise _bad(path, f"{key}: {directory!r} is not absolute", "write the whole path, from /")
    _check_store(path, settings.store)
    if settings.standby.pod_resources and not settings.standby.pod_resources.startswith("/"):
        what = f"standby.pod_resources: {settings.standby.pod_resources!r} is not absolute"
        raise _bad(path, what, "write the whole path of kubelet's socket, from /")
    _check_sources(path, settings.source)
    _check_pins(path, settings.pin)
    return settings


def _check_store(path: Path, store: StoreSettings) -> None:
    if 0 < store.scrub_bytes_per_s < SLOWEST_SCRUB:
        what = f"store.scrub_bytes_per_s: {store.scrub_bytes_per_s} is less than {SLOWEST_SCRUB}"
        raise _bad(path, what, "write 0 to read nothing again")
    if store.low_watermark >= store.high_watermark:
        what = (
            f"store.low_watermark: {store.low_watermark} is not below high_watermark, {store.high_watermark}"
        )
        raise _bad(path, what, "set both; what leaves at the high one makes room down to the low one")


_LETTERS = re.compile(r"[a-z][a-z0-9+.-]*://")
_SECRET = re.compile(r"secret|password|passphrase|token|credential|(^|_)key$|connection_string|sas", re.I)


def _check_sources(path: Path, sources: tuple[SourceSettings, ...]) -> None:
    seen: set[str] = set()
    for number, source in enumerate(sources):
        where = f"source[{number}]"
        if not _LETTERS.match(source.prefix):
            raise _bad(path, f"{where}.prefix: {source.prefix[:80]!r} has no scheme", "write hf://org, say")
        if source.prefix in seen:
            raise _bad(path, f"{where}.prefix: {source.prefix!r} is there twice", "make one table of them")
        seen.add(source.prefix)
        _check_source(path, where, source)


_ONE_OF_THEM = re.compile(r"cuda:\d+")


def _check_pins(path: Path, pins: tuple[PinSettings, ...]) -> None:
    seen: set[tuple[str, str]] = set()
    for number, pin in enumerate(pins):
        where = f"pin[{number}]"
        try:
            spot = (parse_ref(pin.ref), parse_device(pin.on))
        except CachedError as error:
            raise _bad(path, f"{where}: {error.problem.message}", error.problem.hint) from error
        if spot in seen:
            raise _bad(path, f"{where}: {pin.ref} is pinned there twice", "make one table of them")
        seen.add(spot)
        if _ONE_OF_THEM.fullmatch(pin.on):
            hint = "name the GPU by its UUID (cuda:GPU-…), or say cuda:any or cuda:all"
            raise _bad(path, f"{where}.on: {pin.on!r} may be another GPU after a restart", hint)
        if pin.copies > 1 and pin.on != "cuda:any":
            raise _bad(path, f"{where}.copies: copies go with cuda:any, not with {pin.on}", "leave it out")
        if pin.unclaimed and not pin.on.startswith("cuda:"):
            raise _bad(path, f"{where}.unclaimed: it is about GPUs, not about {pin.on}", "leave it out")


def _check_source(path: Path, where: str, source: SourceSettings) -> None:
    if source.endpoint is not None and not _is_endpoint(source.endpoint):
        hint = "write http://host:port or https://host, without user and password"
        raise _bad(path, f"{where}.endpoint: {source.endpoint[:80]!r} is no server's address", hint)
    given = [bool(source.token_env), bool(source.token_file), source.anonymous]
    if sum(given) > 1:
        what = "only one of token_env, token_file and anonymous can hold"
        raise _bad(path, f"{where}: {what}", "remove the others")
    if source.token_file and not source.token_file.startswith("/"):
        what = f"{where}.token_file: {source.token_file!r} is not absolute"
        raise _bad(path, what, "write the whole path, from /")
    for name, value in source.options.items():
        if _SECRET.search(name) and not value.startswith(("env:", "file:/")):
            # The value is not shown: that is the point.
            hint = 'name where it stands: "env:NAME" or "file:/path"'
            raise _bad(path, f"{where}.options.{name}: a secret does not belong into this file", hint)


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and named and plain


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise _bad(path, str(error.strerror), "name a readable file, or none to run on defaults") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise _bad(path, f"it is larger than {MAX_CONFIG_BYTES} bytes", "name the configuration file")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _bad(path, f"it is not TOML: {error}", "correct the line") from error


def _refuse_unknown(path: Path, table: Mapping[str, Any], defaults: Any, prefix: str) -> None:
    """Walk ``table`` beside the settings that it fills; the first unknown key is the error."""
    known = [f.name for f in dataclasses.fields(defaults)]
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            words = f"did you mean {prefix}{near[0]}?" if near else f"known here are {', '.join(known)}"
            raise _bad(path, f"{prefix}{key}: there is no such key", words)
        default = getattr(defaults, key)
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            _refuse_unknown(path, value, default, f"{prefix}{key}.")
        if key in _ELEMENTS and not prefix and isinstance(value, list):
            for number, element in enumerate(value):
                if isinstance(element, Mapping):
                    _refuse_unknown(path, element, _ELEMENTS[key], f"{key}[{number}].")


def _with_sizes(path: Path, table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``table`` with every size that was written as text turned into bytes; the key's unit says which."""
    values = dict(table)
    for key, value in table.items():
        if key in _ELEMENTS and not prefix and isinstance(value, list):
            values[key] = [
                _with_sizes(path, element, f"{key}[{number}].") if isinstance(element, Mapping) else element
                for number, element in enumerate(value)
            ]
        elif isinstance(value, Mapping) and key != "options":  # whose keys are others' words
            values[key] = _with_sizes(path, value, f"{prefix}{key}.")
        elif isinstance(value, str) and key.endswith(("_bytes", "_bytes_per_s")):
            size = parse_size(value)
            if size is None:
                hint = 'write a number of bytes, or a size such as "80 GB" or "10GiB"'
                raise _bad(path, f"{prefix}{key}: {value[:80]!r} is not a size", hint)
            values[key] = size
    return values


_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGTP]?)(I?)B(?:/S)?", re.ASCII)


def parse_size(text: str) -> int | None:
    """Bytes of ``80 GB`` (powers of 1000) or ``10GiB`` (of 1024), in any case; None where it is no size."""
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None or (match[3] and not match[2]):
        return None
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** _POWER[match[2]])


def _bad(path: Path, what: str, hint: str) -> CachedError:
    return permanent(ErrorKind.INVALID, "BAD_CONFIG", f"{path}: {what}", hint)
