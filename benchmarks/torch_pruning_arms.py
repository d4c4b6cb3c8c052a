"""Torch-Pruning on the same network: a Keras model as a torch.nn.Module with its weights, pruned there, and carried back.

A twin has PyTorch's own modules, which Torch-Pruning can follow. The pruned one is carried back into a Keras model of the
same widths, so that FLOPs, fine-tuning and accuracy are those of all other arms. Both directions are checked: outputs of
random images must agree. Settings are those of Torch-Pruning's own scripts for CIFAR: scores are ranked over all layers, in
400 small steps until the budget is met. Needs `pip install 'keras-morph[peers]'`, and PyTorch as Keras's backend.
"""

import keras
import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

import keras_morph as km
from keras_morph.graph.structure import graph_and_structure

FLOPS = km.FLOPs()
STEPS = 400  # of pruning, at most
TOLERANCE = 1e-4  # of outputs, as a share of the largest
TAYLOR_BATCHES = 8


class Twin(nn.Module):
    """The layers of a functional Keras model as PyTorch's own; gives logits. Its images have their channels last, as Keras's."""

    def __init__(self, model):
        super().__init__()
        graph = km.trace(model)
        self.modules_by_name = nn.ModuleDict()
        self.plan = []
        for call in graph.calls:
            operation = graph.layers[call.layer].operation
            kind = type(operation).__name__
            if kind == "InputLayer":
                continue
            if kind not in BUILD and kind not in ("Add", "GlobalAveragePooling2D", "Dropout"):
                raise NotImplementedError(f"{operation.name}: a twin of {kind} is not written")
            if kind in BUILD:
                self.modules_by_name[operation.name] = BUILD[kind](operation)
            self.plan.append((kind, operation.name, call.operands, call.outputs[0]))
        self.first, self.last = graph.inputs[0], graph.outputs[0]

    def forward(self, images):
        tensors = {self.first: images.permute(0, 3, 1, 2)}
        for kind, name, operands, output in self.plan:
            x = tensors[operands[0]]
            if kind == "Add":
                tensors[output] = x + tensors[operands[1]]
            elif kind == "GlobalAveragePooling2D":
                tensors[output] = x.mean((2, 3))
            elif kind == "Dropout":
                tensors[output] = x
            else:
                tensors[output] = self.modules_by_name[name](x)
        return tensors[self.last]


class Same(nn.Module):
    """A convolution with Keras's padding, which has more on the far side where strides leave an odd rest."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        kernel, stride = self.convolution.kernel_size, self.convolution.stride
        wanted = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(x.shape[2:], stride, kernel, strict=True)]
        rows, columns = ((total // 2, total - total // 2) for total in wanted)
        return self.convolution(functional.pad(x, (*columns, *rows)) if any(wanted) else x)


def _convolution(layer):
    """Keras's kernel is (rows, columns, in, out), of a depthwise layer (rows, columns, in, 1)."""
    kernel = np.asarray(keras.ops.convert_to_numpy(layer.kernel))
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    groups = kernel.shape[2] if depthwise else layer.groups
    weight = torch.tensor(np.transpose(kernel, (2, 3, 0, 1) if depthwise else (3, 2, 0, 1)))
    made = nn.Conv2d(
        groups if depthwise else weight.shape[1] * groups,
        weight.shape[0],
        kernel.shape[:2],
        stride=layer.strides,
        groups=groups,
        bias=layer.use_bias,
    )
    _fill(made, weight=weight, **({"bias": layer.bias} if layer.use_bias else {}))
    return Same(made) if layer.padding == "same" else made


def _norm(layer):
    made = nn.BatchNorm2d(layer.moving_mean.shape[0], eps=layer.epsilon, momentum=1 - layer.momentum)
    _fill(
        made,
        weight=layer.gamma,
        bias=layer.beta,
        running_mean=layer.moving_mean,
        running_var=layer.moving_variance,
    )
    return made


def _dense(layer):
    made = nn.Linear(*layer.kernel.shape)
    _fill(made, weight=keras.ops.transpose(layer.kernel), bias=layer.bias)
    return made


def _fill(module, **values):
    for name, value in values.items():
        array = np.array(keras.ops.convert_to_numpy(value))
        getattr(module, name).data.copy_(torch.tensor(array))


def _relu(layer):
    return nn.ReLU6() if layer.max_value == 6 else nn.ReLU()


BUILD = {
    "Conv2D": _convolution,
    "DepthwiseConv2D": _convolution,
    "BatchNormalization": _norm,
    "Dense": _dense,
    "ReLU": _relu,
}


def twin_of(model):
    """A twin, whose outputs agree with the model's."""
    twin = Twin(model).eval()
    _check(model, twin)
    return twin


def keras_model(twin, seed):
    """A Keras model of a twin's widths and weights."""
    counts = _counts(twin, km.trace(seed))
    small = km.rebuild(seed, graph_and_structure(seed, counts)[1], weights=False)
    for name, module in twin.modules_by_name.items():
        layer, module = small.get_layer(name), getattr(module, "convolution", module)
        if isinstance(module, nn.Conv2d):
            axes = (2, 3, 0, 1) if isinstance(layer, keras.layers.DepthwiseConv2D) else (2, 3, 1, 0)
            values = [module.weight.permute(axes), module.bias]
        elif isinstance(module, nn.BatchNorm2d):
            values = [module.weight, module.bias, module.running_mean, module.running_var]
        elif isinstance(module, nn.Linear):
            values = [module.weight.T, module.bias]
        else:
            continue
        layer.set_weights([value.detach().numpy() for value in values if value is not None])
    _check(small, twin.eval())
    return small


def _check(model, twin):
    images = np.random.default_rng(0).random((8, *model.input_shape[1:]), np.float32)
    with torch.no_grad():
        theirs = functional.softmax(twin(torch.tensor(images)), -1).numpy()
    difference = np.abs(theirs - model.predict(images, verbose=0)).max() / theirs.max()
    if not difference <= TOLERANCE:
        raise AssertionError(f"{model.name}: the twin's outputs differ by {difference:.1e} of the largest")


def _counts(twin, graph):
    modules = {name: getattr(module, "convolution", module) for name, module in twin.modules_by_name.items()}
    widths = {name: getattr(m, "out_channels", getattr(m, "out_features", None)) for name, m in modules.items()}
    return {name: widths[name] for name in graph.widths if widths.get(name)}


IMPORTANCES = {
    "group sparsity": lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
    "BN scale": tp.importance.BNScaleImportance,
    "Taylor": tp.importance.GroupTaylorImportance,
    "L1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
}
PRUNERS = {"group sparsity": tp.pruner.GroupNormPruner, "BN scale": tp.pruner.BNScalePruner}


def pruner_of(twin, image_shape, kind, strength=None):
    return PRUNERS.get(kind, tp.pruner.BasePruner)(
        twin,
        torch.zeros((1, *image_shape)),
        importance=IMPORTANCES[kind](),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[module for module in twin.modules() if isinstance(module, nn.Linear)],
        **({} if strength is None else {"reg": strength}),
    )


def learn_sparsity(twin, pruner, batches, epochs, rate):
    """Train under Torch-Pruning's regularizer, by Adam as Keras has it, over the epochs from 0 on."""
    optimizer = torch.optim.Adam(twin.parameters(), lr=rate, eps=1e-7)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        twin.train()
        for index in range(len(batches)):
            x, y = batches[index]
            optimizer.zero_grad()
            functional.cross_entropy(twin(torch.tensor(x)), torch.tensor(y, dtype=torch.int64)).backward()
            pruner.regularize(twin)
            optimizer.step()


def save(twin, path):
    torch.save(twin.state_dict(), path)


def load(twin, path):
    twin.load_state_dict(torch.load(path, weights_only=True))


def gradients(twin, batches):
    """Gradients of the loss over some batches, for Taylor's scores."""
    twin.eval()
    twin.zero_grad()
    for index in range(min(TAYLOR_BATCHES, len(batches))):
        x, y = batches[index]
        functional.cross_entropy(twin(torch.tensor(x)), torch.tensor(y, dtype=torch.int64)).backward()


def cut(twin, pruner, seed, budget):
    """Prune step by step until the budget of FLOPs is met, as our own counter has it; gives a Keras model."""
    graph = km.trace(seed)
    limit = float(budget.rstrip("%")) / 100 * FLOPS(graph)
    twin.eval()
    for _ in range(STEPS - 1):
        pruner.step()
        if FLOPS(graph, graph_and_structure(graph, _counts(twin, graph))[1]) <= limit:
            return keras_model(twin, seed)
    raise RuntimeError(f"Torch-Pruning did not come below {budget} in {STEPS} steps")
