"""Every elementwise operation, combination and reduction of the table, as a function of tensors of any value."""

import keras
from keras import ops
from keras.src.activations import activations
from keras.src.ops import core, nn
from keras.src.ops import math as maths
from keras.src.ops import numpy as numeric


def positive(x):
    return 0.5 + ops.square(x)


ELEMENTWISE = [
    (nn.Relu, ops.relu),
    (nn.Relu6, ops.relu6),
    (nn.Sigmoid, ops.sigmoid),
    (nn.SparseSigmoid, ops.sparse_sigmoid),
    (nn.Softplus, ops.softplus),
    (nn.Softsign, ops.softsign),
    (nn.SoftShrink, ops.soft_shrink),
    (nn.SparsePlus, ops.sparse_plus),
    (nn.Silu, ops.silu),
    (nn.Squareplus, ops.squareplus),
    (nn.LogSigmoid, ops.log_sigmoid),
    (nn.LeakyRelu, ops.leaky_relu),
    (nn.HardSigmoid, ops.hard_sigmoid),
    (nn.HardSilu, ops.hard_silu),
    (nn.Elu, ops.elu),
    (nn.Selu, ops.selu),
    (nn.Gelu, ops.gelu),
    (nn.Celu, ops.celu),
    (nn.TanhShrink, ops.tanh_shrink),
    (nn.HardTanh, ops.hard_tanh),
    (nn.HardShrink, ops.hard_shrink),
    (nn.Threshold, lambda x: ops.threshold(x, 0.1, 0.3)),
    (numeric.Absolute, abs),
    (numeric.Arctan, ops.arctan),
    (numeric.Ceil, ops.ceil),
    (numeric.Clip, lambda x: ops.clip(x, -0.3, 0.4)),
    (numeric.Cos, ops.cos),
    (numeric.Exp, ops.exp),
    (numeric.Expm1, ops.expm1),
    (numeric.Floor, ops.floor),
    (numeric.Log, lambda x: ops.log(positive(x))),
    (numeric.Log1p, lambda x: ops.log1p(positive(x))),
    (numeric.Negative, lambda x: -x),
    (numeric.Reciprocal, lambda x: ops.reciprocal(positive(x))),
    (numeric.Round, ops.round),
    (numeric.Sign, ops.sign),
    (numeric.Sin, ops.sin),
    (numeric.Sinh, ops.sinh),
    (numeric.Sqrt, lambda x: ops.sqrt(positive(x))),
    (numeric.Square, ops.square),
    (numeric.Tan, lambda x: ops.tan(ops.tanh(x))),
    (numeric.Tanh, ops.tanh),
    (numeric.Copy, ops.copy),
    (numeric.NanToNum, ops.nan_to_num),
    (numeric.OnesLike, lambda x: x * 0.5 + ops.ones_like(x)),
    (numeric.ZerosLike, lambda x: x * 0.5 + ops.zeros_like(x)),
    (maths.Rsqrt, lambda x: ops.rsqrt(positive(x))),
    (maths.Erf, ops.erf),
    (core.Cast, lambda x: ops.cast(ops.cast(9 * x, "int32"), "float32")),
    (core.SaturateCast, lambda x: ops.cast(ops.saturate_cast(9 * x, "int8"), "float32")),
    (core.StopGradient, ops.stop_gradient),
    (activations.ReLU, lambda x: keras.activations.relu(x, negative_slope=0.1)),
    (numeric.Abs, lambda x: numeric.Abs()(x)),
    (numeric.Fabs, ops.fabs),
    (numeric.Arcsin, lambda x: ops.arcsin(ops.tanh(x) * 0.9)),
    (numeric.Arcsinh, ops.arcsinh),
    (numeric.Arccos, lambda x: ops.arccos(ops.tanh(x) * 0.9)),
    (numeric.Arccosh, lambda x: ops.arccosh(1 + positive(x))),
    (numeric.Arctanh, lambda x: ops.arctanh(ops.tanh(x) * 0.9)),
    (numeric.Cbrt, lambda x: ops.cbrt(positive(x))),
    (numeric.Cosh, ops.cosh),
    (numeric.Exp2, ops.exp2),
    (numeric.Log10, lambda x: ops.log10(positive(x))),
    (numeric.Log2, lambda x: ops.log2(positive(x))),
    (numeric.Trunc, ops.trunc),
    (numeric.Sinc, ops.sinc),
    (numeric.Deg2rad, lambda x: ops.deg2rad(90 * x)),
    (numeric.Rad2deg, ops.rad2deg),
    (numeric.Isnan, lambda x: x + ops.cast(ops.isnan(x), "float32")),
    (numeric.Isinf, lambda x: x + ops.cast(ops.isinf(x), "float32")),
    (numeric.Isfinite, lambda x: x + ops.cast(ops.isfinite(x), "float32")),
    (numeric.LogicalNot, lambda x: x + ops.cast(ops.logical_not(x > 0), "float32")),
    (maths.Erfc, lambda x: ops.erfc(x)),
]
COMBINATIONS = [
    (numeric.Add, ops.add),
    (numeric.Subtract, ops.subtract),
    (numeric.Multiply, ops.multiply),
    (numeric.Divide, lambda x, y: ops.divide(x, positive(y))),
    (numeric.TrueDivide, lambda x, y: ops.true_divide(x, positive(y))),
    (numeric.DivideNoNan, lambda x, y: ops.divide_no_nan(x, positive(y))),
    (numeric.Maximum, ops.maximum),
    (numeric.Minimum, ops.minimum),
    (numeric.Power, lambda x, y: ops.power(positive(x), y)),
    (numeric.FloorDivide, lambda x, y: ops.floor_divide(x, positive(y))),
    (numeric.Mod, lambda x, y: ops.mod(x, positive(y))),
    (numeric.Arctan2, ops.arctan2),
    (numeric.Logaddexp, ops.logaddexp),
    (numeric.Logaddexp2, ops.logaddexp2),
    (numeric.Fmax, ops.fmax),
    (numeric.Fmin, ops.fmin),
    (numeric.Fmod, lambda x, y: ops.fmod(x, positive(y))),
    (numeric.Where, lambda x, y: ops.where(ops.add(x, y) > 0, x, y)),
    *[
        (kind, lambda x, y, combine=combine: ops.cast(combine(ops.greater(x, 0), ops.greater(y, 0)), "float32"))
        for kind, combine in (
            (numeric.LogicalAnd, ops.logical_and),
            (numeric.LogicalOr, ops.logical_or),
            (numeric.LogicalXor, ops.logical_xor),
        )
    ],
    *[
        (kind, lambda x, y, compare=compare: ops.cast(compare(x, y), "float32"))
        for kind, compare in (
            (numeric.Greater, ops.greater),
            (numeric.GreaterEqual, ops.greater_equal),
            (numeric.Less, ops.less),
            (numeric.LessEqual, ops.less_equal),
        )
    ],
    *[
        (kind, lambda x, y, compare=compare: ops.cast(compare(ops.round(x), ops.round(y)), "float32"))
        for kind, compare in ((numeric.Equal, ops.equal), (numeric.NotEqual, ops.not_equal))
    ],
]
REDUCING = [
    (numeric.Mean, ops.mean),
    (numeric.Max, ops.max),
    (numeric.Min, ops.min),
    (numeric.Amax, ops.amax),
    (numeric.Amin, ops.amin),
    (numeric.Sum, ops.sum),
    (numeric.Prod, ops.prod),
    (numeric.Var, ops.var),
    (numeric.Std, ops.std),
    (numeric.Any, lambda x, **axes: ops.cast(ops.any(x > 0.3, **axes), "float32")),
    (numeric.All, lambda x, **axes: ops.cast(ops.all(x < 0.3, **axes), "float32")),
    (maths.Logsumexp, ops.logsumexp),
]
# Where the smallest difference may turn into a large one.
JUMPING = {
    *(
        nn.Threshold,
        nn.HardShrink,
        numeric.Ceil,
        numeric.Floor,
        numeric.Round,
        numeric.Sign,
        core.Cast,
        core.SaturateCast,
        numeric.Trunc,
    ),
    *(numeric.Fmod, numeric.Where, numeric.LogicalAnd, numeric.LogicalOr, numeric.LogicalXor),
    *(numeric.FloorDivide, numeric.Mod, numeric.Arctan2, numeric.Greater, numeric.GreaterEqual, numeric.Less),
    *(numeric.LessEqual, numeric.Equal, numeric.NotEqual),
}
