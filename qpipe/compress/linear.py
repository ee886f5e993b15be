"""The compressed linear layer: one module for every composition.

The master weight stays in the dtype the layer is made with (float32 in training); each forward pass compresses it
afresh, in float32 whatever the autocast dtype, and multiplies in the autocast dtype. Evaluation uses the same path, so
a validation loss is the compressed model's loss.

With a rotation H both operands are rotated when activations are compressed, x H and W H, and need no inverse. When
only the weights are compressed the inverse is folded into them, W' = q(W H) H: the same product, without touching the
larger activation tensor.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from qpipe.compress.dense import DenseLinear, product_dtype, product_with
from qpipe.compress.gradients import power, power_inverse
from qpipe.compress.masks import sparsity_at
from qpipe.compress.packing import pack, unpack
from qpipe.compress.prepare import Prepared, prepare
from qpipe.compress.quantize import Represented, compress, represent
from qpipe.compress.rotation import hadamard, rotate
from qpipe.compress.scales import grouped
from qpipe.compress.trained import starting_scale
from qpipe.errors import QpipeError
from qpipe.formats import Representation, TensorFormat, check_shape
from qpipe.formats.spec import TRAINED_SCALES

if torch.cuda.is_available():
    from qpipe.compress import triton_rounding


_RUN = 128
"""Numbers that are compiled as a row where rows do not matter, so that one compiled function serves all widths."""

_COMPILED_FORMATS = 64
"""Times that a function is compiled anew in a process, for another format, before it is left as it is."""


class CompressedLinear(nn.Module):
    """`y = x W^T + b` with weights and activations in a `Representation`.

    Parameters
    ----------
    in_features, out_features : widths
    representation : what to do; for `dense` use `make_linear`
    bias : add a 16-bit bias
    device, dtype : of the master weight

    Attributes
    ----------
    weight : master weight, shape (out_features, in_features); the only parameter that weight decay may act on
    weight_scale, activation_scale : trained scales, present only where the representation trains them. They carry
        `is_scale = True`; give them no weight decay.
    reads_mean_square : whether a kernel rounds the inputs, on GPUs and in 16 bits
    has_weight_kernel : whether a kernel rotates and rounds the weight, on GPUs and for products in 16 bits
    rounded : the weight as products read it, while all weights are represented together

    Raises
    ------
    QpipeError
        When a group, vector or n:m block does not tile the input width.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        representation: Representation,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_shape(representation, in_features)
        self.in_features, self.out_features, self.representation = in_features, out_features, representation
        self.block = representation.hadamard_block(in_features)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.weight_scale = _scale_parameter(self._weight_scale_shape(), device)
        self.activation_scale = _scale_parameter((1, 1) if _trains(representation.activations) else None, device)
        self._weights = prepare(representation.weights) if representation.weights else None
        self._activations = prepare(representation.activations) if representation.activations else None
        self.reads_mean_square = _has_kernel(representation.activations, self.block)
        self.has_weight_kernel = _has_kernel(representation.weights, self.block)
        self.rounded: Tensor | None = None
        self._compiler: Callable[..., Any] | None = None
        mask = self._weights.mask if self._weights else None
        self.kept_share: Tensor | None
        self.register_buffer("kept_share", None)
        if mask is not None and mask.schedule != "constant":
            self.register_buffer("kept_share", torch.empty((), device=device), persistent=False)
        self.scales_ready = self.weight_scale is None and self.activation_scale is None
        self.register_load_state_dict_post_hook(_mark_scales_ready)
        self.reset_parameters()

    def _weight_scale_shape(self) -> tuple[int, ...] | None:
        part = self.representation.weights
        if not _trains(part):
            return None
        assert part is not None
        shapes: dict[str | int, tuple[int, ...]] = {"tensor": (1, 1), "row": (self.out_features, 1)}
        if part.group in shapes:
            return shapes[part.group]
        return (self.out_features, self.in_features // int(part.group), 1)

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does; trained scales are found from data at the next forward pass."""
        if self.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self.scales_ready = self.weight_scale is None and self.activation_scale is None
        self.set_progress(0.0)

    def set_progress(self, fraction: float) -> None:
        """Tell the mask schedule which share of training is done (0 to 1); constant masks ignore it."""
        if self.kept_share is not None and self._weights is not None and self._weights.mask is not None:
            self.kept_share.fill_(1 - sparsity_at(self._weights.mask, fraction))

    @torch.no_grad()
    def load_dense_weight(self, weight: Tensor) -> None:
        """Take over a dense weight, shape (out, in), inverting the layer's reparameterisation."""
        part = self.representation.weights
        self.weight.copy_(weight if part is None else power_inverse(weight, part.power))
        self.scales_ready = self.weight_scale is None and self.activation_scale is None

    def forward(self, x: Tensor, mean_square: Tensor | None = None) -> Tensor:
        """`x`, shape (..., in_features) -> (..., out_features).

        Who knows the mean square of every token, shape (...), can give it: a kernel then reads `x` once, not twice.
        """
        if not self.scales_ready:
            self._start_scales(x)
        x = self._represent_input(x, mean_square)
        if self.rounded is not None:
            return product_with(x, self.weight, self.rounded)
        return functional.linear(x, self._product_weight(x), self.bias)

    @property
    def needs_compiler(self) -> bool:
        """Whether `compile` has something to compile: no kernel of our own represents it, and it is not noise."""
        parts = (self._weights, self.has_weight_kernel), (self._activations, self.reads_mean_square)
        given = [part for part, has_kernel in parts if part is not None and not has_kernel]
        return any(part.mask is not None if part.grid is None else part.grid.family != "noise" for part in given)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what represents weights and inputs where no kernel of our own does; arguments of `torch.compile`.

        The rest is matrix products and gradients that are kept or dropped. What is compiled for weights, and for inputs
        where their rows do not matter, serves layers of all shapes: once per shape would take longer. In evaluation
        nothing is compiled: it would be compiled once more for it. The compiler takes seconds to import, so nothing
        happens before it is needed.
        """
        self._compiler = functools.cache(lambda function: _compiled(function, *args, dynamic=False, **kwargs))

    def _represent(
        self,
        x: Tensor,
        prepared: Prepared,
        scale: Tensor | None,
        kept_share: Tensor | None,
        per_token: bool,
        training: bool,
    ) -> Represented:
        """`qpipe.compress.quantize.represent` of weights or (`per_token`) inputs, compiled if it is to be."""
        if not training or self._compiler is None:
            return represent(x, prepared, scale, kept_share, per_token, training)
        numbers = x.detach()  # the compiler would take the shape of a parameter as fixed
        scale = None if scale is None else scale.detach()
        if x.shape[-1] % _RUN == 0 and prepared.part.is_local(_RUN, per_token=per_token):
            numbers = numbers.reshape(-1, _RUN)
            _allow_any(numbers, 0)
        elif not per_token:
            _allow_any(numbers, 0, 1)
            _allow_any(scale, 0, 1)
        found = self._compiler(represent)(numbers, prepared, scale, kept_share, per_token, training)
        value, gate, slope = (None if part is None else part.view(x.shape) for part in found)
        assert value is not None
        return Represented(value, gate, slope)

    def _product_weight(self, x: Tensor) -> Tensor:
        """The weight that multiplies the represented input `x`: in its dtype, and in its basis."""
        dtype = product_dtype(x) if x.is_cuda and self.has_weight_kernel else x.dtype
        if x.is_cuda and self.has_weight_kernel and dtype.itemsize == 2 and self.weight.dtype == torch.float32:
            matrix, (multiplier, top, back) = hadamard(self.block, x.device, torch.float32), self.rounding
            rounded: Tensor = triton_rounding.RotateAndRound.apply(
                self.weight, matrix, multiplier, top, None, dtype, back
            )
            return rounded
        return self._weight_in_dtype(dtype)

    @property
    def rounding(self) -> tuple[float, float, bool]:
        """What the kernel does to the weight: multiplier, top and whether it rotates back (`RotateAndRound`)."""
        assert self._weights is not None
        return self._weights.multiplier, self._weights.high + self._weights.radius, self._activations is None

    def _weight_in_dtype(self, dtype: torch.dtype) -> Tensor:
        with _full_precision(self.weight.device):
            weight = self._represent_weight()
            if self._activations is None:
                weight = rotate(weight, self.block)
            return weight.to(dtype)

    def compressed_weight(self) -> Tensor:
        """The dequantized weight as used, shape (out_features, in_features), in the unrotated input basis."""
        with torch.no_grad(), _full_precision(self.weight.device):
            return rotate(self._represent_weight(), self.block)

    def pack(self) -> dict[str, Tensor]:
        """The compressed weight as packed bits (see `qpipe.compress.packing`)."""
        if self._weights is None:
            raise QpipeError(
                f"representation '{self.representation.name}' keeps its weights in 16 bits: nothing to pack"
            )
        with torch.no_grad(), _full_precision(self.weight.device):
            return pack(self._rotated_weight(), self._weights, self.weight_scale)

    def unpack(self, packed: Mapping[str, Tensor]) -> Tensor:
        """What `compressed_weight` was when `packed` was made, shape (out_features, in_features), float32."""
        assert self._weights is not None
        return rotate(unpack(packed, self._weights, (self.out_features, self.in_features)), self.block)

    def _rotated_weight(self) -> Tensor:
        stored = self.weight if self._weights is None else power(self.weight, self._weights.part.power)
        return rotate(stored, self.block)

    def _represent_weight(self) -> Tensor:
        """Weight in the rotated basis."""
        if self._weights is None:
            return self._rotated_weight()
        return compress(
            self._rotated_weight(),
            self._weights,
            scale=self.weight_scale,
            scale_count=self.weight.numel(),
            kept_share=self.kept_share,
            training=self.training,
            by=self._represent,
        )

    def _represent_input(self, x: Tensor, mean_square: Tensor | None) -> Tensor:
        if self._activations is None:
            return x
        if x.is_cuda and self.reads_mean_square and (dtype := product_dtype(x)).itemsize == 2:
            matrix, top = hadamard(self.block, x.device, dtype), self._activations.high + self._activations.radius
            rounded: Tensor = triton_rounding.RotateAndRound.apply(
                x.to(dtype), matrix, self._activations.multiplier, top, mean_square, dtype
            )
            return rounded
        return compress(
            rotate(x, self.block),
            self._activations,
            scale=self.activation_scale,
            scale_count=self.in_features,
            per_token=True,
            training=self.training,
            by=self._represent,
        )

    @torch.no_grad()
    @torch.compiler.disable
    def _start_scales(self, x: Tensor) -> None:
        """Set trained scales from the weights and from the first batch."""
        with _full_precision(x.device):
            if self.weight_scale is not None and self._weights is not None:
                groups = grouped(self._rotated_weight(), self._weights.part.group)
                self.weight_scale.copy_(starting_scale(groups, self._weights))
            if self.activation_scale is not None and self._activations is not None:
                groups = grouped(rotate(x.float(), self.block), self._activations.part.group)
                self.activation_scale.copy_(starting_scale(groups, self._activations))
        self._agree_on_scales()
        self.scales_ready = True

    def _agree_on_scales(self) -> None:
        """Average the activation scale over processes, which have each seen another first batch."""
        if self.activation_scale is not None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.activation_scale.data)
            self.activation_scale.data /= dist.get_world_size()

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{self.in_features}, {self.out_features}, {self.representation.name}, bias={self.bias is not None}"


def _allow_any(tensor: Tensor | None, *dimensions: int) -> None:
    """Tell the compiler that other tensors in this place have other sizes in some dimensions."""
    for dimension in dimensions if tensor is not None else ():
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _compiled(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Callable[..., Tensor]:
    """`torch.compile` for a process that trains many runs, one after the other."""
    import torch._dynamo.config
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = _COMPILED_FORMATS
    # A pool of processes takes longer to start than few kernels take to compile.
    torch._inductor.config.compile_threads = 1
    compiled: Callable[..., Tensor] = torch.compile(function, *args, **kwargs)
    return compiled


def _has_kernel(part: TensorFormat | None, block: int) -> bool:
    """Whether a kernel of our own rotates and rounds numbers of this format."""
    return part is not None and part.rotates_and_rounds(block)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off; the meta device has no autocast to turn off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _trains(part: TensorFormat | None) -> bool:
    return part is not None and part.scale in TRAINED_SCALES


def _scale_parameter(shape: Sequence[int] | None, device: torch.device | str | None) -> nn.Parameter | None:
    if shape is None:
        return None
    parameter = nn.Parameter(torch.empty(*shape, device=device, dtype=torch.float32))
    parameter.is_scale = True  # type: ignore[attr-defined]
    return parameter


def _mark_scales_ready(module: nn.Module, incompatible: Any) -> None:
    """Scales that came with a checkpoint are not started again; a dense checkpoint has none."""
    if not any(key.endswith(("weight_scale", "activation_scale")) for key in incompatible.missing_keys):
        module.scales_ready = True  # type: ignore[assignment]


def make_linear(
    in_features: int,
    out_features: int,
    representation: Representation,
    *,
    bias: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear | CompressedLinear:
    """`DenseLinear` for dense, else `CompressedLinear`."""
    if representation.is_dense:
        return DenseLinear(in_features, out_features, bias=bias, device=device, dtype=dtype)
    return CompressedLinear(in_features, out_features, representation, bias=bias, device=device, dtype=dtype)


def set_progress(model: nn.Module, fraction: float) -> None:
    """Advance the mask schedules of every compressed layer of `model` to `fraction` of training."""
    if not 0 <= fraction <= 1:
        raise QpipeError(f"training progress {fraction}: give the share of training done, from 0 to 1")
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.set_progress(fraction)
