"""Client of kubelet's pod-resources socket: which GPUs the orchestrator has given to whom.

Owns that connection, and the reading of what device plugins and resource drivers call a GPU. Decides nothing;
protobuf stays in here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import grpc
import grpc.aio

from cached.model import Device, temporary
from cached.v1 import pod_resources_pb2 as pb
from cached.v1 import pod_resources_pb2_grpc as pb_grpc

LIST_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024
MAX_NAMED = 3
"""So many pods that share a GPU are named; of more, how many."""

_OPTIONS = (
    # kubelet's server refuses what would stand here otherwise: the socket's path.
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)
# "GPU-…", of a GPU that is shared by time "GPU-…::3", of a resource driver "vendor.com/gpu=GPU-…".
_UUID = re.compile(r"(?:[^=]*=)?((?:GPU|MIG)-[A-Za-z0-9-]{1,60})(?:::[0-9]{1,9})?")


class PodResources:
    """Kubelet, over one connection that it makes anew where it has to. Used from one event loop."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._channel = grpc.aio.insecure_channel(f"unix:{path}", options=_OPTIONS)
        self._stub = pb_grpc.PodResourcesListerStub(self._channel)

    async def claimed(self) -> dict[Device, str]:
        """Every GPU that somebody has, and who that is: ``pod namespace/name``.

        Raises CachedError (KUBELET_GONE, temporary) where kubelet does not answer.
        """
        try:
            answer = await self._stub.List(pb.ListPodResourcesRequest(), timeout=LIST_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise temporary(
                "KUBELET_GONE",
                f"kubelet does not answer at {self._path}: {error.details()}",
                "mount its pod-resources directory, or set [standby] pod_resources; what it said last holds",
                1.0,
            ) from error
        pods: dict[Device, set[str]] = {}
        for pod in answer.pod_resources:
            for device in _gpus(pod):
                pods.setdefault(device, set()).add(f"pod {pod.namespace}/{pod.name}")
        return {device: _words(sorted(pods[device])) for device in sorted(pods)}

    async def close(self) -> None:
        await self._channel.close()


def _gpus(pod: pb.PodResources) -> Iterator[Device]:
    for container in pod.containers:
        names = [name for devices in container.devices for name in devices.device_ids]
        for given in container.dynamic_resources:
            names += [cdi.name for claim in given.claim_resources for cdi in claim.cdi_devices]
        for name in names:
            match = _UUID.fullmatch(name)
            if match is not None:
                yield Device(f"cuda:{match[1]}")


def _words(pods: list[str]) -> str:
    more = f" and {len(pods) - MAX_NAMED} more" if len(pods) > MAX_NAMED else ""
    return ", ".join(pods[:MAX_NAMED]) + more
