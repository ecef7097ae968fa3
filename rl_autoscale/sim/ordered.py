"""Kernel: numbers in order: a min-tree over fixed leaves, a binary heap in an array, the edges of a histogram."""

from __future__ import annotations

from rl_autoscale.fleet.jit import hot


@hot
def tree_set(tree, size, leaf, value):
    """Set one leaf of a min-tree and repair its ancestors; stops where nothing changes."""
    node = size + leaf
    tree[node] = value
    node >>= 1
    while node >= 1:
        left = tree[2 * node]
        right = tree[2 * node + 1]
        smaller = left if left <= right else right
        if tree[node] == smaller:
            break
        tree[node] = smaller
        node >>= 1


@hot
def tree_argmin(tree, size):
    """Leaf with the smallest value; the lowest index among equals."""
    node = 1
    while node < size:
        node *= 2
        if tree[node] != tree[node >> 1]:
            node += 1
    return node - size


@hot
def heap_push(heap, size, key):
    """Push onto a binary heap stored in heap[:size]."""
    child = size
    while child > 0:
        parent = (child - 1) >> 1
        if heap[parent] <= key:
            break
        heap[child] = heap[parent]
        child = parent
    heap[child] = key


@hot
def heap_remove(heap, size, position):
    """Remove the element at a position from heap[:size]; the heap then has size - 1 elements."""
    last = size - 1
    key = heap[last]
    if position == last:
        return
    node = position
    while node > 0 and heap[(node - 1) >> 1] > key:
        heap[node] = heap[(node - 1) >> 1]
        node = (node - 1) >> 1
    while True:
        child = 2 * node + 1
        if child >= last:
            break
        if child + 1 < last and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[node] = heap[child]
        node = child
    heap[node] = key


@hot
def bucket(edges, value):
    """Index of the first edge that is not below the value; len(edges) beyond the last."""
    low = 0
    high = edges.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if edges[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low
