"""Wrong arguments of the depthwise operators: a ValueError or TypeError that names the argument, what was given and
what is allowed; and of the operators underneath: an error, never a crash."""

from __future__ import annotations

import textwrap

import pytest
import torch
from _processes import run_python

from deeplab_kernels.ops import atrous_depthwise_bn_act, atrous_depthwise_conv2d

X = torch.zeros(2, 3, 9, 9)
W = torch.zeros(6, 1, 3, 3)
V = torch.ones(6)
META = torch.zeros(6, 1, 3, 3, device="meta")

# Arguments that replace good ones, the exception, and what its message must say.
CONV = {
    "x is a list": ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor, got list"),
    "x is an array": ({"x": X.numpy()}, TypeError, "x must be a torch.Tensor, got ndarray"),
    "x is None": ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
    "weight is None": ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    "x without batch": ({"x": X[0]}, ValueError, r"x must have shape \(N, C, H, W\), got \(3, 9, 9\)"),
    "x with 5 dimensions": ({"x": X[None]}, ValueError, r"x must have shape \(N, C.*, got \(1, 2, 3, 9, 9\)"),
    "x is a scalar": ({"x": X.sum()}, ValueError, r"x must have shape \(N, C, H, W\), got \(\)"),
    "weight with 3 dimensions": ({"weight": W[:, 0]}, ValueError, r"weight must have shape .*, got \(6, 3, 3\)"),
    "weight of a dense convolution": ({"weight": W.view(2, 3, 3, 3)}, ValueError, r"weight must have shape \(C \* m"),
    "channels do not divide": ({"weight": W[:4]}, ValueError, "weight must have a multiple of x's 3 channels .* got 4"),
    "fewer channels than x": ({"weight": W[:1]}, ValueError, "weight must have a multiple of x's 3 channels .* got 1"),
    "no output channels": ({"weight": W[:0]}, ValueError, "weight must have a multiple of x's 3 channels .* got 0"),
    "weight for no channels": ({"x": X[:, :0]}, ValueError, "weight must have a multiple of x's 0 channels .* got 6"),
    "empty kernel": ({"weight": W[:, :, :0]}, ValueError, "weight must have a kernel of at least 1 x 1, got 0 x 3"),
    "x of height 0": ({"x": X[:, :, :0], "padding": 4}, ValueError, "x must have a height of at least 1, got"),
    "x of width 0": ({"x": X[:, :, :, :0], "padding": 4}, ValueError, "x must have a width of at least 1, got"),
    "x is int64": ({"x": X.long()}, TypeError, "x must be float32, .* got torch.int64"),
    "x is uint8": ({"x": X.byte()}, TypeError, "x must be float32, .* got torch.uint8"),
    "x is bool": ({"x": X.bool()}, TypeError, "x must be float32, .* got torch.bool"),
    "x is complex": ({"x": X.cfloat()}, TypeError, "x must be float32, .* got torch.complex64"),
    "x is float8": ({"x": X.to(torch.float8_e4m3fn)}, TypeError, "x must be float32, .* got torch.float8_e4m3fn"),
    "weight is int32": ({"weight": W.int()}, TypeError, "weight must be float32, .* got torch.int32"),
    "dtypes differ": ({"x": X.double()}, TypeError, "weight must have x's dtype torch.float64, got torch.float32"),
    "bfloat16 weight": ({"weight": W.bfloat16()}, TypeError, "weight must have x's dtype torch.float32, got "),
    "devices differ": ({"weight": META}, ValueError, "weight must be on x's device cpu, got meta"),
    "x is sparse": ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor, got layout torch.sparse_coo"),
    "weight is sparse": ({"weight": W.to_sparse()}, TypeError, "weight must be a dense tensor, got layout torch.s"),
    "x is in mkldnn's layout": ({"x": X.to_mkldnn()}, TypeError, "x must be a dense tensor, got layout torch._m"),
    "x is nested": ({"x": torch.nested.nested_tensor([X[0]])}, TypeError, "x must be a dense tensor, got a nested"),
    "stride 0": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride negative": ({"stride": (1, -2)}, ValueError, r"stride must be at least 1, got \(1, -2\)"),
    "stride float": ({"stride": 2.0}, TypeError, "stride must be an int or a pair of ints, got 2.0"),
    "stride bool": ({"stride": True}, TypeError, "stride must be an int or a pair of ints, got True"),
    "stride None": ({"stride": None}, TypeError, "stride must be an int or a pair of ints, got None"),
    "stride string": ({"stride": "11"}, TypeError, "stride must be an int or a pair of ints, got '11'"),
    "stride tensor": ({"stride": torch.tensor([1, 1])}, TypeError, "stride must be an int or a pair of ints"),
    "stride of floats": ({"stride": (1, 1.5)}, TypeError, r"stride must be an int or a pair of ints, got \(1, 1.5\)"),
    "three strides": ({"stride": (1, 1, 1)}, ValueError, r"stride must be an int or \(vert.*, got \(1, 1, 1\)"),
    "one stride in a list": ({"stride": [1]}, ValueError, r"stride must be an int or \(vertical.*, got \[1\]"),
    "huge stride": ({"stride": 2**31}, ValueError, "stride must be at most 2147483647, got 2147483648"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    "dilation negative": ({"dilation": -1}, ValueError, "dilation must be at least 1, got -1"),
    "dilation float": ({"dilation": 1.0}, TypeError, "dilation must be an int or a pair of ints, got 1.0"),
    "huge dilation": ({"dilation": 2**63}, ValueError, "dilation must be at most 2147483647, got 9223372036854775808"),
    "padding negative": ({"padding": -1}, ValueError, "padding must be at least 0, got"),
    "one side negative": ({"padding": (1, 1, 0, -1)}, ValueError, r"padding must be at least 0, got \(1, 1, 0, -1\)"),
    "padding of 3": ({"padding": (1, 1, 1)}, ValueError, r"padding must be an int, .* got \(1, 1, 1\)"),
    "no padding": ({"padding": ()}, ValueError, r"padding must be an int, .* got \(\)"),
    "padding float": ({"padding": 1.5}, TypeError, "padding must be an int, .* got 1.5"),
    "padding of floats": ({"padding": (1, 0.5)}, TypeError, r"padding must be an int, .* got \(1, 0.5\)"),
    "padding bool": ({"padding": True}, TypeError, "padding must be an int, .* got True"),
    "padding None": ({"padding": None}, TypeError, "padding must be an int, .* got None"),
    "unknown padding": ({"padding": "SAME"}, ValueError, "padding must be ints, \"same\" or \"valid\", got 'SAME'"),
    "huge padding": ({"padding": 2**40}, ValueError, "padding must be at most 2147483647, got"),
    "kernel too high": ({"x": X[:, :, :2]}, ValueError, r"the kernel is larger .*: height 2 \+ .* < 3"),
    "kernel too wide": ({"dilation": (1, 5)}, ValueError, r"width 9 .* < 11 \(kernel 3, dilation 5"),
    "kernel too large with padding": ({"dilation": 9, "padding": (5, 4, 9, 9)}, ValueError, r"9 \+ padding 5 \+ 4 < 1"),
}  # fmt: skip

BN_ACT = {
    "gamma of another size": ({"gamma": V[:3]}, ValueError, r"gamma must have shape \(6,\), got \(3,\)"),
    "gamma of another rank": ({"gamma": V.view(1, 6, 1, 1)}, ValueError, r"gamma must have shape \(6,\), got \(1, 6"),
    "gamma int": ({"gamma": V.int()}, TypeError, "gamma must be float32, .* got torch.int32"),
    "gamma complex": ({"gamma": V.cfloat()}, TypeError, "gamma must be float32, .* got torch.complex64"),
    "gamma a number": ({"gamma": 1.0}, TypeError, "gamma must be a torch.Tensor or None, got float"),
    "gamma sparse": ({"gamma": V.to_sparse()}, TypeError, "gamma must be a dense tensor, got layout torch.sparse_coo"),
    "beta on another device": ({"beta": V.to("meta")}, ValueError, "beta must be on x's device cpu, got meta"),
    "beta a scalar": ({"beta": V[0]}, ValueError, r"beta must have shape \(6,\), got \(\)"),
    "running_mean of another size": ({"running_mean": V[:5]}, ValueError, r"running_mean must have shape \(6,\), got"),
    "running_var a list": ({"running_var": [1.0] * 6}, TypeError, "running_var must be a torch.Tensor or None, got"),
    "running_var int": ({"running_var": V.long()}, TypeError, "running_var must be float32, .* got torch.int64"),
    "only running_mean": ({"running_var": None, "training": True}, ValueError, "both .* got running_var=None"),
    "only running_var": ({"running_mean": None, "training": True}, ValueError, "both .* got running_mean=None"),
    "no running_mean": ({"running_mean": None}, ValueError, "running_mean must be given when training=False, got None"),
    "no running_var": ({"running_var": None}, ValueError, "running_var must be given when training=False, got None"),
    "no statistics": ({"running_mean": None, "running_var": None}, ValueError, "running_mean must be given when tr"),
    "running_mean with gradient": (
        {"running_mean": V.clone().requires_grad_()}, ValueError, "running_mean must not require a gradient"),
    "running_var with gradient": (
        {"running_var": V.clone().requires_grad_(), "training": True}, ValueError, "running_var must not require a gr"),
    "eps 0 in training": ({"eps": 0.0, "training": True}, ValueError, "eps must be positive when training=True, got"),
    "eps negative": ({"eps": -1e-5}, ValueError, "eps must be positive or 0 when training=False, got -1e-05"),
    "eps NaN": ({"eps": float("nan")}, ValueError, "eps must be positive or 0 when training=False, got nan"),
    "eps None": ({"eps": None}, TypeError, "eps must be a float, got None"),
    "momentum None": ({"momentum": None}, TypeError, "momentum must be a float, got None"),
    "momentum string": ({"momentum": "0.1"}, TypeError, "momentum must be a float, got '0.1'"),
    "momentum above 1": ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
    "momentum negative": ({"momentum": -0.1}, ValueError, r"momentum must be in \[0, 1\], got -0.1"),
    "training a number": ({"training": 1}, TypeError, "training must be a bool, got 1"),
    "unknown activation": ({"activation": "gelu"}, ValueError, "activation must be \"relu\", .* got 'gelu'"),
    "activation in capitals": ({"activation": "ReLU"}, ValueError, "activation must be \"relu\", .* got 'ReLU'"),
    "activation a module": ({"activation": torch.nn.ReLU()}, TypeError, r"activation must be .* got ReLU\(\)"),
    "activation a code": ({"activation": 1}, TypeError, 'activation must be "relu", .* got 1'),
    "one value per channel": (
        {"x": X[:1, :, :3, :3], "training": True}, ValueError, r"more than 1 value per channel, got .*1, 3, 3, 3"),
}  # fmt: skip


def conv(**changes):
    return atrous_depthwise_conv2d(**{"x": X, "weight": W, **changes})


def bn_act(**changes):
    good = {"x": X, "weight": W, "gamma": V, "beta": V, "running_mean": V.clone(), "running_var": V.clone()}
    return atrous_depthwise_bn_act(**{**good, "training": False, **changes})


@pytest.mark.parametrize(("changes", "error", "message"), CONV.values(), ids=CONV.keys())
@pytest.mark.parametrize("function", [conv, bn_act])
def test_convolution_arguments(function, changes, error, message):
    with pytest.raises(error, match=message):
        function(**changes)


@pytest.mark.parametrize(("changes", "error", "message"), BN_ACT.values(), ids=BN_ACT.keys())
def test_normalisation_arguments(changes, error, message):
    before = {
        name: v.clone() for name, v in changes.items() if isinstance(v, torch.Tensor) and v.layout == torch.strided
    }
    with pytest.raises(error, match=message):
        bn_act(**changes)
    for name, v in before.items():
        if v.device.type == "cpu":
            assert torch.equal(changes[name], v), f"{name} was changed by a call that failed"


def test_failed_call_does_not_touch_running_statistics():
    mean, var = V.clone(), V.clone()
    with pytest.raises(ValueError, match="momentum"):
        bn_act(running_mean=mean, running_var=var, training=True, momentum=2.0)
    assert torch.equal(mean, V)
    assert torch.equal(var, V)


def test_good_arguments_pass():
    """What the tables above change starts from calls that work."""
    assert conv().shape == (2, 6, 7, 7)
    assert bn_act(training=True, activation=None).shape == (2, 6, 7, 7)
    for padding in ("same", "valid", 0, [1, 1], (1, 2, 3, 4), torch.Size([1, 1])):
        assert conv(padding=padding).dim() == 4
    assert conv(padding=4, dilation=[4, 3], stride=[2, 1]).shape == (2, 6, 5, 11)


@pytest.mark.parametrize("kernel", [(2, 2), (4, 3), (1, 6)])
@pytest.mark.parametrize("dilation", [1, 3])
def test_same_padding_of_even_kernels_keeps_the_size(kernel, dilation):
    """As torch's: where the total is odd, the extra zero comes after."""
    x, weight = torch.randn(2, 3, 9, 7), torch.randn(3, 1, *kernel)
    y = atrous_depthwise_conv2d(x, weight, padding="same", dilation=dilation)
    expected = torch.nn.functional.conv2d(x, weight, padding="same", dilation=dilation, groups=3)
    torch.testing.assert_close(y, expected)


def test_empty_tensors_give_empty_results():
    for x, weight, shape in (
        (X[:0], W, (0, 6, 7, 7)),
        (X[:, :0], W[:0], (2, 0, 7, 7)),
        (X[:0, :0], W[:0], (0, 0, 7, 7)),
    ):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = atrous_depthwise_conv2d(*inputs)
        assert y.shape == shape
        y.sum().backward()
        v = V[: weight.shape[0]]
        out = atrous_depthwise_bn_act(*inputs, v, v, v.clone(), v.clone(), training=True)
        assert out.shape == shape
        out.sum().backward()
        for t in inputs:
            assert t.grad.shape == t.shape
            assert t.grad.count_nonzero() == 0


def test_mixed_dtypes_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x=X.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"weight must have x's dtype .*autocast leaves float64"):
            conv(x=X.double())


def test_errors_under_compile_keep_their_message():
    with pytest.raises(Exception, match="stride must be at least 1, got 0"):
        torch.compile(lambda x: atrous_depthwise_conv2d(x, W, stride=0), fullgraph=True, backend="eager")(X)


def test_inference_tensors_cannot_be_trained_on():
    with torch.inference_mode():
        x = X.clone()
    assert conv(x=x).shape == (2, 6, 7, 7)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        conv(x=x, weight=W.clone().requires_grad_())


# The operators underneath, called with nonsense. In a process of its own, so that a crash fails the test alone.

RAW = """
    import itertools, random, torch
    import deeplab_kernels.ops
    ops = torch.ops.deeplab_kernels
    f = lambda *size, **k: torch.zeros(size, **k)
    X, W, V = f(2, 3, 9, 9), f(6, 1, 3, 3), f(6)
    Y, E, D = f(2, 6, 7, 7), f(0), V.double()
    G = ((1, 1), (0, 0, 0, 0), (1, 1))
    conv, conv_backward = ops.atrous_depthwise_conv2d, ops.atrous_depthwise_conv2d_backward
    infer, train = ops.atrous_depthwise_bn_act_inference, ops.atrous_depthwise_bn_act_training
    backward = ops.atrous_depthwise_bn_act_backward
    conv(X, W, *G), conv_backward(Y, X, W, *G, True, True), infer(X, W, V, V, V, V, 1e-5, 1, *G)
    train(X, W, V, V, 1e-5, 1, *G, True), backward(Y, X, W, E, V, V, V, V, 1e-5, 1, True, *G, True, True)
    refused = 0

    def refuse(operator, *args):
        global refused
        try:
            operator(*args)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            refused += 1
        else:
            raise SystemExit(f"{operator} accepted {[getattr(a, 'shape', a) for a in args]}")

    big = 2**62
    geometries = [
        ((0, 1), G[1], G[2]), ((-1, 1), G[1], G[2]), (G[0], (-1, 0, 0, 0), G[2]), (G[0], G[1], (0, 1)),
        (G[0], G[1], (1, -1)), (G[0], G[1], (4, 5)), (G[0], G[1], (1, big)), (G[0], (big,) * 4, G[2]),
        (G[0], (2**63 - 1,) * 4, (2**63 - 1,) * 2), ((big, big), (big, big, 0, 0), G[2]), (G[0], (2**31,) * 4, G[2]),
        (G[0], (0, 0), G[2]), ((1,), (0, 0, 0, 0), ()), ((1, 1, 1), G[1], G[2]), (G[0], (2**31 - 1,) * 4, G[2]),
        ((2**64, 1), G[1], G[2]),
    ]
    tensors = [
        (X[0], W), (X, W[0]), (X.sum(), W), (X, W[:4]), (X, W[:0]), (X[:, :0], W), (X, W.view(2, 3, 3, 3)),
        (X.double(), W), (X.long(), W.long()), (X.cfloat(), W.cfloat()), (X.bool(), W.bool()), (X, W[:, :, :0]),
        (X[:, :, :0], W), (X[:, :, :2], W), (f(1, 1, 1, 1).expand(1, 3, big // 4, 1), W),
        (X, f(1, 1, 1, 1).expand(6, 1, 2**40, 2**18)),
        (X.to_sparse(), W), (None, W), ([1.0], W),
    ]
    for g in geometries:
        refuse(conv, X, W, *g)
        refuse(conv_backward, Y, X, W, *g, True, True)
        refuse(infer, X, W, V, V, V, V, 1e-5, 1, *g)
        refuse(train, X, W, V, V, 1e-5, 1, *g, True)
        refuse(backward, Y, X, W, E, V, V, V, V, 1e-5, 1, True, *g, True, True)
    for x, w in tensors:
        refuse(conv, x, w, *G)
        refuse(conv_backward, Y, x, w, *G, True, True)
        refuse(infer, x, w, V, V, V, V, 1e-5, 1, *G)
        refuse(train, x, w, V, V, 1e-5, 1, *G, True)
        refuse(backward, Y, x, w, E, V, V, V, V, 1e-5, 1, True, *G, True, True)
    for v in (V[:5], E, V.view(2, 3), f(12)[::2], f(1).expand(6), D, V.int(), V[0], f(7), 1.0):
        for i in range(4):
            vectors = [V] * 4
            vectors[i] = v
            refuse(infer, X, W, *vectors, 1e-5, 1, *G)
            refuse(backward, Y, X, W, E, *vectors, 1e-5, 1, True, *G, True, True)
            if i < 2:
                refuse(train, X, W, *vectors[:2], 1e-5, 1, *G, True)
    for grad in (X, Y[0], Y.double(), E, Y[:1], Y[..., :6], Y.long(), f(2, 6, 7, 8)):
        refuse(conv_backward, grad, X, W, *G, True, True)
        refuse(backward, grad, X, W, E, V, V, V, V, 1e-5, 1, True, *G, True, True)
        if grad is not E:
            refuse(backward, Y, X, W, grad, V, V, V, V, 1e-5, 1, True, *G, True, True)
    for code in (-1, 3, 2**40):
        refuse(infer, X, W, V, V, V, V, 1e-5, code, *G)
        refuse(train, X, W, V, V, 1e-5, code, *G, True)
        refuse(backward, Y, X, W, E, V, V, V, V, 1e-5, code, True, *G, True, True)

    # Other layouts and legal oddities must work.
    cl = dict(memory_format=torch.channels_last)
    conv_backward(Y.to(**cl), X, W.to(**cl), *G, True, True)
    backward(Y, X.to(**cl), W, Y, V, V, V, V, float("nan"), 1, True, *G, True, True)
    infer(X[:, :, ::2], W, None, None, V, V, -1.0, 0, *G)
    conv(X, W, (2**31 - 1,) * 2, (0, 9, 0, 0), G[2])
    conv(X[:, :, :1, :1], W, G[0], (2**20, 2**20, 2**20, 2**20), (2**20, 2**20))
    backward(Y[:0], X[:0], W, E, V, V, V, V, 1e-5, 1, True, *G, True, True)

    # Random mixtures: an error or a result of the right shape.
    rng = random.Random(0)
    sizes, numbers = (0, 1, 2, 3, 5, 9), (-3, 0, 1, 1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**62, -(2**63))
    done = 0
    for _ in range(1500):
        x = torch.randn([rng.choice(sizes) for _ in range(rng.choice((3, 4, 4, 4, 4, 4)))])
        w = torch.randn([rng.choice(sizes) for _ in range(4)])
        if rng.random() < 0.7 and x.dim() == 4:
            w = torch.randn(x.shape[1] * rng.randint(1, 2), 1, rng.randint(1, 3), rng.randint(1, 3))
        if rng.random() < 0.5 and x.dim() == 4:
            x = x.to(**cl)
        g = [tuple(rng.choice(numbers) if rng.random() < 0.15 else 1 for _ in range(n)) for n in (2, 4, 2)]
        if rng.random() < 0.9:  # keep legal outputs small
            g[1] = tuple(min(p, 9) for p in g[1])
        elif max(g[1]) >= 2**31 - 1:
            continue
        v = torch.ones(w.shape[0] if rng.random() < 0.9 else 2)
        try:
            y = conv(x, w, *g)
            grads = conv_backward(y, x, w, *g, True, True)
            out, kept, mean, var = train(x, w, v, None, 1e-5, 2, *g, rng.random() < 0.5)
            backward(out, x, w, kept, v, None, mean, var, 1e-5, 2, True, *g, True, True)
        except RuntimeError:
            continue
        assert y.shape == out.shape and grads[0].shape == x.shape and grads[1].shape == w.shape
        done += 1
    print(f"refused {refused}, computed {done}")
"""


def test_direct_calls_with_nonsense():
    refused, computed = (int(part.split()[-1]) for part in run_python(textwrap.dedent(RAW)).strip().split(", "))
    assert refused > 250
    assert computed > 300
