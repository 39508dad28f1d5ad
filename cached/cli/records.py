"""What `-o json` prints: the wire's messages as plain records, with the names of the outer contract.

Pure. Owns the JSON's names and nothing else; a number that has no value is null, a word that has
none is the empty string.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cached.cli import words

if TYPE_CHECKING:
    from cached.v1 import model_cache_pb2 as pb
    from cached.v1 import operator_pb2 as op

Record = dict[str, Any]


def listed(model: pb.Model) -> Record:
    """One line of `ls -o json`."""
    return {
        "ref": model.ref,
        "id": model.id,
        "state": model.state,
        "attested": model.attested,
        "bytes": model.bytes,
        "devices": list(model.devices),
        "claims": [_claim(c) for c in model.claims],
    }


def shown(model: pb.Model) -> Record:
    """All that is known of one model."""
    return listed(model) | {
        "revision": model.revision,
        "path": model.path,
        "reason": model.reason,
        "hint": model.hint,
        "last_used_at": model.last_used_at or None,
        "progress": _progress(model.progress) if model.HasField("progress") else None,
        "residencies": [
            {
                "device": r.device,
                "state": r.state,
                "bytes": r.bytes,
                "locked": r.locked,
                "hits": r.hits,
                "last_used_at": r.last_used_at or None,
            }
            for r in model.residencies
        ],
        "files": [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in model.files],
    }


def status(node: op.NodeStatus) -> Record:
    """The node and each of its places."""
    return {
        "version": node.version,
        "pid": node.pid,
        "data_dir": node.data_dir,
        "run_dir": node.run_dir,
        "uptime_s": node.uptime_s,
        "places": [_place(p) for p in node.places],
        "models": node.models,
        "pins": node.pins,
        "leases": node.leases,
        "prefetches": node.prefetches,
        "transfers": node.transfers,
        "loads": node.loads,
        "origin_bytes": node.origin_bytes,
    }


def verified(outcome: op.Verified) -> Record:
    """One artifact's outcome of `verify`."""
    return {
        "ref": outcome.ref,
        "id": outcome.id,
        "ok": outcome.ok,
        "bytes": outcome.bytes,
        "reason": outcome.reason,
    }


def _place(place: op.Place) -> Record:
    return {
        "device": place.device,
        "connected": place.connected,
        "capacity_bytes": place.capacity_bytes,
        "used_bytes": place.used_bytes,
        "claimed_bytes": place.claimed_bytes,
        "remarks": list(place.remarks),
        "pid": place.pid or None,
        "gpu": _gpu(place) if place.name else None,
    }


def _gpu(place: op.Place) -> Record:
    return {
        "index": place.index,
        "name": place.name,
        "total_bytes": place.total_bytes,
        "free_bytes": place.free_bytes,
        "outside_bytes": place.outside_bytes,
        "unfit_reason": place.unfit_reason,
        "claimed_by": place.claimed_by,
    }


def _claim(claim: pb.Claim) -> Record:
    return {
        "id": claim.id,
        "kind": claim.kind,
        "device": claim.device,
        "made_at": claim.made_at,
        "expires_at": claim.expires_at or None,
        "holder": _holder(claim.holder) if claim.HasField("holder") else None,
        **(_pin(claim) if claim.copies else {}),
    }


def _pin(claim: pb.Claim) -> Record:
    return {
        "copies": claim.copies,
        "priority": claim.priority,
        "unclaimed": claim.unclaimed,
        "of_file": claim.of_file,
    }


def _holder(holder: pb.Holder) -> Record:
    return {
        "uid": holder.uid if holder.uid >= 0 else None,
        "pid": holder.pid,
        "host": holder.host,
        "command": holder.command,
        "pod": holder.pod,
    }


def _progress(progress: pb.Progress) -> Record:
    known_eta = progress.rate_bytes_per_s > 0 and progress.eta_s >= 0
    return {
        "phase": words.phase(progress),
        "bytes_done": progress.bytes_done,
        "bytes_total": progress.bytes_total,
        "rate_bytes_per_s": progress.rate_bytes_per_s,
        "eta_s": progress.eta_s if known_eta else None,
        "message": progress.message,
    }
