"""One student and one teacher on many processes: PyTorch's FSDP2 shards them, a group a decoder layer.

Every process keeps its share of each tensor, gathers a layer when it is its turn, and gets its share of the sum of all
gradients. With one process there is nothing to shard, and nothing here changes anything.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ... import ranks


def shard_teacher(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Turn ``model`` (of any device) into this process's share on ``device``; all processes have the whole of the head,
    which they need when memory is fullest."""
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)
    head, mesh = model.get_output_embeddings().weight, _mesh(device)
    decoder = model.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    # The embedding and the last norm; not kept between two calls.
    fully_shard(decoder, mesh=mesh, ignored_params={head}, reshard_after_forward=True)
    head.data = head.data.to(device)
    return model


def shard_student(root: nn.Module, model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """Turn ``root``, which calls ``model``, into this process's share on ``device``; what is trained is made fp32 on
    the way, a layer at a time. ``bf16``: layers are gathered in bf16, and their gradients summed in fp32."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = _mesh(device)
    # The stream of hidden states stays what the embedding makes of it, as with one process.
    layers = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else None
    for layer in model.get_decoder().layers:
        widen(layer)
        fully_shard(layer, mesh=mesh, mp_policy=layers or MixedPrecisionPolicy())
    widen(root)
    fully_shard(root, mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # The loss is a sum over the tokens of all processes, so its gradients are added, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def widen(module: nn.Module) -> None:
    """What is trained is held in fp32."""
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, which may be a share. All processes ask together; gathered tensors come to the CPU in the
    first one, and are empty in the others."""
    if not isinstance(tensor, DTensor):
        return tensor
    found = tensor.detach().full_tensor()
    return found.cpu() if ranks.first() else found.new_empty(0)


def put(target: Tensor, value: Tensor | None) -> None:
    """Copy the first process's ``value``, which must be whole, into ``target``, which may be a share."""
    if not isinstance(target, DTensor):
        target.data.copy_(ranks.broadcast(value if ranks.world() == 1 or value is None else value.cpu()))
        return
    local = target.detach().to_local()
    full = value.to(local) if ranks.first() else local.new_empty(target.shape)
    local.copy_(distribute_tensor(full, target.device_mesh, target.placements).to_local())


def total(value: Tensor) -> Tensor:
    """The sum of all processes' ``value``."""
    if ranks.world() > 1:
        value = value.clone()
        with ranks.together():
            torch.distributed.all_reduce(value)
    return value


def _mesh(device: torch.device) -> torch.distributed.device_mesh.DeviceMesh:
    return torch.distributed.device_mesh.init_device_mesh(device.type, (ranks.world(),))
