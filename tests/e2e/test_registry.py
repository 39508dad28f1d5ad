"""A model from a registry, as users have it: who asks stands in docker's configuration."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from kit import NodeKit, sha256, write_model

from tests.ocikit import PASSWORD, USER, registry, with_passwords
from tests.s3kit import environment


def test_a_model_comes_from_a_registry_that_wants_a_password(cold_node: NodeKit, tmp_path: Path) -> None:
    sums = write_model(tmp_path / "model", 20 << 20)
    with registry(tmp_path / "root") as open_registry:
        open_registry.push_model(
            "team/small", {name: (tmp_path / "model" / name).read_bytes() for name in sums}
        )
    with with_passwords(tmp_path / "root") as guarded:
        config = tmp_path / "docker" / "config.json"
        config.parent.mkdir()
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        config.write_text(json.dumps({"auths": {guarded.host: {"auth": auth}}}))
        with environment(DOCKER_CONFIG=str(config.parent)):
            cold_node.serve(with_preloader=False)
        ref = guarded.ref("team/small")
        cold_node.ctl("prefetch", ref, "--wait")
        assert (cold_node.row(ref)["state"], cold_node.row(ref)["attested"]) == ("verified", True)
        path = Path(cold_node.ctl("path", ref).stdout.strip())
        assert {name: sha256(path / name) for name in sums} == sums
        # Docker's configuration is read whenever it is needed.
        config.unlink()
        denied = cold_node.ctl("prefetch", guarded.ref("team/other"), "--wait", code=7)
        assert "UNAUTHORIZED" in denied.stderr and "hint:" in denied.stderr
        assert auth not in cold_node.log() and PASSWORD not in cold_node.log()
