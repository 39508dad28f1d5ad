"""The configuration file: defaults, sizes, bounds, and errors that name the file, the key and the way out."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from cached.config import (
    MAX_CONFIG_BYTES,
    PinSettings,
    Settings,
    SourceSettings,
    TransferSettings,
    load,
    parse_size,
    source_for,
)
from cached.model import CachedError, ErrorKind, Problem

FULL = """
data_dir = "/mnt/nvme/cached"
run_dir = "/run/models"

[store]
capacity_bytes = "80 GB"

[transfer]
workers = 2
connections = 8
rate_bytes_per_s = "125 MB/s"
attempts = 3
timeout_s = 10

[standby]
host_capacity_bytes = 1073741824
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cached.toml"
    path.write_text(text)
    return path


def problem_of(tmp_path: Path, text: str) -> Problem:
    with pytest.raises(CachedError) as caught:
        load(write(tmp_path, text), {})
    problem = caught.value.problem
    assert (problem.kind, problem.reason) == (ErrorKind.INVALID, "BAD_CONFIG")
    assert str(tmp_path / "cached.toml") in problem.message
    return problem


def test_without_a_file_every_key_has_its_default() -> None:
    settings = load(None, {})
    assert settings == Settings()
    assert (settings.data_dir, settings.run_dir) == ("/var/lib/cached", "/run/cached")
    assert settings.transfer == TransferSettings(4, 4, None, 5, 30.0)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), {}) == Settings()


def test_every_key_is_read(tmp_path: Path) -> None:
    settings = load(write(tmp_path, FULL), {})
    assert (settings.data_dir, settings.run_dir) == ("/mnt/nvme/cached", "/run/models")
    assert settings.store.capacity_bytes == 80_000_000_000
    assert settings.transfer == TransferSettings(2, 8, 125_000_000, 3, 10.0)
    assert settings.standby.host_capacity_bytes == 2**30


def test_the_environment_names_the_file_and_wins_for_directories(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    settings = load(None, {"CACHED_CONFIG": str(path), "CACHED_RUN_DIR": "/elsewhere", "CACHED_DATA_DIR": ""})
    assert (settings.data_dir, settings.run_dir) == ("/mnt/nvme/cached", "/elsewhere")


def test_a_given_file_wins_over_the_environments(tmp_path: Path) -> None:
    env = {"CACHED_CONFIG": str(tmp_path / "absent.toml")}
    assert load(write(tmp_path, FULL), env).transfer.workers == 2


def test_a_relative_directory_from_the_environment_becomes_absolute() -> None:
    assert load(None, {"CACHED_RUN_DIR": "run"}).run_dir == str(Path.cwd() / "run")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("80 GB", 80_000_000_000),
        ("10GiB", 10 * 2**30),
        ("1.5 TiB", 3 * 2**39),
        ("  4 kib ", 4096),
        ("0.1 MB", 100_000),
        ("17 B", 17),
        ("100 MB/s", 100_000_000),
        ("80", None),
        ("80 G", None),
        ("1 iB", None),
        ("-1 GB", None),
        ("80 bananas", None),
        ("\uff11 GB", None),
        ("", None),
    ],
)
def test_sizes(text: str, size_bytes: int | None) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[transfer]\nconections = 3", "transfer.conections: there is no such key", "transfer.connections?"),
        ("stor = 3", "stor: there is no such key", "did you mean store?"),
        (
            "zzz = 1",
            "zzz: there is no such key",
            "store, transfer, pressure, standby, source",
        ),
        ("[[source]]\nprefx = 3", "source[0].prefx: there is no such key", "source[0].prefix?"),
        ("[store]\nworkers = 3", "store.workers: there is no such key", "capacity_bytes"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(
    tmp_path: Path, text: str, message: str, hint: str
) -> None:
    problem = problem_of(tmp_path, text)
    assert message in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[transfer]\nworkers = 0", "transfer.workers: expected `int` >= 1"),
        ("[transfer]\nworkers = 65", "transfer.workers: expected `int` <= 64"),
        ("[transfer]\nworkers = true", "transfer.workers: expected `int`, got `bool`"),
        ("[transfer]\nconnections = 1000", "transfer.connections: expected `int` <= 64"),
        ("[transfer]\nattempts = 0", "transfer.attempts: expected `int` >= 1"),
        ("[transfer]\ntimeout_s = nan", "transfer.timeout_s: expected `float`"),
        ("[transfer]\ntimeout_s = inf", "transfer.timeout_s: expected `float` <= 600"),
        ('[transfer]\nrate_bytes_per_s = "1 kB/s"', "transfer.rate_bytes_per_s: expected `int` >= 65536"),
        ('[store]\nscrub_bytes_per_s = "1 kB/s"', "store.scrub_bytes_per_s: 1000 is less than 65536"),
        ("[store]\nkeep_free = 1.5", "store.keep_free: expected `float` <= 0.95"),
        ("[store]\nhigh_watermark = 0.8", "low_watermark: 0.85 is not below high_watermark, 0.8"),
        ("[store]\ncapacity_bytes = 0", "store.capacity_bytes: expected `int` >= 1"),
        ('[store]\ncapacity_bytes = "9999 PB"', "store.capacity_bytes: expected `int` <="),
        ('[store]\ncapacity_bytes = "much"', "store.capacity_bytes: 'much' is not a size"),
        ("[standby]\nhost_capacity_bytes = 1.5", "standby.host_capacity_bytes: expected `int`, got `float`"),
        ("store = 3", "store: expected a table, got `int`"),
        ("data_dir = 3", "data_dir: expected `str`, got `int`"),
        ('data_dir = "models"', "data_dir: 'models' is not absolute"),
        ('run_dir = ""', "run_dir: '' is not absolute"),
        (
            "[[source]]\nprefix = 'hf://a'\nrate_bytes_per_s = 'much'",
            "source[0].rate_bytes_per_s: 'much' is not a size",
        ),
        ("[[source]]\nprefix = 'hf://a'\nconnections = 0", "source[0].connections: expected `int` >= 1"),
        ("[transfer]\nmax_connections = 0", "transfer.max_connections: expected `int` >= 1"),
        ("[source]\nprefix = 'hf://a'", "source: expected a list of tables"),
        ("[[source]]\nregion = 'x'", "source[0]: it has no prefix"),
        ("[[source]]\nprefix = 'models'", "source[0].prefix: 'models' has no scheme"),
        (
            "[[source]]\nprefix = 'hf://a'\n[[source]]\nprefix = 'hf://a'",
            "source[1].prefix: 'hf://a' is there twice",
        ),
        (
            "[[source]]\nprefix = 'hf://a'\nendpoint = 'hub'",
            "source[0].endpoint: 'hub' is no server's address",
        ),
        ("[[source]]\nprefix = 'hf://a'\nendpoint = 'http://u:p@h'", "source[0].endpoint"),
        ("[[source]]\nprefix = 'hf://a'\naddressing = 'x'", "source[0].addressing: Invalid enum value 'x'"),
        ("[[source]]\nprefix = 'hf://a'\nanonymous = true\ntoken_env = 'T'", "only one of token_env"),
        ("[[source]]\nprefix = 'hf://a'\ntoken_file = 'T'", "source[0].token_file: 'T' is not absolute"),
        ("[[source]]\nprefix = 'hf://a'\ninclude = 'x'", "source[0].include: expected"),
        (
            "[[source]]\nprefix = 'az://a'\noptions = {account_key = 'x'}",
            "source[0].options.account_key: a secret",
        ),
        ("data_dir =", "it is not TOML: Invalid value"),
    ],
)
def test_a_wrong_value_names_its_key_and_its_bound(tmp_path: Path, text: str, message: str) -> None:
    assert message in problem_of(tmp_path, text).message


def test_a_secret_in_the_file_is_not_repeated_in_the_error(tmp_path: Path) -> None:
    text = "[[source]]\nprefix = 'az://a'\noptions = {account_key = 'hunter2'}"
    problem = problem_of(tmp_path, text)
    assert "hunter2" not in problem.message + problem.hint


def test_a_source_has_caps_of_its_own_and_options_stay_text(tmp_path: Path) -> None:
    text = "[[source]]\nprefix = 'gs://a'\nrate_bytes_per_s = '20 MB/s'\nconnections = 2\n"
    (source,) = load(write(tmp_path, text + "options = {block_bytes = '5 MB'}"), {}).source
    assert (source.rate_bytes_per_s, source.connections) == (20_000_000, 2)
    assert source.options == {"block_bytes": "5 MB"}


def test_the_longest_prefix_that_covers_a_ref_holds(tmp_path: Path) -> None:
    prefixes = ["hf://", "hf://org", "hf://org/name", "https://host/dir/", "s3://bucket"]
    prefixes += ["oci://registry", "oci://registry/team", "oci://registry/team/x:v1"]
    text = "".join(f"[[source]]\nprefix = '{prefix}'\n" for prefix in prefixes)
    sources = load(write(tmp_path, text), {}).source
    for ref, prefix in [
        ("hf://org/name@main", "hf://org/name"),
        ("hf://org/name2", "hf://org"),
        ("hf://organization/name", "hf://"),
        ("https://host/dir/", "https://host/dir/"),
        ("https://host/dir/sub/", "https://host/dir/"),
        ("https://host/file#sha256=00", "https://host/file#sha256=00"),
        ("s3://bucket/a/", "s3://bucket"),
        ("oci://registry/other:tag", "oci://registry"),
        ("oci://registry:5000/team/x:tag", "oci://registry:5000/team/x:tag"),
        ("oci://registry/team/x:tag", "oci://registry/team"),
        ("oci://registry/team:tag", "oci://registry/team"),
        ("oci://registry/team2/x:tag", "oci://registry"),
        ("oci://registry/team/x:v1@sha256:00", "oci://registry/team/x:v1"),
        ("oci://registry/team/x:v12", "oci://registry/team"),
        ("s3://bucket-of-others/a/", "s3://bucket-of-others/a/"),
    ]:
        assert source_for(sources, ref).prefix == prefix
    assert source_for((), "hf://a/b") == SourceSettings("hf://a/b")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('ref = "nowhere"', "pin[0]: 'nowhere' is not a ref"),
        ('ref = "hf://a/b"\non = "cuda:0"', "pin[0].on: 'cuda:0' may be another GPU after a restart"),
        ('ref = "hf://a/b"\non = "gpu"', "pin[0]: 'gpu' is not a device"),
        ('ref = "hf://a/b"\non = "host"\ncopies = 2', "pin[0].copies: copies go with cuda:any"),
        ('ref = "hf://a/b"\nunclaimed = true', "pin[0].unclaimed: it is about GPUs"),
        ('ref = "hf://a/b"\n[[pin]]\nref = "hf://a/b/"', "pin[1]: hf://a/b/ is pinned there twice"),
    ],
)
def test_pins_that_mean_nothing_are_refused(tmp_path: Path, keys: str, message: str) -> None:
    assert message in problem_of(tmp_path, f"[[pin]]\n{keys}").message


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cached.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CachedError, match="it is not TOML"):
        load(path, {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CachedError, match=r"absent\.toml: No such file or directory"):
        load(tmp_path / "absent.toml", {})


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    problem = problem_of(tmp_path, "#" * (MAX_CONFIG_BYTES + 1))
    assert f"larger than {MAX_CONFIG_BYTES} bytes" in problem.message


def test_the_documented_example_is_read_and_shows_every_key(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    settings = load(write(tmp_path, example), {})
    assert settings.store.capacity_bytes == 400 * 10**9
    shown = tomllib.loads(example)
    for group in dataclasses.fields(Settings):
        default = getattr(Settings(), group.name)
        if group.name == "source":
            # Two of its keys cannot stand beside a third; they are shown as comments.
            shown_keys = set(shown["source"][0]) | {"token_file", "anonymous"}
            assert shown_keys == {f.name for f in dataclasses.fields(SourceSettings)}
            assert "# token_file = " in example and "# anonymous = " in example
            continue
        if group.name == "pin":
            assert set(shown["pin"][0]) == {f.name for f in dataclasses.fields(PinSettings)}
            continue
        keys = {f.name for f in dataclasses.fields(default)} if dataclasses.is_dataclass(default) else set()
        assert group.name in shown
        assert keys == (set(shown[group.name]) if keys else set())
