"""Memory of a GPU that other processes of the machine can map.

Physical memory of CUDA's virtual memory management (cuMemCreate), shared by a file descriptor: it
lives until the last process has unmapped it, so a mapping stays valid when its owner is killed,
which `cudaIpcOpenMemHandle` does not promise. Names are those of the CUDA driver API.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref

import torch
from torch import Tensor

from fourfold.kernels.borrowed import borrow
from fourfold.transport.peer import DeviceMemory

_PINNED, _DEVICE, _POSIX_FD = 1, 1, 1
_READ_WRITE = 3
_MINIMUM = 0
_PIDFD_GETFD = 438
_PR_SET_PTRACER, _ANY = 0x59616D61, -1


class DeviceMemoryError(RuntimeError):
    """GPU memory that cannot be shared or mapped; `str(error)` says why."""


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compressionType", ctypes.c_ubyte),
        ("gpuDirectRDMACapable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("requestedHandleTypes", ctypes.c_int),
        ("location", _Location),
        ("win32HandleMetaData", ctypes.c_void_p),
        ("allocFlags", _Flags),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


def share(size: int, device: torch.device) -> tuple[Tensor, DeviceMemory]:
    """Zeros, uint8 [size], and how others map them. They live as long as the tensor, and others'
    mappings. Raises `DeviceMemoryError`."""
    properties = _properties(device)
    room = _room(size, properties)
    handle = ctypes.c_ulonglong()
    _call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(room), properties, _u64(0))
    descriptor = ctypes.c_int(-1)
    try:
        _call("cuMemExportToShareableHandle", ctypes.byref(descriptor), handle, _POSIX_FD, _u64(0))
        memory = _map(handle, room, device)
    except DeviceMemoryError:
        if descriptor.value >= 0:
            os.close(descriptor.value)  # which would keep the memory
        raise
    finally:
        _call("cuMemRelease", handle)
    weakref.finalize(memory, os.close, descriptor.value)
    _let_others_ask()
    tensor = borrow(memory.address, size, _indexed(device), memory)
    return tensor.zero_(), DeviceMemory(os.getpid(), descriptor.value, size)


def attach(memory: DeviceMemory, device: torch.device) -> Tensor:
    """The memory that another process shares, uint8 [size], for `device` to read: its own, or that
    of another GPU that it can reach, which only our own kernels may do. It stays mapped as long as
    the tensor lives. Raises `DeviceMemoryError`."""
    descriptor = _descriptor_of(memory)
    handle = ctypes.c_ulonglong()
    try:
        _call(
            "cuMemImportFromShareableHandle",
            ctypes.byref(handle),
            ctypes.c_void_p(descriptor),
            _POSIX_FD,
        )
    finally:
        os.close(descriptor)
    try:
        mapped = _map(handle, _room(memory.size, _properties(device)), device)
    finally:
        _call("cuMemRelease", handle)
    return borrow(mapped.address, memory.size, _indexed(device), mapped)


def _properties(device: torch.device) -> _Properties:
    return _Properties(
        type=_PINNED,
        requestedHandleTypes=_POSIX_FD,
        location=_Location(_DEVICE, _index(device)),
    )


def _room(size: int, properties: _Properties) -> int:
    """What memory of this size takes: whole pieces of the device's memory."""
    granularity = ctypes.c_size_t()
    _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), properties, _MINIMUM)
    return -(-size // granularity.value) * granularity.value


class _Mapped:
    """Mapped memory; unmapped when nothing holds it any more."""

    def __init__(self, address: int) -> None:
        self.address = address


def _map(handle: ctypes.c_ulonglong, size: int, device: torch.device) -> _Mapped:
    address, length = ctypes.c_ulonglong(), ctypes.c_size_t(size)
    _call(
        "cuMemAddressReserve", ctypes.byref(address), length, ctypes.c_size_t(0), _u64(0), _u64(0)
    )
    mapped = False
    try:
        _call("cuMemMap", address, length, ctypes.c_size_t(0), handle, _u64(0))
        mapped = True
        access = _Access(_Location(_DEVICE, _index(device)), _READ_WRITE)
        _call("cuMemSetAccess", address, length, ctypes.byref(access), ctypes.c_size_t(1))
    except DeviceMemoryError:
        _unmap(address.value, size, mapped=mapped)
        raise
    memory = _Mapped(address.value)
    # Not at exit: the driver may have ended by then, and gives everything back itself.
    weakref.finalize(memory, _unmap, address.value, size).atexit = False
    return memory


def _unmap(address: int, size: int, *, mapped: bool = True) -> None:
    if mapped:
        _call("cuMemUnmap", _u64(address), ctypes.c_size_t(size))
    _call("cuMemAddressFree", _u64(address), ctypes.c_size_t(size))


def _descriptor_of(memory: DeviceMemory) -> int:
    """The other process's descriptor in this one."""
    if memory.process == os.getpid():
        return os.dup(memory.descriptor)
    try:
        process = os.pidfd_open(memory.process)
    except OSError as error:
        raise DeviceMemoryError(f"process {memory.process}: {error.strerror}") from None
    try:
        found = _libc().syscall(_PIDFD_GETFD, process, memory.descriptor, 0)
    finally:
        os.close(process)
    if found < 0:
        reason = os.strerror(ctypes.get_errno())
        raise DeviceMemoryError(
            f"process {memory.process} does not hand out its memory ({reason}); run all workers of "
            "a machine as one user and in one namespace of processes"
        )
    return int(found)


@functools.cache
def _let_others_ask() -> None:
    """Where the kernel lets only ancestors take descriptors (Yama), others may as well."""
    _libc().prctl(_PR_SET_PTRACER, ctypes.c_ulong(_ANY & 0xFFFFFFFFFFFFFFFF), 0, 0, 0)


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", _index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _u64(value: int) -> ctypes.c_ulonglong:
    return ctypes.c_ulonglong(value)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    """Calls the CUDA driver. Raises `DeviceMemoryError` with what it says."""
    arguments = tuple(
        ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument
        for argument in arguments
    )
    code = getattr(_driver(), name)(*arguments)
    if code:
        said = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(said))
        raise DeviceMemoryError(f"{name}: {(said.value or b'unknown error').decode()} ({code})")
