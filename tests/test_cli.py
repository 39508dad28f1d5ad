"""cachectl against a daemon on real sockets: what is asked, what is printed, what it exits with."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_daemon import Daemon, Refusal

from cached import cli
from cached.v1 import model_cache_pb2 as pb
from cached.v1 import operator_pb2 as op

REF = "https://models.example.com/mini[1]:smile:/"
ID = "sha256:" + "ab" * 32


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "run") as daemon:
        yield daemon


class Ran:
    """One command's outcome."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cachectl(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> Any:
    def ran(*arguments: str) -> Ran:
        code = cli.run([*arguments, "--run-dir", str(daemon.run_dir)])
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return ran


def a_model(**changed: Any) -> pb.Model:
    known: dict[str, Any] = {
        "ref": REF,
        "id": ID,
        "revision": "cd" * 32,
        "state": "verified",
        "attested": True,
        "bytes": 90_900_000,
        "devices": ["disk"],
        "path": "/data/trees/" + "ab" * 32,
    }
    return pb.Model(**(known | changed))


HOLDER = pb.Holder(pid=7, host="web-1", command="python serve.py", uid=1000)
FETCHING = pb.Progress(
    phase=pb.PHASE_FETCHING,
    bytes_done=1_200_000_000,
    bytes_total=2_900_000_000,
    rate_bytes_per_s=118e6,
    eta_s=14,
)


# --- ls, show, status -----------------------------------------------------------------------


def test_ls_prints_one_whole_line_for_each_model_in_a_pipe(daemon: Daemon, cachectl: Any) -> None:
    lease = pb.Claim(kind="lease", device="host", holder=HOLDER)
    away = a_model(
        ref="https://h/away/", state="fetching", devices=[], bytes=2_900_000_000, progress=FETCHING
    )
    warm = a_model(
        attested=False,
        devices=["disk", "host"],
        claims=[pb.Claim(kind="pin", device="host"), lease, lease],
        residencies=[pb.Residency(device="host", state="resident", locked=False)],
    )
    daemon.answers["List"] = pb.ListResponse(models=[warm, away])
    ran = cachectl("ls")
    head, first, second = ran.out.splitlines()
    assert head.split() == ["REF", "STATE", "SIZE", "ON", "CLAIMS"]
    assert first.split() == ["https://h/away/", "fetching", "41%", "2.9", "GB", "-", "-"]
    assert second.split("  ")[0] == REF
    for words in ("verified (unattested)", "90.9 MB", "disk, host (unlocked)", "2 leases, 1 pin"):
        assert words in second
    assert (ran.code, ran.err) == (0, "")


def test_ls_as_json_has_the_names_of_the_contract(daemon: Daemon, cachectl: Any) -> None:
    claim = pb.Claim(id="c1", kind="lease", device="disk", made_at=5.0, expires_at=9.0, holder=HOLDER)
    daemon.answers["List"] = pb.ListResponse(models=[a_model(claims=[claim])])
    (model,) = json.loads(cachectl("ls", "-o", "json").out)
    assert model == {
        "ref": REF,
        "id": ID,
        "state": "verified",
        "attested": True,
        "bytes": 90_900_000,
        "devices": ["disk"],
        "claims": [
            {
                "id": "c1",
                "kind": "lease",
                "device": "disk",
                "made_at": 5.0,
                "expires_at": 9.0,
                "holder": {"uid": 1000, "pid": 7, "host": "web-1", "command": "python serve.py", "pod": ""},
            }
        ],
    }


def test_ls_of_nothing_leaves_stdout_empty_and_says_how_to_begin(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["List"] = pb.ListResponse()
    ran = cachectl("ls")
    assert (ran.code, ran.out) == (0, "")
    assert "cachectl prefetch REF" in ran.err
    assert json.loads(cachectl("ls", "-o", "json").out) == []


def test_show_says_why_and_who(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Get"] = a_model(
        state="failed",
        reason="connection refused",
        hint="start the origin",
        last_used_at=time.time() - 130,
        claims=[pb.Claim(kind="lease", device="host", made_at=time.time() - 7300, holder=HOLDER)],
        residencies=[pb.Residency(device="host", state="resident", bytes=90_900_000, locked=False)],
        files=[pb.File(path="model.safetensors", bytes=90_800_000, sha256="ef" * 32)],
        progress=FETCHING,
    )
    ran = cachectl("show", REF)
    assert daemon.last("Get").ref == REF
    facts = [line.rstrip() for line in ran.out.splitlines()]
    for line in (
        f"ref     {REF}",
        f"id      {ID}",
        "state   failed",
        "reason  connection refused",
        "hint    start the origin",
        "origin  attests every digest",
        "size    90.9 MB in 1 file",
        "on      disk",
        "        host: resident but unlocked: proven at each handoff, 90.9 MB",
        "moving  fetching 41%, 1.2 GB of 2.9 GB, 118.0 MB/s, 14s left",
        "used    2m ago",
        "claims  lease on host, made 2h ago, uid 1000 (declares pid 7 on web-1: python serve.py)",
        "model.safetensors  90.8 MB  efefefefefef",
    ):
        assert line in facts


def test_show_as_json_has_everything(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Get"] = a_model(files=[pb.File(path="a", bytes=1, sha256="ef" * 32)], progress=FETCHING)
    shown = json.loads(cachectl("show", REF, "-o", "json").out)
    assert shown["files"] == [{"path": "a", "bytes": 1, "sha256": "ef" * 32}]
    assert (shown["progress"]["phase"], shown["progress"]["eta_s"]) == ("fetching", 14.0)
    assert (shown["revision"], shown["path"]) == ("cd" * 32, "/data/trees/" + "ab" * 32)
    assert shown["last_used_at"] is None


def test_status_shows_each_device_and_what_is_wrong_with_it(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Status"] = op.NodeStatus(
        version="0.1.0",
        pid=42,
        uptime_s=9000,
        data_dir="/d",
        run_dir="/r",
        models=4,
        pins=1,
        leases=2,
        transfers=1,
        origin_bytes=3_000_000_000,
        places=[
            op.Place(device="disk", capacity_bytes=80_000_000_000, used_bytes=17_000_000_000, connected=True),
            op.Place(device="host", connected=False, remarks=["memory is unlocked"]),
        ],
    )
    ran = cachectl("status")
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    for line in (
        "daemon cached 0.1.0, pid 42, up 2h 30m",
        "claims 1 pin, 2 leases, 0 prefetches",
        "moving 1 transfer, 0 loads; 3.0 GB from origins since it started",
        "disk 17.0 GB 0 B 80.0 GB 63.0 GB",
        "host 0 B 0 B - -",
        "host: its standby is not connected; is `preloader serve` running?",
        "host: memory is unlocked",
    ):
        assert line in lines
    known = json.loads(cachectl("status", "-o", "json").out)
    assert known["uptime_s"] == 9000
    assert [p["connected"] for p in known["places"]] == [True, False]


GPU = "cuda:GPU-5a6b7c8d-1234-5678-9abc-def012345678"


def test_gpus_are_shown_by_number_with_whose_they_are(daemon: Daemon, cachectl: Any) -> None:
    gpu = op.Place(
        device=GPU,
        index=3,
        name="NVIDIA H200",
        capacity_bytes=149_000_000_000,
        used_bytes=16_000_000_000,
        total_bytes=150_000_000_000,
        free_bytes=133_000_000_000,
        outside_bytes=500_000_000,
        claimed_by="pod web/vllm-0",
        connected=True,
        remarks=["unfit, nothing may stand there: XID 79"],
    )
    instance = op.Place(device="cuda:MIG-11112222-3333", index=3, name="NVIDIA H200 MIG 1g", connected=True)
    daemon.answers["Status"] = op.NodeStatus(places=[gpu, instance])
    lines = [" ".join(line.split()) for line in cachectl("status").out.splitlines()]
    assert "cuda:3 16.0 GB 0 B 149.0 GB 133.0 GB" in lines
    assert "cuda:MIG-11112222 0 B 0 B - -" in lines, "its GPU's number is no name for an instance"
    assert f"cuda:3 NVIDIA H200 133.0 GB 150.0 GB 500.0 MB pod web/vllm-0 {GPU}" in lines
    assert "cuda:3: unfit, nothing may stand there: XID 79" in lines
    known, _ = json.loads(cachectl("status", "-o", "json").out)["places"]
    assert (known["gpu"]["index"], known["gpu"]["claimed_by"]) == (3, "pod web/vllm-0")
    there = pb.Residency(device=GPU, state="resident", bytes=5, locked=True, hits=2, last_used_at=time.time())
    daemon.answers["Get"] = a_model(devices=["disk", GPU], residencies=[there])
    assert f"hits    2 grants from {GPU}, last 0s ago" in cachectl("show", REF).out


# --- prefetch, pin, unpin -------------------------------------------------------------------


def test_prefetch_waits_with_plain_lines_where_there_is_no_terminal(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Prefetch"] = [op.ClaimEvent(progress=FETCHING), op.ClaimEvent(done=a_model())]
    ran = cachectl("prefetch", REF, "--wait")
    assert (daemon.last("Prefetch").ref, daemon.last("Prefetch").wait) == (REF, True)
    assert ran.err == "fetching 41%, 1.2 GB of 2.9 GB, 118.0 MB/s, 14s left\n"
    assert ran.out == f"{REF} is on disk and proven: 90.9 MB\n"
    assert ran.code == 0


def test_prefetch_that_nobody_waits_for_says_so(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Prefetch"] = op.ClaimEvent(done=pb.Model(ref=REF, state="absent"))
    ran = cachectl("prefetch", REF)
    assert daemon.last("Prefetch").wait is False
    assert ran.out == f"{REF} is asked for; it is absent\n"


def test_pin_names_the_device_and_what_the_origin_does_not_attest(daemon: Daemon, cachectl: Any) -> None:
    there = a_model(devices=["disk", "host"], attested=False)
    daemon.answers["Pin"] = op.ClaimEvent(done=there)
    ran = cachectl("pin", REF, "--on", "host", "--wait")
    asked = daemon.last("Pin")
    assert (asked.ref, asked.device, asked.wait) == (REF, "host", True)
    assert ran.out == (
        f"{REF} is pinned and stands on host: 90.9 MB (unattested: its origin publishes no digests)\n"
    )


def test_pin_that_is_not_waited_for_does_not_claim_to_be_there(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Pin"] = op.ClaimEvent(done=a_model(devices=["disk"]))
    ran = cachectl("pin", REF, "--on", "host")
    assert ran.out == f"{REF} is pinned on host; it is verified\n"


def test_pins_of_pools_and_swaps_say_where_it_stands_now(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Pin"] = daemon.answers["Swap"] = op.ClaimEvent(done=a_model(devices=["disk", GPU]))
    ran = cachectl("pin", REF, "--on", "cuda:any", "--copies", "2", "--priority", "5", "--unclaimed")
    asked = daemon.last("Pin")
    assert (asked.device, asked.copies, asked.priority, asked.unclaimed) == ("cuda:any", 2, 5, True)
    assert ran.out == f"{REF} is pinned and stands on {GPU}: 90.9 MB\n"
    ran = cachectl("swap", "file:///old/", REF, "--on", "cuda:0", "--wait")
    asked = daemon.last("Swap")
    assert (asked.out, asked.ref, asked.device, asked.wait) == ("file:///old/", REF, "cuda:0", True)
    assert ran.out == f"{REF} is pinned on cuda:0 in the place of file:///old/; it is on disk, {GPU}\n"
    assert cachectl("swap", "file:///old/", REF).code == 2  # a swap is somewhere
    pin = pb.Claim(kind="pin", device="cuda:any", copies=2, priority=5, unclaimed=True, of_file=True)
    daemon.answers["Get"] = a_model(claims=[pin])
    said = (
        "pin on cuda:any, made never, of the configuration file, 2 copies, priority 5, also on unclaimed GPUs"
    )
    assert f"claims  {said}" in cachectl("show", REF).out


def test_unpin_where_there_is_no_pin_exits_3(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Unpin"] = op.UnpinResponse(pins=1)
    assert cachectl("unpin", REF).out == f"{REF} is unpinned (1 pin)\n"
    daemon.answers["Unpin"] = Refusal("NOT_FOUND", "NOT_PINNED", "it is not pinned", "see `cachectl ls`")
    assert cachectl("unpin", REF).code == 3
    daemon.answers["Unpin"] = op.UnpinResponse(pins=0)
    ran = cachectl("unpin", REF)
    assert ran.code == 3
    assert ran.err.startswith(f"error: there is no pin on {REF}\nhint: ")


# --- path -----------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "trees" / ("ab" * 32)
    tree.mkdir(parents=True)
    return tree


def granted(tree: Path, **changed: Any) -> list[pb.AcquireEvent]:
    grant = pb.Grant(model=a_model(path=str(tree)), **changed)
    return [pb.AcquireEvent(progress=FETCHING), pb.AcquireEvent(grant=grant)]


def test_path_prints_the_directory_alone_and_takes_no_lease(
    daemon: Daemon, cachectl: Any, tree: Path
) -> None:
    daemon.answers["Acquire"] = granted(tree)
    ran = cachectl("path", REF)
    asked = daemon.last("Acquire")
    assert (asked.ref, asked.device, asked.lease, asked.ttl_s) == (REF, "disk", pb.LEASE_MODE_NONE, 0)
    assert ran.out == f"{tree}\n"
    assert ran.code == 0


def test_path_with_a_ttl_leases_and_says_who_it_is(daemon: Daemon, cachectl: Any, tree: Path) -> None:
    daemon.answers["Acquire"] = granted(tree, lease_id="l-1")
    ran = cachectl("path", REF, "--ttl", "600")
    asked = daemon.last("Acquire")
    assert (asked.lease, asked.ttl_s, asked.holder.pid) == (pb.LEASE_MODE_TTL, 600, os.getpid())
    assert ran.out == f"{tree}\n"
    assert "leased for 10m as l-1" in ran.err


def test_path_links_and_moves_its_own_link(daemon: Daemon, cachectl: Any, tree: Path, tmp_path: Path) -> None:
    daemon.answers["Acquire"] = granted(tree)
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "gone")
    ran = cachectl("path", REF, "--link", f"{link}/")
    assert (ran.code, ran.out) == (0, f"{tree}\n")
    assert link.readlink() == tree
    assert sorted(p.name for p in tmp_path.iterdir()) == ["current", "run", "trees"]


@pytest.mark.parametrize("what", ["file", "directory", "nowhere"])
def test_path_replaces_nothing_but_a_symlink_and_refuses_before_it_waits(
    daemon: Daemon, cachectl: Any, tmp_path: Path, what: str
) -> None:
    link = tmp_path / what
    match what:
        case "file":
            link.write_text("mine")
        case "directory":
            link.mkdir()
        case _:
            link = tmp_path / "no" / "such" / "parent"
    ran = cachectl("path", REF, "--link", str(link))
    assert ran.code == 1
    assert str(link) in ran.err
    assert "hint: " in ran.err
    assert daemon.asked == []
    assert what != "file" or link.read_text() == "mine"


def test_path_that_cannot_be_seen_from_here_is_told_and_not_linked(
    daemon: Daemon, cachectl: Any, tmp_path: Path
) -> None:
    daemon.answers["Acquire"] = granted(tmp_path / "elsewhere")
    ran = cachectl("path", REF)
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'elsewhere'}\n")
    assert "CACHED_DATA_DIR" in ran.err
    ran = cachectl("path", REF, "--link", str(tmp_path / "link"))
    assert (ran.code, ran.out) == (1, "")
    assert not os.path.lexists(tmp_path / "link")


# --- evict, verify --------------------------------------------------------------------------


def test_evict_says_what_it_freed_or_who_holds_it(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Evict"] = op.EvictResponse(id=ID, freed_bytes=90_900_000)
    assert cachectl("evict", REF).out == f"{REF} is evicted: 90.9 MB freed on disk\n"
    held = f"{REF} is claimed: uid 1000 (declares pid 7)"
    daemon.answers["Evict"] = Refusal("FAILED_PRECONDITION", "CLAIMED", held, "leases end with their holders")
    ran = cachectl("evict", REF)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"error: {held}\nhint: leases end with their holders\n"


GOOD = op.VerifyEvent(verified=op.Verified(ref=REF, id=ID, ok=True, bytes=90_900_000))
WRONG = op.VerifyEvent(
    verified=op.Verified(
        ref="file:///bad/", id=ID, ok=False, bytes=5, reason="a.bin has sha256 aa, proven was bb"
    )
)


def test_verify_names_what_differs_and_exits_4(daemon: Daemon, cachectl: Any) -> None:
    progress = pb.Progress(phase=pb.PHASE_QUEUED, bytes_done=1, bytes_total=4)
    daemon.answers["Verify"] = [op.VerifyEvent(progress=progress), GOOD, WRONG]
    ran = cachectl("verify", "--all")
    assert daemon.last("Verify").ref == ""
    good, wrong = ran.out.splitlines()
    assert good.split() == ["ok", "90.9", "MB", REF]
    assert wrong.split()[:4] == ["differs", "5", "B", "file:///bad/:"]
    assert wrong.endswith("a.bin has sha256 aa, proven was bb")
    assert ran.code == 4
    assert ran.err.splitlines()[0] == "verifying 25%, 1 B of 4 B"
    assert "1 of 2 models differ" in ran.err and "file:///bad/" in ran.err


def test_verify_as_json_still_exits_4(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Verify"] = [GOOD, WRONG]
    ran = cachectl("verify", REF, "-o", "json")
    assert daemon.last("Verify").ref == REF
    assert [(v["ref"], v["ok"]) for v in json.loads(ran.out)] == [(REF, True), ("file:///bad/", False)]
    assert ran.code == 4
    daemon.answers["Verify"] = [GOOD]
    assert cachectl("verify", REF, "-o", "json").code == 0


@pytest.mark.parametrize("arguments", [(), (REF, "--all")])
def test_verify_wants_a_ref_or_all_of_them(daemon: Daemon, cachectl: Any, arguments: tuple[str, ...]) -> None:
    assert cachectl("verify", *arguments).code == 2
    assert daemon.asked == []


# --- errors, deadlines, sockets -------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("UNKNOWN", 1),
        ("UNAVAILABLE", 1),
        ("FAILED_PRECONDITION", 1),
        ("INVALID_ARGUMENT", 2),
        ("NOT_FOUND", 3),
        ("DATA_LOSS", 4),
        ("RESOURCE_EXHAUSTED", 5),
        ("PERMISSION_DENIED", 7),
        ("DEADLINE_EXCEEDED", 8),
    ],
)
def test_what_the_daemon_refuses_is_told_as_it_said_it(
    daemon: Daemon, cachectl: Any, status: str, code: int
) -> None:
    refusal = Refusal(status, "SOME_REASON", "what and where", "how to mend it")
    daemon.answers |= {"Prefetch": [op.ClaimEvent(progress=FETCHING), refusal], "Get": refusal}
    for arguments in (("prefetch", REF, "--wait"), ("show", REF)):
        ran = cachectl(*arguments)
        assert (ran.code, ran.out) == (code, "")
        assert ran.err.endswith("error: what and where\nhint: how to mend it\n")


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("List", ("ls",)),
        ("Prefetch", ("prefetch", REF)),
        ("Acquire", ("path", REF)),
        ("Evict", ("evict", REF)),
    ],
)
def test_a_passed_deadline_exits_8(
    daemon: Daemon, cachectl: Any, call: str, arguments: tuple[str, ...]
) -> None:
    def dawdle() -> None:
        daemon.gone.wait(20)

    daemon.answers[call] = [dawdle] if call in ("Prefetch", "Acquire") else dawdle
    started = time.monotonic()
    ran = cachectl(*arguments, "--timeout", "0.2")
    assert ran.code == 8
    assert "--timeout" in ran.err
    assert time.monotonic() - started < 5


def test_a_deadline_that_passes_midway_says_how_far_it_was(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["Pin"] = [op.ClaimEvent(progress=FETCHING), lambda: daemon.gone.wait(20)]
    ran = cachectl("pin", REF, "--wait", "--timeout", "0.3")
    assert ran.code == 8
    assert "not done within 0.3 s; it was fetching 41%" in ran.err


@pytest.mark.parametrize("given", ["0", "-1", "nan", "604801", "soon"])
def test_a_senseless_timeout_is_a_usage_error(daemon: Daemon, cachectl: Any, given: str) -> None:
    ran = cachectl("ls", "--timeout", given)
    assert (ran.code, daemon.asked) == (2, [])
    assert "'--timeout'" in ran.err
    assert "`cachectl ls --help`" in ran.err


def test_no_daemon_exits_6_with_the_place_and_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["ls"], ["pin", REF, "--wait"], ["path", REF], ["status"]):
        assert cli.run([*arguments, "--run-dir", str(tmp_path)]) == 6
        told = capsys.readouterr()
        assert told.out == ""
        assert str(tmp_path / "cached.sock") in told.err
        assert "hint: start `cached serve`" in told.err


def test_a_waiting_command_that_loses_its_daemon_exits_6(daemon: Daemon, cachectl: Any) -> None:
    stop = [op.ClaimEvent(progress=FETCHING), lambda: daemon.gone.wait(20)]
    daemon.answers["Prefetch"] = stop

    threading.Timer(0.5, daemon.stop).start()
    ran = cachectl("prefetch", REF, "--wait")
    assert ran.code == 6
    assert f"the daemon at {daemon.operators} went away while this command waited" in ran.err
    assert "hint: once it runs again, repeat the command" in ran.err


def test_an_answer_without_a_result_is_an_error_and_not_success(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers |= {"Pin": [], "Acquire": []}
    for arguments in (("pin", REF), ("path", REF)):
        ran = cachectl(*arguments)
        assert ran.code == 1
        assert "without a result" in ran.err


def test_reading_goes_by_the_replicas_socket_where_there_is_no_other(daemon: Daemon, cachectl: Any) -> None:
    daemon.answers["List"] = pb.ListResponse(models=[a_model()])
    daemon.operators.unlink()
    assert REF in cachectl("ls").out
    assert cachectl("unpin", REF).code == 6


def test_an_operators_command_at_the_replicas_socket_is_refused(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["evict", REF, "--address", f"unix:{daemon.replicas}"]) == 1
    assert "operators" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["pinn"], ["pin"], ["ls", "-o", "yaml"], ["path", REF, "--ttl", "0"], ["ls", "--frob"]]
)
def test_usage_errors_exit_2_and_point_to_help(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ") and "--help` says how it is used" in told.err
