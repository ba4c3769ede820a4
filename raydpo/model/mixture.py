"""The parts of a mixture of experts, found by structure: blocks, their experts and their routers.

A block is a module with several experts and a router that sends each token to a few of them. Its experts are a list of equal
modules, as in the code that many models bring along, or tensors with one slice an expert, as in transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

__all__ = ["Block", "expert_blocks", "shape_of"]


@dataclass(frozen=True)
class Block:
    """One mixture of experts.

    Attributes:
        name, module: the smallest module that holds experts and router.
        experts: names of the module or modules that hold the experts' weights.
        routers: names of the modules with the weight that scores the experts.
        listed: whether the experts are a list of modules.
    """

    name: str
    module: nn.Module
    experts: tuple[str, ...]
    routers: tuple[str, ...]
    listed: bool

    def part(self, module: str) -> str | None:
        """What the module of this name is: ``experts``, ``router``, ``shared experts`` (anything else in the block), or None
        if it is not in this block."""

        def inside(home: str) -> bool:
            return f"{module}.".startswith(f"{home}.")

        if any(inside(each) for each in self.experts):
            return "experts"
        if any(inside(each) for each in self.routers):
            return "router"
        return "shared experts" if inside(self.name) else None


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def expert_blocks(model: nn.Module) -> list[Block]:
    """All blocks of ``model``, from top to bottom. A block inside another one is not listed."""
    modules = dict(model.named_modules())
    blocks: dict[str, Block] = {}
    for name, module in modules.items():
        count, listed = _experts_of(module)
        if not count or any(f"{name}.".startswith(f"{each}.") for each in blocks):
            continue
        # The router is beside the experts, or beside a module that holds nothing but them.
        home = name.rpartition(".")[0]
        while home and not _rest_of(modules[home], home, name):
            home = home.rpartition(".")[0]
        if home and (routers := tuple(_routers_of(modules[home], home, name, count))):
            found = ((f"{home}.{short}", other) for short, other in modules[home].named_modules() if short)
            experts = tuple(each for each, other in found if _experts_of(other) == (count, listed))
            blocks[home] = Block(home, modules[home], experts, routers, listed)
    return list(blocks.values())


def _rest_of(home: nn.Module, name: str, experts: str) -> bool:
    """Whether ``home`` has weights outside its experts."""
    names = (each for each, _ in home.named_parameters(prefix=name) if not _of_adapter(each))
    return any(not each.startswith(f"{experts}.") for each in names)


def _experts_of(module: nn.Module) -> tuple[int, bool]:
    """How many experts a module holds, and whether they are a list; (0, False) if it holds none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        children = list(module.children())  # torch leaves out None, which stands for an expert of another machine
        kinds = {(type(child), tuple(shape_of(each) for each in child.parameters())) for child in children}
        return (len(module), True) if len(module) > 1 and len(kinds) == 1 else (0, False)
    own = [
        shape_of(parameter)
        for parameter in module.parameters(recurse=False)
        if len(shape_of(parameter)) == 3 and not isinstance(module, nn.modules.conv._ConvNd)
    ]
    return (own[0][0], False) if own and own[0][0] > 1 and len({shape[0] for shape in own}) == 1 else (0, False)


def _routers_of(home: nn.Module, name: str, experts: str, count: int) -> Iterator[str]:
    """Modules in ``home``, outside its experts, with a matrix that has one row or column an expert."""
    for short, module in home.named_modules(prefix=name):
        if f"{short}.".startswith(f"{experts}.") or _experts_of(module)[0] or _of_adapter(short):
            continue
        for parameter in module.parameters(recurse=False):
            # A quantized weight is packed into another shape.
            linear = isinstance(module, nn.Linear) and parameter is module.weight
            shape = (module.out_features, module.in_features) if linear else shape_of(parameter)
            if len(shape) == 2 and count in (shape if short == name else shape[:1]) and not isinstance(module, nn.Embedding):
                yield short
                break


def _of_adapter(name: str) -> bool:
    """Whether a name is that of PEFT's own weights."""
    return ".lora_" in name
