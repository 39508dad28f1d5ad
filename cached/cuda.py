"""GPU memory through the CUDA driver: make it, share it as descriptors, map it, copy to and from it.

Owns every call of the driver that the project makes, and the names of its errors. Knows nothing of models.
The bindings are imported with the first ``Driver``, so that this room costs nothing where there is no GPU;
versions 12.9 and 13 of them will do. Addresses and handles are plain integers, sizes are bytes.

Creating, exporting and importing memory need no context; mapping it does not either, but access to what is
mapped, pinned memory, streams and copies do: ``Gpu.context``.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any


class CudaError(Exception):
    """A call of the driver that failed: ``name`` is the driver's own word for it (CUDA_ERROR_…).

    ``CUDA_MISSING`` is ours, for a machine without the bindings or without the driver.
    """

    def __init__(self, call: str, name: str, why: str = "") -> None:
        super().__init__(f"{call}: {why or name}")
        self.call = call
        self.name = name


class Driver:
    """The driver as one process sees it. Raises CudaError where there is none, or no device."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver  # late: most processes that import this have no GPU
        except ImportError as error:
            raise CudaError("import cuda.bindings", "CUDA_MISSING", str(error)) from error
        self.cu: Any = driver
        try:
            self.call("cuInit", 0)
        except CudaError:
            raise
        except Exception as error:  # the bindings raise errors of their own where libcuda is not found
            raise CudaError("cuInit", "CUDA_MISSING", str(error)) from error

    @property
    def version(self) -> int:
        """13010 is 13.1."""
        return int(self.call("cuDriverGetVersion"))

    @property
    def torch_device(self) -> str:
        """Torch's word for where this driver's addresses lie."""
        return str(getattr(self.cu, "TORCH_DEVICE", "cuda"))

    def gpus(self) -> list[Gpu]:
        """The devices that this process may see (CUDA_VISIBLE_DEVICES), in the driver's order."""
        return [Gpu(self, ordinal) for ordinal in range(self.call("cuDeviceGetCount"))]

    def call(self, name: str, *arguments: Any) -> Any:
        """One call; its results as the bindings have them: None, one, or a tuple. Raises CudaError."""
        result, *values = getattr(self.cu, name)(*arguments)
        if int(result) != 0:
            raise CudaError(name, str(getattr(result, "name", result)))
        return values[0] if len(values) == 1 else tuple(values) or None


class Gpu:
    """One device (or MIG instance) and its memory. Every method raises CudaError."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self.driver = driver
        self.ordinal = ordinal
        cu = driver.cu
        self._device = driver.call("cuDeviceGet", ordinal)
        self._location = cu.CUmemLocation()
        self._location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._location.id = ordinal
        self._fd_type = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._properties = cu.CUmemAllocationProp()
        self._properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.requestedHandleTypes = self._fd_type
        self._properties.location = self._location

    @property
    def uuid(self) -> str:
        """36 characters, in the usual form; the instance's where it is one of MIG. Without GPU- or MIG-."""
        name = "cuDeviceGetUuid_v2" if hasattr(self.driver.cu, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        return str(uuid.UUID(bytes=bytes(self.driver.call(name, self._device).bytes)))

    @property
    def name(self) -> str:
        raw: bytes = self.driver.call("cuDeviceGetName", 128, self._device)
        return raw.split(b"\0", 1)[0].decode("ascii", "replace")

    def attribute(self, name: str) -> int:
        """``CU_DEVICE_ATTRIBUTE_<name>``."""
        attributes = self.driver.cu.CUdevice_attribute
        return int(
            self.driver.call(
                "cuDeviceGetAttribute", getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}"), self._device
            )
        )

    # --- memory as handles and descriptors, without a context -------------------------------------

    def granularity_bytes(self) -> int:
        """What sizes of memory and of reservations are multiples of."""
        flags = self.driver.cu.CUmemAllocationGranularity_flags
        least = flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self.driver.call("cuMemGetAllocationGranularity", self._properties, least))

    def create(self, size_bytes: int) -> int:
        """New memory; returns its handle."""
        return int(self.driver.call("cuMemCreate", size_bytes, self._properties, 0))

    def export(self, handle: int) -> int:
        """A descriptor of the memory, which keeps it; the caller closes it."""
        return int(self.driver.call("cuMemExportToShareableHandle", handle, self._fd_type, 0))

    def import_(self, fd: int) -> int:
        """A handle of the memory behind ``fd``, which may be closed afterwards."""
        return int(self.driver.call("cuMemImportFromShareableHandle", fd, self._fd_type))

    def release(self, handle: int) -> None:
        """Give a handle back; what is mapped or exported stays."""
        self.driver.call("cuMemRelease", handle)

    # --- memory at addresses ---------------------------------------------------------------------

    def reserve(self, size_bytes: int) -> int:
        """Addresses for ``size_bytes``; returns the first."""
        return int(self.driver.call("cuMemAddressReserve", size_bytes, 0, 0, 0))

    def free(self, address: int, size_bytes: int) -> None:
        """Give a whole reservation back, in which nothing is mapped any more."""
        self.driver.call("cuMemAddressFree", address, size_bytes)

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        """Map all of a handle's memory; nobody may touch it before ``allow``."""
        self.driver.call("cuMemMap", address, size_bytes, 0, handle, 0)

    def unmap(self, address: int, size_bytes: int) -> None:
        """End every mapping within the range, whole ones only."""
        self.driver.call("cuMemUnmap", address, size_bytes)

    def allow(self, address: int, size_bytes: int, *, write: bool) -> None:
        """Let this GPU's code and copies read (and write) what is mapped there."""
        cu = self.driver.cu
        access = cu.CUmemAccessDesc()
        access.location = self._location
        flags = cu.CUmemAccess_flags
        access.flags = (
            flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if write else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        )
        self.driver.call("cuMemSetAccess", address, size_bytes, [access], 1)

    # --- with a context ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The device's primary context, retained, and current in this thread."""
        context = self.driver.call("cuDevicePrimaryCtxRetain", self._device)
        try:
            before = self.driver.call("cuCtxGetCurrent")
            self.driver.call("cuCtxSetCurrent", context)
            try:
                yield
            finally:
                self.driver.call("cuCtxSetCurrent", before)
        finally:
            self.driver.call("cuDevicePrimaryCtxRelease", self._device)

    def hold(self) -> None:
        """Keep the primary context, and what is made in it, until ``let_go``."""
        self.driver.call("cuDevicePrimaryCtxRetain", self._device)

    def let_go(self) -> None:
        """The context ends with its last holder; torch is one where it has used the device."""
        self.driver.call("cuDevicePrimaryCtxRelease", self._device)

    def finish(self) -> None:
        """Wait until all is done that this process has asked of the device."""
        self.driver.call("cuCtxSynchronize")

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, as the device reports them."""
        free, total = self.driver.call("cuMemGetInfo")
        return int(free), int(total)

    def pin(self, size_bytes: int) -> int:
        """Pinned host memory; returns its address."""
        return int(self.driver.call("cuMemHostAlloc", size_bytes, 0))

    def unpin(self, address: int) -> None:
        self.driver.call("cuMemFreeHost", address)

    def stream(self) -> Any:
        """A stream that waits for no other."""
        return self.driver.call("cuStreamCreate", int(self.driver.cu.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def end_stream(self, stream: Any) -> None:
        self.driver.call("cuStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        """Wait until all that was asked of the stream is done. Its late errors are raised here."""
        self.driver.call("cuStreamSynchronize", stream)

    def copy_in(self, address: int, host_address: int, size_bytes: int, stream: Any) -> None:
        """Begin to copy from the host to the device."""
        self.driver.call("cuMemcpyHtoDAsync", address, host_address, size_bytes, stream)

    def copy_out(self, host_address: int, address: int, size_bytes: int, stream: Any) -> None:
        """Begin to copy from the device to the host."""
        self.driver.call("cuMemcpyDtoHAsync", host_address, address, size_bytes, stream)
