"""A model from a bucket, as users have it: credentials and endpoint stand in the daemon's environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import NodeKit, sha256, write_model

from tests.s3kit import CREDENTIALS, Store, environment, rclone_s3

REF = "s3://models/small/"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A bucket ``models``: what is written to ``tmp_path / "buckets/models"``."""
    (tmp_path / "buckets" / "models").mkdir(parents=True)
    with rclone_s3(tmp_path / "buckets") as running:
        yield running


def serve(node: NodeKit, store: Store, **changes: str) -> None:
    with environment(**{**CREDENTIALS, "AWS_ENDPOINT_URL_S3": store.url, **changes}):
        node.serve(with_preloader=False)


def test_a_model_comes_from_a_bucket(cold_node: NodeKit, store: Store, tmp_path: Path) -> None:
    # More than one chunk, so that there are ranges; sums, so that it is attested.
    sums = write_model(tmp_path / "buckets" / "models" / "small", 20 << 20)
    serve(cold_node, store)
    cold_node.ctl("prefetch", REF, "--wait")
    row = cold_node.row(REF)
    assert (row["state"], row["attested"]) == ("verified", True)
    path = Path(cold_node.ctl("path", REF).stdout.strip())
    assert {name: sha256(path / name) for name in sums} == sums


def test_a_bucket_without_sums_is_unattested(cold_node: NodeKit, store: Store, tmp_path: Path) -> None:
    write_model(tmp_path / "buckets" / "models" / "small", sums=False)
    serve(cold_node, store)
    cold_node.ctl("prefetch", REF, "--wait")
    assert cold_node.row(REF)["attested"] is False


def test_refusals_reach_the_user_and_secrets_do_not(cold_node: NodeKit, store: Store) -> None:
    serve(cold_node, store, AWS_SECRET_ACCESS_KEY="not-this-one")
    denied = cold_node.ctl("prefetch", REF, "--wait", code=7)
    assert "SignatureDoesNotMatch" in denied.stderr and "hint:" in denied.stderr
    assert "not-this-one" not in denied.stderr + cold_node.log()
    cold_node.stop_daemon()
    serve(cold_node, store)
    assert "bucket" in cold_node.ctl("prefetch", "s3://nobodys/small/", "--wait", code=3).stderr
