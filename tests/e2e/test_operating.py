"""Pins of the configuration file, and `cachectl run`: commands and daemons as operators meet them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from kit import BIN, NodeKit, eventually, write_model

SAY_AND_WAIT = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
path = os.environ["MODEL_PATH"]
child = subprocess.Popen(["sleep", "60"], close_fds=False)
offline = os.environ["HF_HUB_OFFLINE"]
print(os.path.exists(path + "/config.json"), os.environ["MODEL_ID"], offline, child.pid, flush=True)
signal.pause()
"""


def test_what_the_file_pins_stays_until_it_stands_there_no_more(cold_node: NodeKit, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    node, ref, config = cold_node, f"file://{tmp_path}/model/", tmp_path / "cached.toml"
    config.write_text(f'[store]\nkeep_free = 0.0\n[[pin]]\nref = "{ref}"\npriority = 3\n')
    node.serve("--config", str(config), with_preloader=False)
    eventually(lambda: node.row(ref).get("state") == "verified")
    refused = node.ctl("unpin", ref, code=7)
    assert str(config) in refused.stderr
    node.ctl("pin", ref)
    node.ctl("pin", ref, "--priority", "7")  # the same pin, changed
    assert sorted(claim["priority"] for claim in node.row(ref)["claims"]) == [3, 7]
    assert "(1 pin)" in node.ctl("unpin", ref).stdout  # the one by hand
    node.kill_daemon()
    node.serve("--config", str(config), with_preloader=False)
    assert [claim["kind"] for claim in node.row(ref)["claims"]] == ["pin"]
    node.stop_daemon()
    node.serve(with_preloader=False)
    assert node.row(ref)["claims"] == []


def test_a_command_holds_its_model_and_ends_as_it_ends(cold_node: NodeKit, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    node, ref = cold_node, f"file://{tmp_path}/model/"
    node.serve(with_preloader=False)
    command = [str(BIN / "cachectl"), "run", ref, "--", sys.executable, "-c", SAY_AND_WAIT]
    with subprocess.Popen(command, env=node.env(), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        there, model_id, offline, grandchild = running.stdout.readline().split()
        assert (there, offline, model_id) == ("True", "1", node.row(ref)["id"])
        assert len(node.leases(ref)) == 1
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 7
        # What the command has started holds it still.
        assert len(node.leases(ref)) == 1
        os.kill(int(grandchild), signal.SIGKILL)
        eventually(lambda: node.leases(ref) == [])
    assert node.ctl("run", ref, "--", "sh", "-c", "kill -9 $$", code=137)
    assert "name a program" in node.ctl("run", ref, "--", "/no/such/program", code=127).stderr
