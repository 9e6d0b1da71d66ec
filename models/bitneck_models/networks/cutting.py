"""Any network as a chain of stages: cut after named modules, with a proof that ONE tensor crosses each cut.

    net --torch.export--> graph of functional operations, each with the modules that it was called from
    cut after module M    operations up to the last one of M | the rest

A tensor crosses a cut if it is made before the cut, or is the input, and is used after it. So a skip connection around
M crosses too, and the error names it. The graph has functions in place of in-place operations, so nothing can cross
unseen. Both sides compute what depends on weights alone, and read the batch's size off the tensor that crosses.
"""

import itertools
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bitneck.errors import InvalidConfig

__all__ = ["cut_network"]

_TOLERANCE = 1e-5
_SHOWN = 12


@torch.no_grad()
def cut_network(
    net: nn.Module, input_shape: Sequence[int], cuts: Mapping[str, str], output: str | None = None
) -> dict[str, nn.Module]:
    """Cut a network into stages; the last one is named ``output``.

    Args:
        net: the network; it takes one tensor and is put into evaluation mode.
        input_shape: shape of the tensor, without the batch axis. The stages take no other size.
        cuts: for each stage, the module that it ends with, as `named_modules` names it; in any order.
        output: key of the network's output, if it gives several.

    Returns:
        Stages by name, in order. Their composition is the network; this is checked on random inputs.

    Raises:
        InvalidConfig: the network cannot be traced, a module or the output does not exist, more than one tensor crosses
            a cut, or nothing is before or after a cut.
    """
    net.eval()
    graph = _Graph(net, input_shape, output)
    positions = {name: graph.position(module) for name, module in cuts.items()}
    order = sorted(positions, key=lambda name: positions[name])
    for first, second in itertools.pairwise(order):
        if positions[first] == positions[second]:
            raise InvalidConfig(
                f"{first!r} and {second!r} are the same cut, after {cuts[first]!r} and {cuts[second]!r}"
            )
    crossing = [graph.input, *(graph.crossing(positions[name], cuts[name]) for name in order), graph.output]
    bounds = [0, *(positions[name] + 1 for name in order), len(graph.operations)]
    stages: dict[str, nn.Module] = {
        name: graph.stage(crossing[k], crossing[k + 1], bounds[k], bounds[k + 1])
        for k, name in enumerate([*order, "output"])
    }
    _prove(net, input_shape, output, stages)
    return stages


def _prove(net: nn.Module, shape: Sequence[int], output: str | None, stages: Mapping[str, nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        x = torch.randn(count, *shape, generator=generator)
        whole = net(x)
        whole = whole[output] if output is not None else whole
        for stage in stages.values():
            x = stage(x)
        if x.shape != whole.shape or not (x - whole).abs().max() <= _TOLERANCE * whole.abs().max():
            raise InvalidConfig(
                f"the stages of {type(net).__name__} do not give the network's output: it cannot be cut"
            )


class _Graph:
    """The operations of a network that its output depends on, in order."""

    def __init__(self, net: nn.Module, input_shape: Sequence[int], output: str | None) -> None:
        example = torch.zeros(2, *input_shape)
        batch = torch.export.Dim("n", min=1, max=4096)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own deprecations
                program = torch.export.export(net, (example,), dynamic_shapes=({0: batch},), strict=False)
                program = program.run_decompositions({})
        except Exception as exc:  # the exporter raises many kinds
            reason = next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
            raise InvalidConfig(
                f"torch.export cannot trace {type(net).__name__} with an input of {tuple(input_shape)} and any number "
                f"of pictures: {reason.strip()}"
            ) from exc
        self.modules = dict(net.named_modules())
        self.input: fx.Node
        self.weights: dict[fx.Node, tuple[str, Tensor]] = {}
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        kinds = torch.export.graph_signature.InputKind
        for spec in program.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind == kinds.USER_INPUT:
                self.input = node
            else:
                name = str(spec.target)
                self.weights[node] = name, program.state_dict.get(name, program.constants.get(name))
        self.output = _chosen(program, output)
        self.operations = self._needed(program.graph)
        self.index = {node: k for k, node in enumerate(self.operations)}
        self.from_input = self._from_input()

    def _needed(self, graph: fx.Graph) -> list[fx.Node]:
        needed, waiting = set(), [self.output]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        return [node for node in graph.nodes if node in needed and node.op != "placeholder"]

    def _from_input(self) -> set[fx.Node]:
        """Nodes whose values depend on the pictures, not only on their number."""
        found = {self.input}
        for node in self.operations:
            if node.target != torch.ops.aten.sym_size.int and found.intersection(node.all_input_nodes):
                found.add(node)
        return found

    def position(self, module: str) -> int:
        """Index of the last operation of a module."""
        if module not in self.modules or not module:
            near = [name for name in self.modules if name.startswith(module.split(".")[0] + ".")] or list(self.modules)
            shown = ", ".join(name for name in near[:_SHOWN] if name)
            raise InvalidConfig(f"the network has no module {module!r}; it has: {shown}, ...")
        inside = [k for k, node in enumerate(self.operations) if _inside(node, module)]
        if not inside:
            raise InvalidConfig(f"module {module!r} takes no part in the network's output")
        stacks = [node.meta.get("nn_module_stack", {}) for node in self.operations]
        calls = {key for stack in stacks for key, (path, _) in stack.items() if path == module}
        if len(calls) > 1:
            raise InvalidConfig(f"module {module!r} is called {len(calls)} times; cut after one that is called once")
        last = inside[-1]
        while last + 1 < len(self.operations) and self.operations[last + 1].target is operator.getitem:
            last += 1  # takes one of the operation's results, so it belongs to the operation
        return last

    def crossing(self, position: int, module: str) -> fx.Node:
        """The one tensor that crosses a cut."""
        after = self.operations[position + 1 :]
        if not after:
            raise InvalidConfig(f"nothing comes after module {module!r}, so there is nothing to cut")
        used = {node for later in after for node in later.all_input_nodes}
        made = [self.input, *self.operations[: position + 1]]
        crossing = [node for node in made if node in used and node in self.from_input]
        if len(crossing) != 1:
            names = ", ".join(self._told(node) for node in crossing)
            raise InvalidConfig(
                f"{len(crossing)} tensors cross a cut after module {module!r}: {names}; a split point needs one"
            )
        if crossing[0] is self.input:
            raise InvalidConfig(f"nothing of module {module!r} is used after it, only the network's input")
        (only,) = crossing
        return only

    def _told(self, node: fx.Node) -> str:
        if node is self.input:
            return "the network's input"
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
        shape = "x".join(str(n) for n in _shape(node)[1:])
        return f"{stack[-1] if stack else node.name} ({shape})"

    def stage(self, given: fx.Node, wanted: fx.Node, start: int, stop: int) -> fx.GraphModule:
        """Operations ``start .. stop-1`` as a module from one tensor to one tensor."""
        graph = fx.Graph()
        attributes: dict[str, Tensor] = {}
        copies: dict[fx.Node, fx.Node] = {given: graph.placeholder("x")}

        def copy(node: fx.Node) -> fx.Node:
            if node in copies:
                return copies[node]
            if node in self.weights:
                name, value = self.weights[node]
                attributes[name] = value
                copies[node] = graph.get_attr(name)
            elif node.target == torch.ops.aten.sym_size.int and not start <= self.index[node] < stop:
                copies[node] = graph.call_function(
                    torch.ops.aten.sym_size.int, (copies[given], self._axis(given, node.meta["val"]))
                )
            else:
                for needed in node.all_input_nodes:
                    copy(needed)
                copies[node] = graph.node_copy(node, lambda n: copies[n])
                copies[node].meta = {}
            return copies[node]

        for node in self.operations[start:stop]:
            copy(node)
        graph.output(copy(wanted))
        graph.eliminate_dead_code()
        root = nn.Module()
        for name, value in attributes.items():
            _place(root, name, value)
        return fx.GraphModule(root, graph).eval()

    def _axis(self, node: fx.Node, size: Any) -> int:
        """The axis of a tensor with a given size, which is a symbol."""
        for axis, n in enumerate(_shape(node)):
            if str(n) == str(size):
                return axis
        raise InvalidConfig(
            f"the shape of {self._told(node)} does not show the number of pictures, so it is no split point"
        )


def _place(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a weight at the place that its dotted name gives."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    else:
        root.register_buffer(leaf, value)


def _chosen(program: torch.export.ExportedProgram, output: str | None) -> fx.Node:
    """The node of the network's output, or of the output that a key names."""
    (results,) = next(node for node in program.graph.nodes if node.op == "output").args
    assert program.call_spec.out_spec is not None
    found = pytree.tree_unflatten(list(results), program.call_spec.out_spec)
    if output is not None:
        if not isinstance(found, Mapping) or output not in found:
            names = ", ".join(map(str, found)) if isinstance(found, Mapping) else "one tensor without a name"
            raise InvalidConfig(f"the network has no output {output!r}; it has: {names}")
        found = found[output]
    if not isinstance(found, fx.Node):
        names = ", ".join(map(str, found)) if isinstance(found, Mapping) else f"{len(results)} tensors"
        raise InvalidConfig(f"the network gives more than one tensor; name one of its outputs with `output`: {names}")
    return found


def _inside(node: fx.Node, module: str) -> bool:
    """Whether an operation was called from a module."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return any(path == module or path.startswith(module + ".") for path in paths)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
