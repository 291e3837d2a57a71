"""What the criterion may cost: waits for the device, and memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from structures import DetectorOutputs, map_tensors
from tests.losses.criterion_cases import make_outputs
from tests.losses.criterion_configs import every_config


class HostCopies(TorchDispatchMode):
    """Counts operators that make the host wait for a device, as they show on a CPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "is_nonzero"}
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in waits or masked or (name == "repeat_interleave" and "output_size" not in (kwargs or {})):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@every_config
def test_nothing_waits_for_the_device_but_the_one_copy_of_the_cost(config):
    outputs, targets = make_outputs(16, (3, 0, 4))
    with HostCopies() as copies:
        config(outputs, targets, torch.tensor(7.0)).total.backward()
    assert copies.seen == []


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns, and of what it is made of."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@every_config
@pytest.mark.parametrize("counts", [(60, 1, 0, 2, 1, 3, 1, 2), (12,) * 8, (300,)], ids=str)
def test_memory_is_bounded_by_the_cost_of_padded_targets(config, counts):
    """No tensor grows with images × queries × all targets, or with pairs squared: [L, B, Q, max G] is the largest."""
    outputs, targets = make_outputs(16, counts, num_classes=3, denoising=False)
    with LargestTensor() as largest:
        config(outputs, targets).total.backward()
    _, num_images, num_queries, num_classes = outputs.groups["decoder"].prediction.logits.shape
    num_layers = sum(len(group.prediction.logits) for group in outputs.groups.values())
    assert largest.elements <= num_layers * num_images * num_queries * max(*counts, num_classes, 14)


@pytest.mark.gpu
@every_config
def test_synchronisations_on_a_gpu(config, monkeypatch):
    """At most two in matching and criterion together; and the same losses as on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    outputs, targets = make_outputs(17, (3, 0, 4))
    groups = outputs.groups.items()
    on_gpu = DetectorOutputs({name: map_tensors(group, lambda part: part.detach().cuda()) for name, group in groups})
    gpu_targets = targets.to("cuda")
    expected = config(outputs, targets)
    assert config(on_gpu, gpu_targets).total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    num_boxes = torch.tensor(7.0, device="cuda")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as caught:
            config(on_gpu, gpu_targets, num_boxes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) <= 2
