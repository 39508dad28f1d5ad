"""The daemon as kubelet's client, against a server that plays kubelet on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from cached.metrics import Metrics
from cached.node.claimed import ClaimedGpus
from cached.node.core import Core
from cached.plan import State
from cached.v1 import pod_resources_pb2 as pb
from cached.v1 import pod_resources_pb2_grpc as pb_grpc


class Kubelet(pb_grpc.PodResourcesListerServicer):
    def __init__(self, *pods: pb.PodResources) -> None:
        self.pods = pods

    async def List(self, request: pb.ListPodResourcesRequest, context: object) -> pb.ListPodResourcesResponse:
        return pb.ListPodResourcesResponse(pod_resources=self.pods)

    async def serve(self, path: Path) -> grpc.aio.Server:
        server = grpc.aio.server()
        pb_grpc.add_PodResourcesListerServicer_to_server(self, server)
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        return server


def pod(name: str, *ids: str, cdi: str = "") -> pb.PodResources:
    given = pb.DynamicResource(claim_resources=[pb.ClaimResource(cdi_devices=[pb.CDIDevice(name=cdi)])])
    devices = pb.ContainerDevices(resource_name="nvidia.com/gpu", device_ids=ids)
    container = pb.ContainerResources(name="main", devices=[devices], dynamic_resources=[given])
    return pb.PodResources(name=name, namespace="ns", containers=[container])


async def eventually(happens: Callable[[], bool]) -> None:
    for _ in range(500):
        if happens():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it did not happen within 10 s")


async def test_what_kubelet_has_given_is_told_on_a_change_and_outlasts_kubelet(
    tmp_path: Path,
) -> None:
    # The names on the wire are Kubernetes', not ours.
    assert pb.DESCRIPTOR.services_by_name["PodResourcesLister"].full_name == "v1.PodResourcesLister"
    core, path = Core(State(1), lambda action: None), tmp_path / "kubelet.sock"
    following = asyncio.create_task(ClaimedGpus(str(path), core, Metrics("0"), every_s=0.05).run())
    running = asyncio.create_task(core.run())

    await asyncio.sleep(0.1)  # kubelet is not there yet: nothing is known
    kubelet = Kubelet(
        pod("whole", "GPU-1a", "0000:3b:00.1"), pod("slice", "MIG-2b"), pod("timed", "GPU-3c::0", "GPU-3c::7")
    )
    server = await kubelet.serve(path)
    first = {"cuda:GPU-1a": "pod ns/whole", "cuda:MIG-2b": "pod ns/slice", "cuda:GPU-3c": "pod ns/timed"}
    await eventually(lambda: core.state.claimed_gpus == first)

    kubelet.pods = (
        pod("other", "GPU-3c::1"),
        pod("timed", "GPU-3c::0"),
        pod("dra", cdi="nvidia.com/gpu=GPU-4d"),
    )
    second = {"cuda:GPU-3c": "pod ns/other, pod ns/timed", "cuda:GPU-4d": "pod ns/dra"}
    await eventually(lambda: core.state.claimed_gpus == second)

    await server.stop(None)
    await asyncio.sleep(0.2)
    assert core.state.claimed_gpus == second
    kubelet.pods = ()
    server = await kubelet.serve(path)  # kubelet restarts
    await eventually(lambda: not core.state.claimed_gpus)
    for task in (following, running):
        task.cancel()
    await server.stop(None)
