"""Lets the package index's torchvision import beside a CPU build of torch.

For the test environment only. The index serves torchvision built against CUDA: its operator library cannot load
beside CPU torch, and the import then fails on "operator torchvision::nms does not exist". vLLM and transformers
need only torchvision's pure-Python transforms, so it is enough to declare the operators' schemas before
`torchvision._meta_registrations` looks them up. Where torchvision's own library loads, nothing happens here.

A `.pth` file in site-packages imports this module in every interpreter of the environment, so that vLLM's and
Ray's child processes have it too; the import costs nothing until torchvision is asked for.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TARGET = "torchvision._meta_registrations"

_ROI = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_ROI_BACKWARD = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_DEFORM = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
    "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, "
    "bool use_mask"
)
_BINS = "Tensor grad, Tensor rois, {extra}float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"qroi_align({_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward({_BINS.format(extra='')}, {_ROI_BACKWARD}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({_ROI}) -> (Tensor, Tensor)",
    f"_roi_pool_backward({_BINS.format(extra='Tensor argmax, ')}, {_ROI_BACKWARD}) -> Tensor",
    f"ps_roi_align({_ROI}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward({_BINS.format(extra='Tensor channel_mapping, ')}, int sampling_ratio, "
    f"{_ROI_BACKWARD}) -> Tensor",
    f"ps_roi_pool({_ROI}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward({_BINS.format(extra='Tensor channel_mapping, ')}, {_ROI_BACKWARD}) -> Tensor",
    f"deform_conv2d({_DEFORM}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {_DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

_libraries: list[object] = []  # a torch Library's definitions live as long as the object


def _declare_operators() -> None:
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)


class _DeclareFirst(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == _TARGET:
            sys.meta_path.remove(self)
            _declare_operators()
        return None  # the ordinary finders do the import


sys.meta_path.insert(0, _DeclareFirst())
