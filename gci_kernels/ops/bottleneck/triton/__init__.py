"""The stages as Triton kernels, for GPU tensors in bfloat16, float16 and float32; and interpreted, on CPU tensors.

Same functions as aten.py, and `project_reduce`, which is two of them in one pass over y. The products also take `drop`,
a :class:`~gci_kernels.ops.bottleneck.philox.Dropout` or None, and apply its mask while they read (stages.py says
to what). Sums are kept in float32, and project and reduce return them unrounded. Any strides, any sizes up to 2^31:
masks pad inside the kernels. A sum that several programs share takes two stages, in a fixed order, so that the same
call gives the same bits. Blocks come from config.py.

Row offsets are int64, for tokens * stride passes 2^31. float32 products ask for input_precision="ieee": the default,
TF32, keeps 11 bits of each factor, a thousand times the error of the float32 that was asked for.
"""

from gci_kernels.ops.bottleneck.triton.dropout import dropout, dropout_, dropout_bits
from gci_kernels.ops.bottleneck.triton.expand import expand
from gci_kernels.ops.bottleneck.triton.project import project
from gci_kernels.ops.bottleneck.triton.project_reduce import one_reading, project_reduce
from gci_kernels.ops.bottleneck.triton.reduce import reduce

__all__ = ["dropout", "dropout_", "dropout_bits", "expand", "one_reading", "project", "project_reduce", "reduce"]
