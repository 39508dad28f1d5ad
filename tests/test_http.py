"""Web servers: single files, where redirects may lead, proxies, authorities, and who hears a token."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from httpkit import Answer, Proxy, Site, make_authority, redirect

from cached.config import SourceSettings
from cached.model import CachedError, ErrorKind, Problem, Revision, parse_ref
from cached.sources import Origins
from cached.sources.client import HttpClient
from cached.sources.network import kind_of, kinds_of_host, proxy_for

DATA = b"w" * 3000
HEX = hashlib.sha256(DATA).hexdigest()
SUMS = Answer(f"{HEX}  a.dat\n".encode())


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        serve(running)
        yield running


def serve(site: Site) -> None:
    site.answers["/m/SHA256SUMS"] = SUMS
    site.answers["/m/a.dat"] = Answer(DATA, headers={"ETag": '"1"'})


def resolve(ref: str, env: dict[str, str] | None = None, **fields: object) -> Revision:
    origins = Origins(2, 5.0, env or {})
    try:
        return origins.resolve(parse_ref(ref), SourceSettings(ref, **fields))  # type: ignore[arg-type]
    finally:
        origins.close()


def refused(ref: str, env: dict[str, str] | None = None, **fields: object) -> Problem:
    with pytest.raises(CachedError) as caught:
        resolve(ref, env, **fields)
    assert caught.value.problem.hint
    return caught.value.problem


# --- single files ---------------------------------------------------------------------------


def test_a_single_file_with_its_digest_is_a_model(site: Site) -> None:
    site.answers["/m/my%20model.gguf"] = Answer(DATA, headers={"ETag": '"1"'})
    ref = parse_ref(f"{site.url}m/my%20model.gguf#sha256={HEX}")
    origins = Origins(2, 5.0, {})
    revision = origins.resolve(ref)
    (spec,) = revision.files
    assert (spec.path, spec.size_bytes, spec.sha256, spec.version) == ("my model.gguf", 3000, HEX, '"1"')
    view = memoryview(bytearray(1000))
    reader = origins.source_for(ref).open(ref, spec)
    assert b"".join(bytes(view[:count]) for count in reader.read(0, 3000, lambda: view)) == DATA
    assert {path for _, path, _ in site.asked} == {"/m/my%20model.gguf"}
    origins.close()


@pytest.mark.parametrize("name", ["%2e%2e", "a%2Fb", "%00", "%2Fetc%2Fpasswd"])
def test_a_single_file_has_a_plain_name(site: Site, name: str) -> None:
    assert refused(f"{site.url}m/{name}#sha256={HEX}").kind is ErrorKind.INVALID
    assert site.asked == []


def test_a_single_pickle_and_a_missing_file_are_refused(site: Site) -> None:
    assert refused(f"{site.url}m/a.bin#sha256={HEX}").reason == "ONLY_PICKLE"
    assert refused(f"{site.url}m/b.gguf#sha256={HEX}").reason == "MISSING_FILE"


# --- Retry-After ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_a_time_to_come_back_at_is_told(site: Site, status: int) -> None:
    at = formatdate(time.time() + 100, usegmt=True)
    for said, least_s, most_s in [
        ("7", 7, 7),
        (at, 90, 100),
        ("-5", 0, 0),
        ("soon", 0, 0),
        ("9" * 9, 3600, 3600),
    ]:
        site.answers["/m/SHA256SUMS"] = Answer(b"", status, {"Retry-After": said})
        problem = refused(f"{site.url}m/")
        assert problem.reason == "ORIGIN_UNAVAILABLE" and problem.retry_after_s is not None
        assert least_s <= problem.retry_after_s <= most_s


# --- where redirects may lead ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("127.8.9.1", "loopback"),
        ("0.0.0.0", "loopback"),
        ("0.1.2.3", "loopback"),
        ("::1", "loopback"),
        ("::", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("169.254.10.20", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("169.254.169.254", "metadata"),
        ("::ffff:169.254.169.254", "metadata"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("10.0.0.1", ""),
        ("192.168.1.1", ""),
        ("93.184.216.34", ""),
        ("2606:2800:220:1::1", ""),
    ],
)
def test_addresses_near_this_machine_are_known(address: str, kind: str) -> None:
    assert kind_of(address) == kind


def test_names_are_known_by_what_they_lead_to() -> None:
    assert kinds_of_host("localhost") == {"loopback"}
    assert kinds_of_host("[::1]") == {"loopback"}
    # As some resolvers read it, and as a check of the text alone would not.
    assert kinds_of_host("2130706433") <= {"loopback"}
    assert kinds_of_host("192.0.2.1") == frozenset()
    assert kinds_of_host("x" * 300) == frozenset()


@pytest.mark.parametrize(
    "to",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]/",
        "http://[fd00:ec2::254]/",
        "http://[::ffff:169.254.169.254]/",
        "//169.254.10.20/",
    ],
)
def test_a_redirect_to_metadata_is_refused_even_from_loopback(site: Site, to: str) -> None:
    site.answers["/m/SHA256SUMS"] = redirect(to)
    problem = refused(f"{site.url}m/")
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "UNSAFE_REDIRECT")
    assert not problem.temporary


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/"])
def test_a_redirect_to_another_scheme_is_refused(site: Site, to: str) -> None:
    site.answers["/m/SHA256SUMS"] = redirect(to)
    assert refused(f"{site.url}m/").reason == "UNSAFE_REDIRECT"


def test_a_redirect_within_loopback_is_followed_from_loopback(site: Site) -> None:
    with Site() as other:
        serve(other)
        site.answers["/m/SHA256SUMS"] = redirect(f"http://localhost:{other.port}/m/SHA256SUMS", 307)
        assert resolve(f"{site.url}m/").files[0].sha256 == HEX
        assert len(other.asked) == 1


def test_what_an_origin_of_the_world_gave_out_does_not_reach_loopback(site: Site) -> None:
    client = HttpClient(1, 5.0, {})
    with (
        pytest.raises(CachedError) as caught,
        client.request("GET", f"{site.url}m/SHA256SUMS", origin="http://192.0.2.1/"),
    ):
        pass
    assert caught.value.problem.reason == "UNSAFE_REDIRECT"
    assert site.asked == []
    client.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0"])
def test_an_origin_behind_a_proxy_cannot_lead_to_this_machine(site: Site, host: str) -> None:
    with Site() as inner, Proxy({"models.invalid": site.port, host: inner.port}) as proxy:
        serve(inner)
        site.answers["/m/SHA256SUMS"] = redirect(f"http://{host}:{inner.port}/m/SHA256SUMS")
        problem = refused("http://models.invalid/m/", {"http_proxy": proxy.url})
        assert problem.reason == "UNSAFE_REDIRECT" and "loopback" in problem.message
        assert inner.asked == []
        assert [name for _, name, _ in proxy.asked] == ["models.invalid"]


@pytest.mark.parametrize(
    "to", ["http://[bad/", "http://h:99999/", "http://h:x/", "http://" + "x" * 300 + "/"]
)
def test_a_redirect_to_no_address_is_refused(site: Site, to: str) -> None:
    site.answers["/m/SHA256SUMS"] = redirect(to)
    problem = refused(f"{site.url}m/")
    assert problem.reason in ("BAD_REDIRECT", "BAD_REF", "ORIGIN_UNREACHABLE"), problem


def test_a_circle_of_redirects_ends(site: Site) -> None:
    site.answers["/m/SHA256SUMS"] = redirect("/m/SHA256SUMS")
    assert refused(f"{site.url}m/").reason == "TOO_MANY_REDIRECTS"
    assert len(site.asked) == 6


# --- who hears a token ----------------------------------------------------------------------


def test_a_token_is_sent_to_the_origin_and_to_no_other_host(site: Site) -> None:
    with Site() as cdn:
        cdn.answers["/a"] = Answer(DATA)
        site.answers["/m/a.dat"] = redirect("/here/a.dat")
        site.answers["/here/a.dat"] = redirect(f"http://127.0.0.1:{cdn.port}/a")
        resolve(f"{site.url}m/", {"T": "secret"}, token_env="T")
        for path in ("/m/SHA256SUMS", "/m/a.dat", "/here/a.dat"):
            assert site.headers_of(path)["Authorization"] == "Bearer secret"
        assert "Authorization" not in cdn.headers_of("/a")


# --- proxies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "env", "proxy"),
    [
        ("http://h/", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("http://h/", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ("http://h/", {"http_proxy": "p:1"}, "http://p:1"),
        ("http://h/", {"https_proxy": "http://p:1"}, None),
        ("https://h/", {"HTTPS_PROXY": "http://p:1", "https_proxy": "http://q:1"}, "http://q:1"),
        ("https://h/", {"ALL_PROXY": "https://p:1"}, "https://p:1"),
        ("https://h/", {"ALL_PROXY": "https://p:1", "HTTPS_PROXY": ""}, "https://p:1"),
        ("http://127.0.0.1:8/", {"ALL_PROXY": "http://p:1"}, None),
        ("http://localhost/", {"ALL_PROXY": "http://p:1"}, None),
        ("http://[::1]/", {"ALL_PROXY": "http://p:1"}, None),
        ("http://h/", {}, None),
    ],
)
def test_a_proxy_is_found_as_elsewhere(url: str, env: dict[str, str], proxy: str | None) -> None:
    assert proxy_for(url, env) == proxy


@pytest.mark.parametrize(
    ("host", "exceptions", "excepted"),
    [
        ("s3.corp", "corp", True),
        ("s3.corp", ".corp", True),
        ("s3.corp", "*.corp", True),
        ("s3.corp", "other, S3.CORP", True),
        ("corp", "s3.corp", False),
        ("notcorp", "corp", False),
        ("anything", "*", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("h.corp", "10.0.0.0/8,nonsense/99", False),
        ("[fd00::1]", "fd00::/8", True),
        ("[fd00::1]", "[fd00::1]", True),
        ("10.1.2.3:90", "10.1.2.3:90", True),
        ("10.1.2.3:91", "10.1.2.3:90", False),
        ("h", " , ,", False),
    ],
)
def test_no_proxy_has_names_suffixes_networks_and_ports(host: str, exceptions: str, excepted: bool) -> None:
    found = proxy_for(f"http://{host}/", {"http_proxy": "http://p:1", "NO_PROXY": exceptions})
    assert (found is None) == excepted


@pytest.mark.parametrize("proxy", ["socks5://p:hunter2@h:1", "http://", "nonsense://x"])
def test_a_proxy_that_is_none_is_refused_without_its_password(proxy: str) -> None:
    problem = refused("http://h.invalid/m/", {"http_proxy": proxy})
    assert (problem.kind, problem.reason) == (ErrorKind.PRECONDITION, "BAD_PROXY")
    assert "hunter2" not in problem.message + problem.hint


def test_an_origin_is_reached_through_a_proxy_that_wants_a_password(site: Site) -> None:
    with Proxy({"models.invalid": site.port}, login="me:p@ss") as proxy:
        env = {"HTTP_PROXY": proxy.url.replace("//", "//me:p%40ss@")}
        assert resolve("http://models.invalid/m/", env).files[0].sha256 == HEX
        assert len(proxy.asked) == 2 and "Proxy-Authorization" not in site.headers_of("/m/a.dat")
        # Where it is excepted, it is asked directly, and nobody has that name.
        problem = refused("http://models.invalid/m/", {**env, "no_proxy": "invalid"})
        assert problem.reason == "ORIGIN_UNREACHABLE" and len(proxy.asked) == 2


def test_a_proxy_that_is_away_is_temporary_and_its_password_is_not_told() -> None:
    problem = refused("http://models.invalid/m/", {"http_proxy": "http://me:hunter2@127.0.0.1:9"})
    assert problem.reason == "ORIGIN_UNREACHABLE" and problem.temporary
    assert "hunter2" not in problem.message


# --- authorities ----------------------------------------------------------------------------


def test_a_private_authority_is_trusted_where_a_variable_names_it(tmp_path: Path) -> None:
    authority, context = make_authority(tmp_path, "127.0.0.1", "models.invalid")
    with Site(context()) as site:
        serve(site)
        problem = refused(f"{site.url}m/")
        assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "ORIGIN_CERTIFICATE")
        assert "SSL_CERT_FILE" in problem.hint
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            assert resolve(f"{site.url}m/", {name: str(authority)}).attested
        # The certificate has to be that host's.
        other = f"https://localhost:{site.port}/m/"
        assert refused(other, {"SSL_CERT_FILE": str(authority)}).reason == "ORIGIN_CERTIFICATE"


def test_tls_goes_through_a_proxy_to_the_origin_itself(tmp_path: Path) -> None:
    authority, context = make_authority(tmp_path, "models.invalid")
    with Site(context()) as site, Proxy({"models.invalid": site.port}) as proxy:
        serve(site)
        env = {"HTTPS_PROXY": proxy.url, "SSL_CERT_FILE": str(authority)}
        assert resolve("https://models.invalid/m/", env).attested
        assert {method for method, _, _ in proxy.asked} == {"CONNECT"}


def test_a_redirect_out_of_tls_is_refused(tmp_path: Path, site: Site) -> None:
    authority, context = make_authority(tmp_path, "127.0.0.1")
    with Site(context()) as secure:
        secure.answers["/m/SHA256SUMS"] = redirect(f"{site.url}m/SHA256SUMS")
        problem = refused(f"{secure.url}m/", {"SSL_CERT_FILE": str(authority)})
        assert problem.reason == "UNSAFE_REDIRECT" and "from https to http" in problem.message
        assert site.asked == []


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_bundle_that_is_none_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    problem = refused("https://127.0.0.1:9/m/", {"REQUESTS_CA_BUNDLE": str(path)})
    assert (problem.kind, problem.reason) == (ErrorKind.PRECONDITION, "BAD_CA_BUNDLE")
    assert "REQUESTS_CA_BUNDLE" in problem.message and str(path) in problem.message
