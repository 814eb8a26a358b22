"""Makes a trace that runs on any device and in any dtype of floats.

A trace keeps the device and the dtype that a model asked for on the way (`torch.arange(n, device=x.device)`,
`mask.to(x.dtype)`) as constants. Here they become questions to one of the module's parameters, so that the module
follows `to(device, dtype)`, in Python as in Rust.

Which constants those are shows in a trace in bfloat16, a dtype that models don't name by themselves: float32 and
float64 in it were asked for by name (a softmax in float32), and stay.
"""

import torch
from torch import nn

MARK = torch.bfloat16
# How TorchScript writes dtypes.
CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, MARK: 15}


@torch.jit.script
def lowest(dtype: int) -> float:
    """`torch.finfo(dtype).min`"""
    if dtype == 5:
        return -65504.0
    if dtype == 15:
        return -3.3895313892515355e38
    if dtype == 7:
        return -1.7976931348623157e308
    return -3.4028234663852886e38


@torch.jit.script
def highest(dtype: int) -> float:
    """`torch.finfo(dtype).max`"""
    return -lowest(dtype)


def portable(traced: torch.jit.ScriptModule, module: nn.Module) -> torch.jit.ScriptModule:
    """The trace of a copy of the module in `MARK`, with the module's own tensors and without fixed dtypes and devices."""
    graph = traced.graph
    torch._C._jit_pass_inline(graph)
    for function in (lowest, highest):
        torch._C._jit_pass_inline(function.graph)
    questions = Questions(traced, graph)
    for node in list(every_node(graph)):
        if node.schema() != "(no schema)":
            rewrite(node, questions)
        if node.kind() == "aten::Int" and (number := on_host(graph, node, next(node.inputs()))) is not None:
            node.output().replaceAllUsesWith(number)
    torch._C._jit_pass_dce(graph)
    graph.lint()
    with torch.no_grad():
        for listed in (nn.Module.named_parameters, nn.Module.named_buffers):
            own = dict(listed(module, remove_duplicate=False))
            for name, tensor in listed(traced, remove_duplicate=False):
                tensor.data = own[name].detach().clone()
    return traced


def every_node(block):
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from every_node(inner)


class Questions:
    """Values at the start of a graph that tell the module's device and dtype."""

    def __init__(self, module: torch.jit.ScriptModule, graph):
        self.graph, self.start = graph, next(graph.nodes())
        path = next(name for name, p in module.named_parameters() if p.is_floating_point()).split(".")
        value = next(graph.inputs())
        for name in path[:-1]:
            module = getattr(module, name)
            value = self.add("prim::GetAttr", [value], module._c._type(), name)
        weight = self.add("prim::GetAttr", [value], torch._C.TensorType.get(), path[-1])
        self.device = self.add("prim::device", [weight], torch._C.DeviceObjType.get())
        self.dtype = self.add("prim::dtype", [weight], torch._C.IntType.get())
        self.limits = {}

    def add(self, kind: str, inputs: list, kind_of_output, name: str | None = None):
        node = self.graph.create(kind, inputs)
        if name is not None:
            node.s_("name", name)
        node.insertBefore(self.start)
        node.output().setType(kind_of_output)
        return node.output()

    def limit(self, function):
        """The lowest or highest number of the dtype."""
        if function not in self.limits:
            self.graph.setInsertPoint(self.start)
            (self.limits[function],) = self.graph.insertGraph(function.graph, [self.dtype])
        return self.limits[function]


def constant(value):
    return value.toIValue() if value.node().kind() == "prim::Constant" else None


def rewrite(node, questions: Questions) -> None:
    """Has a node ask for what it takes as constants."""
    arguments = torch._C.parse_schema(node.schema()).arguments
    limits = {torch.finfo(MARK).min: lowest, torch.finfo(MARK).max: highest}
    for i, (argument, value) in enumerate(zip(arguments, node.inputs())):
        found = constant(value)
        if isinstance(found, torch.device):
            node.replaceInput(i, questions.device)
        elif argument.name == "dtype" and found == CODES[MARK]:
            node.replaceInput(i, questions.dtype)
        elif isinstance(found, float) and found in limits:
            node.replaceInput(i, questions.limit(limits[found]))
        elif isinstance(found, torch.Tensor) and (found.dtype == MARK or found.dim() > 0):
            node.replaceInput(i, moved(node, value, questions, found.dtype == MARK))


def on_host(graph, node, value):
    """The integer of a tensor that a trace makes of sizes (`x.shape[-1] // 2`), reckoned without tensors, or None.

    With a constant of the module's device in it, the host would wait for that device to be told.
    """
    inputs = list(value.node().inputs())
    if value.node().kind() == "prim::NumToTensor":
        return inputs[0] if inputs[0].type().kind() == "IntType" else None
    graph.setInsertPoint(node)
    found = constant(value)
    # That is what a tensor of one integer is told as.
    if type(found) is int:
        return graph.insertConstant(found)
    kinds = {"aten::floor_divide": "aten::floordiv", "aten::mul": "aten::mul"}
    if value.node().kind() not in kinds:
        return None
    numbers = [on_host(graph, node, one) for one in inputs]
    if None in numbers:
        return None
    result = graph.create(kinds[value.node().kind()], numbers)
    result.insertBefore(node)
    result.output().setType(torch._C.IntType.get())
    return result.output()


def moved(node, value, questions: Questions, cast: bool):
    """A constant tensor, brought to the device and, if it has the module's dtype, to that."""
    graph = questions.graph
    graph.setInsertPoint(node)
    no, none = graph.insertConstant(False), graph.insertConstant(None)
    to = graph.create("aten::to", [value, questions.device, questions.dtype if cast else none, no, no])
    to.insertBefore(node)
    to.output().setType(torch._C.TensorType.get())
    return to.output()
