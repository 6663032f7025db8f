"""Keys and values of what many sessions begin with, kept by its tokens: a system prompt, or the turns before.

A tree over blocks of `UNIT` tokens, each a unit of the cache, of which the last of a prompt may have fewer. A session
that begins with blocks in the tree, or with a part of one, copies them into its own slots instead of running them, and
what it has run is copied into the tree. The blocks used least recently make room for others, and for sessions.
"""

import bisect
import dataclasses
import functools
from collections.abc import Hashable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int

from spa_jax.engine.extents import UNIT
from spa_jax.engine.group import Group
from spa_jax.engine.slots import Slots
from spa_jax.models.block import Cache

Block = tuple[int, ...]
"""`UNIT` token ids, or fewer."""


@dataclasses.dataclass(eq=False)
class Node:
    """A block behind those of its parents.

    Attributes:
        block: its tokens; of a root, none.
        slots: where it is.
        parent: None of a root.
        used: when it was last kept, on the tree's clock.
        children: the blocks that follow it, none of which begins another one, in the order of their tokens: those that
            are most alike are next to each other.
        name: of a root, whose prompts are behind it.
    """

    block: Block
    slots: range
    parent: "Node | None"
    used: int
    children: list["Node"] = dataclasses.field(default_factory=list)
    name: Hashable = None

    def add(self, block: Block, slots: range, used: int) -> "Node":
        """Adds a child."""
        child = Node(block, slots, self, used)
        self.children.insert(self._place(block), child)
        return child

    def remove(self, child: "Node") -> None:
        """Takes a child away."""
        del self.children[self._place(child.block)]

    def most_alike(self, block: Block) -> tuple["Node | None", int]:
        """Finds the child that begins most like a block, and with how many of its tokens."""
        at = self._place(block)
        beside = [(_count_alike(each.block, block), each) for each in self.children[max(at - 1, 0) : at + 1]]
        count, child = max(beside, key=lambda pair: pair[0], default=(0, None))
        return (child, count) if count else (None, 0)

    def _place(self, block: Block) -> int:
        return bisect.bisect_left(self.children, block, key=lambda child: child.block)


class Prefixes:
    """The tree, and what of it groups can use.

    Attributes:
        reused: tokens of prompts that were copied.
    """

    def __init__(self, slots: Slots, longest: int) -> None:
        """Keeps blocks in a cache whose rows have at most `longest` tokens."""
        self._slots, self._most = slots, -(-longest // UNIT)
        self._roots: dict[Hashable, Node] = {}
        self._by_use: dict[Node, None] = {}  # the least recently used first, and each before its parent
        self._clock = 0
        self.reused = 0

    def left_to_run(self, prompts: Sequence[Group]) -> list[Group]:
        """Leaves out prompts that begin with what an earlier one is about to bring into the tree."""
        claimed: set[tuple[Hashable, int]] = set()
        left = []
        for group in sorted(prompts, key=lambda group: group.first == 0):
            keeps = group.root is not None and not group.task.corrects_prompt
            begins = [(group.root, begin) for begin in _hashes(group.prompt)] if keeps else []
            if group.first == 0 and group.reuses_prompt:
                unknown = begins[self._find(group)[1] // UNIT :]
                if unknown and unknown[0] in claimed:
                    continue
            claimed.update(begins)
            left.append(group)
        return left

    def reuse(self, group: Group) -> None:
        """Copies what the tree has of a prompt that has not begun to run, so that it begins behind that."""
        nodes, count = self._find(group) if group.first == 0 and group.reuses_prompt else ([], 0)
        if nodes:
            self._use(nodes)
            own = [group.extent.start + UNIT * at for at in range(len(nodes))]
            self.copy([node.slots.start for node in nodes], own)
            group.first, group.skipped = count, count if group.task.corrects_prompt else 0
            self.reused += count

    def keep(self, group: Group, tokens: Sequence[int]) -> None:
        """Copies a group's tokens into the tree, as far as there is room."""
        if not group.keeps_prompt:
            return
        root = node = self._roots.get(group.root) or Node((), range(0), None, 0, name=group.root)
        path, sources, targets = [], [], []
        for at in range(min(-(-len(tokens) // UNIT), self._most)):
            block = tuple(tokens[at * UNIT : (at + 1) * UNIT])
            child, alike = node.most_alike(block)
            if child is None or alike < len(block):
                if child is not None and alike == len(child.block):  # a part of this one
                    self._forget(child)
                slots = self._slots.take_free()
                if slots is None and self.evict():
                    slots = self._slots.take_free()
                if slots is None:
                    break
                child = node.add(block, slots, self._clock)
                sources.append(group.extent.start + UNIT * at)
                targets.append(slots.start)
            child.used = self._clock
            path.append(child)
            node = child
        self._use(path)
        self._clock += 1
        if root.children:
            self._roots[root.name] = root
        if sources:
            self.copy(sources, targets)

    def evict(self) -> bool:
        """Forgets the block that was used least recently, but none that `keep` builds on; false where there is none."""
        node = next((node for node in self._by_use if node.used < self._clock), None)
        if node is None:
            return False
        self._forget(node)
        return True

    def _forget(self, node: Node) -> None:
        """Frees a block that has no children."""
        assert node.parent is not None
        node.parent.remove(node)
        if node.parent.parent is None and not node.parent.children:
            self._roots.pop(node.parent.name, None)
        del self._by_use[node]
        self._slots.free(node.slots)

    def reset(self) -> None:
        """Forgets everything."""
        self._roots, self._by_use = {}, {}

    def _find(self, group: Group) -> tuple[list[Node], int]:
        """Finds the blocks in front of a prompt's last token, and how many of its tokens they have."""
        node, found, count, left = self._roots.get(group.root), [], 0, tuple(group.prompt[:-1])
        while node is not None and count < len(left):
            child, alike = node.most_alike(left[count : count + UNIT])
            if child is None:
                break
            found.append(child)
            count += alike
            node = child if alike == UNIT else None
        return found, count

    def _use(self, nodes: Sequence[Node]) -> None:
        """Takes note of a use of blocks that follow each other."""
        for node in reversed(nodes):
            self._by_use.pop(node, None)
            self._by_use[node] = None

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies units from these first slots to those."""
        places = np.zeros((2, self._most), np.int32)
        places[:, : len(sources)] = sources, targets
        self._slots.cache = copy_units(self._slots.cache, *places, np.int32(len(sources)))


def _count_alike(one: Block, other: Block) -> int:
    """Counts the tokens with which both begin."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _hashes(prompt: Sequence[int]) -> list[int]:
    """Computes a number for each beginning of whole blocks in front of a prompt's last token."""
    hashes = [0]
    for at in range((len(prompt) - 1) // UNIT):
        hashes.append(hash((hashes[-1], *prompt[at * UNIT : (at + 1) * UNIT])))
    return hashes[1:]


@functools.partial(jax.jit, donate_argnums=0)
def copy_units(cache: Cache, sources: Int[Array, " n"], targets: Int[Array, " n"], count: Int[Array, ""]) -> Cache:
    """Copies the first `count` units, each from a first slot to another."""

    def copy(at: jax.Array, cache: Cache) -> Cache:
        def copied(leaf: jax.Array) -> jax.Array:
            unit = jax.lax.dynamic_slice_in_dim(leaf, sources[at], UNIT, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(leaf, unit, targets[at], axis=1)

        return jax.tree.map(copied, cache)

    return jax.lax.fori_loop(0, count, copy, cache)
