r"""Any PyTorch network as a graph of our operations, by `torch.export`.

The network is exported in float64 with a batch of any size, which records what it does to images operator by operator:
forward hooks, modules of any class, views, functions, parametrisations and normalisation in-line are all in it. What
cannot be recorded is refused by `torch.export` (Python conditions on values), what cannot be bounded by name (`aten`).

Trust, but verify: a graph is handed out only if it equals the network on random, constant and corner images, and on
images given, in batches of one, two and five, in float64; and if the network answers the same when asked again and
leaves its numbers alone. It is also run on an image by itself and followed (`taint`): it must not read the image's numbers,
and must do, operator for operator, what was exported.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import logging
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram, export

from grood_cert.errors import InputError, RunError, said
from grood_cert.interval import ROUNDING
from grood_cert.networks.architectures import Normalize
from grood_cert.networks.aten import ATEN, REASONS, VIEWS, Call, refusal
from grood_cert.networks.builder import Builder, Value
from grood_cert.networks.checks import check_eval
from grood_cert.networks.graph import AGREEMENT, Graph
from grood_cert.networks.taint import attributes, state, steps

_MOST_ON_A_GPU = 65535  # images that BatchNorm takes at once there
_DROWNED = 1e-3  # rounding on the way, as a share of the logits


def capture(network: nn.Module | ExportedProgram, shape: tuple[int, ...], images: Tensor | None = None) -> Graph:
    r"""Read a network into a graph.

    Args:
        network: f: (B, *shape) -> (B, K) in eval mode, normalisation included. A module is copied to float64; so are the
            numbers of an exported program.
        shape: Shape (C, H, W) of one image.
        images: Images to compare graph and network on, besides those made up, shape (N, *shape).

    Returns:
        A graph that equals the network to 1e-9 on all these images.

    Raises:
        InputError: If a module is in train mode (BatchNorm would use the batch, dropout would be active), Python
            conditions decide what is computed, the network changes its state or lets images influence each other, or
            it holds an operator that cannot be bounded; the message names it.
        RunError: If the graph does not reproduce the network.

    Example:
        >>> graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), (1, 2, 2))
        >>> [node.name for node in graph.nodes], graph.classes
        (['image', '0', '1', '2', '3'], 2)
    """
    reference: Callable[[Tensor], Tensor]
    if not isinstance(network, nn.Module | ExportedProgram):
        raise InputError(f"expected a torch.nn.Module or an exported program, got {type(network).__name__}")
    if isinstance(network, ExportedProgram):
        program = _Program.of(network, shape)
        reference = _function_of(network, program.batch)
    else:
        check_eval(network)
        reference = module = _prepared(network)
        exported = _export(module, shape)
        program = _Program.of(exported, shape)
    graph = program.graph(dict(program.state))
    if isinstance(network, nn.Module):
        _watch(module, exported, shape)
    _verify(graph, reference, shape, images)
    if isinstance(network, nn.Module):
        _verify_original(graph, network)
    return graph


_LIVE: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], dict[tuple[int, ...], _Program]]] = (
    weakref.WeakKeyDictionary()
)


def live_graph(network: nn.Module, shape: tuple[int, ...], buffers: Mapping[str, Tensor] | None = None) -> Graph:
    r"""The graph over the network's own parameters, as in eval mode whatever the mode, for use inside training.

    Gradients flow to the parameters. BatchNorm reads its running statistics, unless others are given, and dropout is the
    identity: the graph is that of the network that will be certified. The network is exported once, and again when its modules, their hooks or
    attributes are others; take the graph again after each step.

    Args:
        network: The network in training.
        shape: Shape (C, H, W) of one image.
        buffers: What to read in place of buffers of these names: the statistics of a batch in place of running ones.

    Returns:
        A graph that shares the parameters.
    """
    written, programs = _LIVE.get(network, ([], {}))
    if written != (now := _written(network)):
        programs = {}
        _LIVE[network] = now, programs
    if shape not in programs:
        programs[shape] = _Program.of(_export(_prepared(network), shape), shape)
    own = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    return programs[shape].graph({**programs[shape].state, **own, **(buffers or {})})


def _written(network: nn.Module) -> list[Any]:
    """How a network is written, but for its numbers."""
    return [
        (name, id(module), type(module), *module._forward_hooks, *module._forward_pre_hooks, attributes(module))
        for name, module in network.named_modules(remove_duplicate=False)
    ]


def _prepared(network: nn.Module) -> nn.Module:
    """A copy in eval mode and float64, with our `Normalize` for torchvision's, which cannot be exported."""
    try:
        holder = nn.Sequential(copy.deepcopy(network)).double().eval().requires_grad_(False)
    except Exception as error:
        reason = said(error)[:160]
        raise InputError(f"the network cannot be copied in float64 ({reason})") from error
    if set(map(id, holder.modules())) & set(map(id, network.modules())):
        raise InputError("the network cannot be copied: a module of it returns itself as its copy")
    theirs = _torchvision_normalize()
    for parent in list(holder.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in theirs and _is_plain(child):
                setattr(parent, name, _normalize(child))
    return holder[0]


def _torchvision_normalize() -> list[type[nn.Module]]:
    """Torchvision's normalisation, where torchvision was imported: no network holds one elsewhere, and its import is slow."""
    names = "torchvision.transforms", "torchvision.transforms.v2"
    return [sys.modules[name].Normalize for name in names if name in sys.modules]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module does what its class says, and leaves its images alone: no hooks, no forward of its own."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return not any(hooks) and "forward" not in vars(module) and not getattr(module, "inplace", False)


def _normalize(module: Any) -> Normalize:
    """Torchvision's normalisation with the numbers it has in float64."""
    found = Normalize(module.mean, module.std).double()
    for mine, theirs in ((found.mean, module.mean), (found.std, module.std)):
        mine.copy_(torch.as_tensor(theirs, dtype=torch.float64).reshape(-1, 1, 1))
    return found.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs and warns of, and with random numbers as they were: what matters comes as an exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _export(module: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    weight = next(module.parameters(), next(module.buffers(), torch.zeros(())))
    images = torch.full((3, *shape), 0.5, dtype=torch.float64, device=weight.device)
    try:
        with _quiet(), torch.no_grad():
            module(images)
    except Exception as error:
        reason = said(error)[:160]
        raise InputError(f"the network does not take images of shape {shape} in float64 ({reason})") from error
    most = None if weight.device.type == "cpu" else _MOST_ON_A_GPU
    shapes: Any = {0: Dim("batch", max=most)}
    first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    if first is not None and first.kind is inspect.Parameter.VAR_POSITIONAL:  # wrappers that pass all arguments on
        shapes = (shapes,)
    try:
        with _quiet(), torch.no_grad():
            return export(module, (images,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise InputError(f"the network cannot be captured: {_explained(error)}") from error


def _explained(error: Exception) -> str:
    text = str(error)
    kind = type(error).__name__
    if "data-dependent" in text or "DataDependent" in kind:
        return "Python conditions or numbers hang on values of the image; write it without them"
    if "arity mismatch" in text:
        return "what it holds changes from call to call"
    if "specialized" in text or "ConstraintViolation" in kind or "Constraints violated" in text:
        return "it works for some sizes of the batch alone; write it for any (with x.shape[0] for len(x))"
    return f"torch.export stopped: {' '.join(text.split())[:200]}"


def _function_of(program: ExportedProgram, batch: str) -> Callable[[Tensor], Tensor]:
    """What a program computes, for batches of any size; one that was exported for a single size is called with that."""
    module: nn.Module = program.module().double()
    if not batch.isdigit():
        return module
    size = int(batch)

    def function(images: Tensor) -> Tensor:
        filled = torch.cat([images, images[:1].expand(-len(images) % size, *images.shape[1:])])
        return torch.cat([module(part) for part in filled.split(size)])[: len(images)]

    return function


@dataclass(frozen=True)
class _Program:
    """An exported network without its numbers.

    Attributes:
        nodes: Its calls.
        names: For each placeholder the name of its tensor in the state; None for the images.
        state: Parameters, buffers and constants by name.
        floats: Names of the parameters and buffers in floating point.
        shape: Shape of one image.
        batch: What stands for the size of the batch in shapes.
        kind: Type of the images.
    """

    nodes: tuple[fx.Node, ...]
    names: Mapping[str, str | None]
    state: Mapping[str, Any]
    floats: tuple[str, ...]
    shape: tuple[int, ...]
    batch: str
    kind: torch.dtype

    @staticmethod
    def of(program: ExportedProgram, shape: tuple[int, ...]) -> _Program:
        names: dict[str, str | None] = {}
        for spec in program.graph_signature.input_specs:
            names[spec.arg.name] = None if spec.kind.name == "USER_INPUT" else spec.target
        images = [name for name, target in names.items() if target is None]
        if len(images) != 1:
            raise InputError(f"the network must take one argument, the images; it takes {len(images)}")
        answer = program.call_spec.out_spec
        if answer is not None and not answer.is_leaf():
            raise InputError(f"the network must return one tensor, its logits, not a {answer.type.__name__}")
        nodes = tuple(program.graph.nodes)
        image = next(node for node in nodes if node.name == images[0]).meta["val"]
        if tuple(image.shape[1:]) != shape:
            raise InputError(f"the program takes images of shape {tuple(image.shape[1:])}, not {shape}")
        numbers: dict[str, Any] = dict(program.state_dict)
        state = program.constants | {
            name: value.detach().double() if value.is_floating_point() else value for name, value in numbers.items()
        }
        unknown = [name for name, value in state.items() if isinstance(value, FakeTensor)]
        if unknown:
            raise InputError(
                f"the network cannot be captured: it changes its own state when it is called ({unknown[0]})"
            )
        floats = tuple(name for name, value in numbers.items() if value.is_floating_point())
        return _Program(nodes, names, state, floats, shape, str(image.shape[0]), image.dtype)

    def graph(self, state: Mapping[str, Any]) -> Graph:
        """The graph of the network with these numbers."""
        numbers = (value for name, value in state.items() if name in self.floats)
        builder = Builder(self.shape, next(numbers, torch.empty((), dtype=torch.float64)).detach())
        return _Translation(self, state, builder).graph()


class _Translation:
    """Call by call, from a program to a builder; what does not depend on the image is computed."""

    def __init__(self, program: _Program, state: Mapping[str, Any], builder: Builder) -> None:
        self._program = program
        self._state = state
        self._build = builder
        self._found: dict[fx.Node, Any] = {}
        self._memory: dict[fx.Node, fx.Node] = {}  # what a node shares its memory with
        self._made: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._kept = _memories(list(state.values()))  # memory of the network's state
        self._read: set[int] = set()  # memory of constants that nodes read
        self._place = {node: i for i, node in enumerate(program.nodes)}

    def graph(self) -> Graph:
        for node in self._program.nodes:
            if node.op == "placeholder":
                name = self._program.names[node.name]
                self._found[node] = self._build.image if name is None else self._state[name]
            elif node.op == "call_function":
                self._found[node] = self._called(node)
            elif node.op == "output":
                results = self._resolved(node.args[0])
                if len(results) != 1 or not isinstance(results[0], Value):
                    raise InputError("the network must return one tensor, its logits")
                return self._build.graph(results[0])
            else:
                raise refusal(node.name, f"{node.op} {node.target}")
        raise InputError("the network returns nothing")

    def _called(self, node: fx.Node) -> Any:
        self._build.name = _layer(node)
        positional, named = self._resolved(node.args), self._resolved(node.kwargs)
        if any(_holds(value, _Unknown) for value in (*positional, *named.values())):
            raise refusal(self._build.name, "a second result", "only the first one of a layer can be used")
        if node.target is operator.getitem:
            self._share(node)
            return self._item(positional)
        if not isinstance(node.target, torch._ops.OpOverload):
            if any(isinstance(value, _Size) for value in (*positional, *named.values())):
                return _Size()  # arithmetic on the size of the batch
            raise refusal(self._build.name, str(getattr(node.target, "__name__", node.target)))
        name = node.target._schema.name.split("::")[-1]
        if name in ("sym_size", "_assert_tensor_metadata"):
            return _Size()
        arguments = _bound(node.target, positional, named)
        written = [
            argument.name
            for argument in node.target._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write and name != "detach_"
        ]
        if any(argument in node.kwargs for argument in written):
            raise refusal(self._build.name, name, "it writes to out=")
        changes: list[Any] = [
            origin for origin, argument in zip(node.args, arguments, strict=False) if argument in written
        ]
        if not any(_holds(value, Value) for value in arguments.values()):
            if any(_holds(value, _Size) for value in arguments.values()):
                raise refusal(self._build.name, name, "it reads the size of the batch")
            memories = _memories([arguments[argument] for argument in written])
            if memories & self._kept:
                raise refusal(self._build.name, name, "the network changes its own state from call to call")
            if memories & self._read:
                raise refusal(self._build.name, name, "it changes a constant that has been used")
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                raise refusal(self._build.name, name, "it is random")
            if name in VIEWS:
                self._share(node)
            return node.target(*positional, **named)
        if name not in VIEWS and any(_holds(value, _Size) for value in arguments.values()):
            raise refusal(self._build.name, name, "it reads the size of the batch")
        plain = name.removesuffix("_") if changes else name
        if plain not in ATEN or node.target.namespace != "aten":
            raise refusal(self._build.name, plain)
        self._read |= _memories(list(arguments.values()))
        key = plain, *(_identity(value) for value in arguments.values())
        try:
            if key not in self._made:  # a module that is called twice on the same value computes it once
                self._made[key] = (
                    ATEN[plain](Call(plain, arguments, self._shape(node.meta.get("val")), self._build)),
                    arguments,
                )
            found = self._made[key][0]
        except (InputError, KeyError, TypeError, ValueError, IndexError, RuntimeError, ArithmeticError) as error:
            if isinstance(error, InputError) and str(error).startswith("layer "):
                raise
            raise refusal(self._build.name, plain, said(error)[:160]) from error
        value = node.meta.get("val")
        pairs: Any = [(found, value)] if isinstance(found, Value) else zip(found, value or (), strict=False)
        for result, expected in pairs:
            if result.shape != self._shape(expected):
                raise refusal(self._build.name, plain, "its result does not keep the images of a batch apart")
            if expected.dtype != self._program.kind:
                raise refusal(self._build.name, plain, REASONS["to"])
        if plain in VIEWS:
            self._share(node)
        for origin in changes:
            self._overwrite(origin, node, found, plain)
        return found

    def _resolved(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, lambda origin: self._found[origin])

    def _item(self, positional: tuple[Any, ...]) -> Any:
        sequence, index = positional
        if isinstance(sequence, _Size):
            return sequence
        try:
            return sequence[index]
        except (IndexError, TypeError):
            return _Unknown()

    def _shape(self, value: Any) -> tuple[int, ...] | None:
        """Shape of a result without the batch; None where that does not lead, or it is no tensor."""
        if not isinstance(value, Tensor) or not value.dim() or str(value.shape[0]) != self._program.batch:
            return None
        return tuple(value.shape[1:]) if all(isinstance(size, int) for size in value.shape[1:]) else None

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self._memory:
            node = self._memory[node]
        return node

    def _share(self, node: fx.Node) -> None:
        origins = node.all_input_nodes
        if origins:
            self._memory[node] = origins[0]

    def _overwrite(self, origin: Any, node: fx.Node, found: Any, name: str) -> None:
        """A change in place: who reads the origin later reads the new value; nobody may look at it another way."""
        root, now = self._root(origin), self._place[node]
        for other in self._found:
            if other is not origin and self._root(other) is root:
                later = any(self._place[user] > now for user in other.users)
                if later or other.op == "placeholder":
                    raise refusal(
                        self._build.name,
                        f"{name} in place",
                        "another view of the same value is read later; write it out of place",
                    )
        if origin.op == "placeholder":
            raise refusal(self._build.name, f"{name} in place", "it changes the images it was given")
        self._found[origin] = found
        self._memory[node] = origin


class _Size:
    """A number that hangs on the size of the batch."""


class _Unknown:
    """A further result of an operator, such as the places of maxima; nobody may read it."""


def _identity(value: Any) -> Any:
    """What makes an argument the same as another one; tensors are held by `_made`, so their ids stay theirs."""
    if isinstance(value, list | tuple):
        return tuple(_identity(part) for part in value)
    return ("tensor", id(value)) if isinstance(value, Tensor) else (type(value).__name__, str(value))


def _memories(value: Any) -> set[int]:
    """Where tensors keep their numbers."""
    if isinstance(value, list | tuple):
        return set().union(*map(_memories, value))
    return {value.untyped_storage().data_ptr()} - {0} if isinstance(value, Tensor) else set()


def _holds(value: Any, kind: type) -> bool:
    """Whether an argument is of a kind, or a list with one of it."""
    return any(_holds(part, kind) for part in value) if isinstance(value, list | tuple) else isinstance(value, kind)


def _bound(target: torch._ops.OpOverload, positional: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    arguments: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(positional):
            arguments[argument.name] = positional[i]
        elif argument.name in named:
            arguments[argument.name] = named[argument.name]
        elif argument.has_default_value():
            arguments[argument.name] = argument.default_value
    return arguments


def _layer(node: fx.Node) -> str:
    """The module that a call comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(list(stack.values())) if entry[0]), "")
    return path or node.name


def _verify(graph: Graph, network: Callable[[Tensor], Tensor], shape: tuple[int, ...], images: Tensor | None) -> None:
    """Compare graph and network; both on batches of several sizes, and the network with itself."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(3, *shape, dtype=torch.float64, generator=generator)
    corner = (torch.rand(2, *shape, generator=generator) < 0.5).double()
    constant = torch.stack([torch.full(shape, level, dtype=torch.float64) for level in (0.0, 0.5, 1.0)])
    made = torch.cat([random, corner, constant]).to(graph.device)
    batches = list(made.split([1, 2, 5]))
    if images is not None:
        batches += list(images.detach().to(made).split(64))
    before, answers = _state(network), []
    with torch.no_grad():
        for batch in batches:
            expected = network(batch)
            if expected.shape != (len(batch), graph.classes):
                raise RunError(f"the network gives logits of shape {tuple(expected.shape)} for {len(batch)} images")
            if not bool(torch.isfinite(expected).all(1).any()):
                raise RunError("the network gives logits that are not finite; nothing about it is proved")
            finite = torch.isfinite(expected).all(1)
            size, largest = float(expected[finite].abs().max()), graph.largest(batch[finite])
            if not ROUNDING * largest <= _DROWNED * max(size, 1.0):
                raise RunError(f"values up to {largest:.1e} on the way leave nothing of the logits; nothing is proved")
            if not bool(graph.agrees(batch, expected).all()):
                raise RunError(
                    f"the captured graph does not reproduce the network on a batch of {len(batch)}: what it computes hangs "
                    "on something other than each image alone; nothing about it is proved"
                )
            answers.append(expected)
        again = network(batches[0])
    if not torch.allclose(answers[0], again, rtol=AGREEMENT, atol=0.0, equal_nan=True) or before != _state(network):
        raise InputError(
            "the network changes from call to call (state, or randomness in eval mode); it cannot be captured"
        )
    if not bool(graph.agrees(batches[0], _with_gradients(network, batches[0])).all()):
        raise InputError("the network computes something else where gradients are taken; it cannot be captured")


def _with_gradients(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    try:
        with torch.enable_grad():
            return network(images.clone().requires_grad_()).detach()
    except Exception as error:
        reason = said(error)[:160]
        raise InputError(f"the network cannot be computed where gradients are taken ({reason})") from error


def _watch(module: nn.Module, program: ExportedProgram, shape: tuple[int, ...]) -> None:
    """Refuse a network that does something else with an image than what was exported of it."""
    weight = next(module.parameters(), next(module.buffers(), torch.zeros(())))
    image = torch.rand(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(weight.device)
    with _quiet():
        done, exported = steps(module, image), steps(program.module(), image)
    for i, (step, other) in enumerate(itertools.zip_longest(done, exported)):
        if step is None or other is None or not step.equals(other):
            raise InputError(
                f"the network does something else with one image than what was exported of it (operator {i + 1}, "
                f"{(step or other).name}): it asks for the size of the batch, or whether it is being exported or compiled; "
                "it cannot be captured"
            )


def _verify_original(graph: Graph, network: nn.Module) -> None:
    """Compare with the network as it was given, in its own type: copying it and making it float64 may change it."""
    kinds = [tensor.dtype for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
    kind = next((weight.dtype for weight in network.parameters()), torch.float64)
    rounding = max((torch.finfo(found).eps for found in kinds), default=0.0) ** 0.5
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(3, *graph.shape, dtype=torch.float64, generator=generator).to(graph.device).to(kind)
    try:
        with _quiet(), torch.no_grad():
            logits = network(images.clone()).double()
    except Exception as error:
        reason = said(error)[:160]
        raise InputError(f"the network cannot be computed in its own type, {kind} ({reason})") from error
    exact = graph(images.double())
    if not bool(((logits - exact).abs() <= rounding * max(1.0, graph.largest(images.double()))).all()):
        raise InputError(
            f"a copy of the network in float64 computes something else than the network in its own type, {kind}; it "
            "cannot be captured"
        )


def _state(network: Any) -> list[Any]:
    return state(network) if isinstance(network, nn.Module) else []
