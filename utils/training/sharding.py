"""A model that several processes share: FSDP2. With one process, these functions return what they were given.

Each process holds 1/N of every weight, gradient and average of AdamW.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from utils.model.checks import check_causal
from utils.model.lora import has_adapter, merge_adapter
from utils.training.parallel import from_main, is_main, size


def build_alike(model):
    """Return the model of process 0; elsewhere one of its form whose weights have no values and take no memory."""
    fields = from_main(json.loads(model.config.to_json_string()) if is_main() else None)
    if is_main():
        return model
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(check_causal(fields, "process 0"), dtype=torch.float32)
    empty.to_empty(device="cpu")
    empty.tie_weights()
    return empty


def shard(model, device: torch.device) -> None:
    """Leave 1/N of every weight of a model on the CPU to each process, on its device; one process takes all.

    The weights are those of process 0. Tied weights need one group: each repeated layer is one, and all else.
    """
    if size() == 1:
        model.to(device)
        return
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()} if is_main() else {}
    mesh = init_device_mesh(device.type, (size(),))
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    # By default the root group stays whole after a forward pass, and its parameters are others than the optimizer's.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in groups(model):
        # The loss is weighted by its share of the step's blocks, so gradients are summed; gloo's mean is a sum.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    for name, parameter in model.named_parameters():
        tensor = whole.pop(name) if is_main() else torch.empty(parameter.shape, dtype=parameter.dtype)
        scatter(tensor, parameter)
    for buffer in model.to(device).buffers():
        dist.broadcast(buffer, 0)


def groups(model) -> list[FSDPModule]:
    """Return the modules whose weights are gathered together, the whole model first; none for one process."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def scatter(tensor: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a whole tensor of process 0 into a target that is sharded or not; of the others' tensor the shape counts."""
    tensor = tensor.to(target.device)
    if isinstance(target, DTensor):
        tensor = distribute_tensor(tensor, target.device_mesh, target.placements).to_local()
        target = target.to_local()
    elif size() > 1:
        dist.broadcast(tensor, 0)
    target.detach().copy_(tensor)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor of which this process holds a part."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def gather_weights(model, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """Return whole weights by name, on the CPU; with several processes none outside process 0."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_only:
            whole = gather(parameter)
            if is_main():
                tensors[name] = whole.cpu()
    return tensors


def gather_model(model):
    """Return the model with whole weights and merged adapter; None outside process 0.

    One process without an adapter gets the model itself, else it is a copy on the CPU.
    """
    if size() == 1 and not has_adapter(model):
        return model
    tensors = gather_weights(model)
    if not is_main():
        return None
    if has_adapter(model):
        tensors = merge_adapter(model, tensors)
    tensors |= {name: buffer.cpu() for name, buffer in model.named_buffers()}
    with torch.device("meta"):
        written = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    written.load_state_dict(tensors, strict=False, assign=True)
    written.tie_weights()
    written.generation_config = model.generation_config
    return written


@contextmanager
def unsharded(model) -> Iterator[None]:
    """Hold the whole weights in every process, so that it may compute without the others: for short texts."""
    for group in groups(model):
        group.unshard()
        group.set_reshard_after_forward(False, recurse=False)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    yield
    torch.set_autocast_cache_enabled(cached)
    for group in groups(model):
        group.set_reshard_after_forward(True, recurse=False)
        group.reshard()
