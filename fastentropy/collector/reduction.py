"""Sum tensors over the ranks of torch.distributed, over the backend of the device that counted."""

import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_CPU = torch.device("cpu")


def check_backend() -> None:
    """Raise ValueError if the process group has no backend for tensors that this process can have."""
    accelerator, backends = _accelerator(), _backends()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    if not any(kind in backends for kind in kinds):
        raise ValueError(
            f"the process group has no backend for {' or '.join(kinds)} tensors, only {dist.get_backend_config()}; "
            "initialize it with torch.distributed.init_process_group('cpu:gloo,cuda:nccl')"
        )


def counting_device(devices: Sequence[torch.device]) -> torch.device:
    """Return the device of a rank that counted on some devices.

    An accelerator goes before the CPU, and the current accelerator before others.

    Args:
        devices: the devices on which the rank counted. None of them means the CPU.
    """
    accelerators = [device for device in devices if device.type != "cpu"]
    if not accelerators:
        return _CPU
    current = None if _accelerator() is None else torch.accelerator.current_device_index()
    return next((device for device in accelerators if device.index == current), accelerators[0])


def device_name(device: torch.device) -> str:
    """Return a name of a device that no other device has, also in another process or on another machine.

    It begins with the type of the device, such as "cuda", and a space.
    """
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_properties(device).uuid}"
    return f"{device.type} {socket.gethostname()} {device.index}"


def reduction_device(names: Sequence[str], own: torch.device) -> torch.device:
    """Return the device whose backend sums the counts. All ranks get a device of the same type.

    This is the accelerator that counted, if each rank has one of its own, and the group another backend for it than for the
    CPU, such as NCCL. NCCL refuses ranks that share a GPU, so their counts are summed on the CPU if the group has a backend for
    it.

    Args:
        names: the names of the devices that counted, by rank (see `device_name`).
        own: the device of this rank.
    """
    backends = _backends()
    kinds = {name.partition(" ")[0] for name in names}
    has_own_backend = own.type in backends and backends[own.type] != backends.get("cpu")
    if has_own_backend and kinds == {own.type} and len(set(names)) == len(names):
        return own
    accelerator = _accelerator()
    if "cpu" in backends or accelerator is None:
        return _CPU
    return own if own.type == accelerator.type else accelerator


def all_reduce(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Sum tensors over all ranks, in one collective operation on one buffer.

    Args:
        tensors: tensors of one dtype on the CPU, of the same shapes on all ranks.
        device: where the buffer lies: what `reduction_device` returned.

    Returns:
        The sums on the CPU, in the shapes of `tensors`.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors]) if tensors else torch.empty(0, device="cpu")
    if not flat.numel():
        return list(tensors)
    flat = flat.to(device)
    dist.all_reduce(flat)
    parts = torch.split(flat.cpu(), [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _backends() -> dict[str, str]:
    """Return the backends of the process group, by type of device."""
    pairs = (pair.partition(":") for pair in dist.get_backend_config().split(","))
    return {kind: backend for kind, _, backend in pairs}


def _accelerator() -> torch.device | None:
    """Return the kind of accelerator that this process can use, such as `device("cuda")`; None if there is none."""
    return torch.accelerator.current_accelerator(check_available=True)
