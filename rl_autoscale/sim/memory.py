"""Room for the fleets of a batch: the arrays of a `World`, how they grow, the records that an episode begins with."""

from __future__ import annotations

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ClassTelemetry, PoolTelemetry, StageTelemetry
from rl_autoscale.sim.episode import NUM_DRAWS
from rl_autoscale.sim.layout import (
    CANDIDATE,
    CLASS,
    FLEET,
    KV_BLOCK,
    NO_ROOM,
    NONE,
    PER_REQUEST,
    POOL,
    REPLICA,
    TPOT_EDGES_S,
    TTFT_EDGES_S,
    FloatArray,
    IntArray,
    RecordArray,
    World,
    next_power_of_two,
)
from rl_autoscale.sim.prefix import prefix_blocks
from rl_autoscale.sim.records import (
    class_records,
    fleet_record,
    kept_tokens,
    most_candidates,
    pool_records,
    token_times,
    units_per_block,
)
from rl_autoscale.sim.schedulers.slos_plan import PLAN_PROMPT, plan_labels
from rl_autoscale.workload.trace import Workload

WORTH_A_LOOK_BYTES = 1 << 24
"""Arrays from this size on are asked for only where the machine has the memory."""
SPARE = 1.25
"""How many times as long as needed an array is kept for the next episode."""


class Sizes(NamedTuple):
    """How many of each there are, and how large their trees."""

    slots: list[int]  # by pool: replicas and those that drain beside them
    bases: IntArray  # (num_pools,): first slot of each pool
    workers: int
    event_tree: int
    route_tree: int


def sizes(spec: FleetSpec) -> Sizes:
    """Of one fleet."""
    slots = [2 * pool.max_replicas for pool in spec.pools]
    num_slots = sum(slots)
    workers = 0 if spec.postprocess is None else spec.postprocess.num_workers
    leaves = 2 * num_slots + workers if spec.has_stages else num_slots  # replicas, their links, workers
    bases = np.cumsum([0, *slots[:-1]])
    return Sizes(slots, bases, workers, next_power_of_two(leaves), next_power_of_two(max(slots)))


class Template(NamedTuple):
    """Records as an episode begins."""

    fleet: RecordArray  # (1,) FLEET
    pool: RecordArray  # (num_pools,) POOL
    cls: RecordArray  # (num_classes,) CLASS


def template(spec: FleetSpec, counts_gaps: bool) -> Template:
    """Of one fleet."""
    size = sizes(spec)
    fleet = fleet_record(spec, size.event_tree)
    fleet["counts_gaps"] = counts_gaps
    return Template(fleet, pool_records(spec, size.bases, size.slots, size.route_tree), class_records(spec))


def allocate(spec: FleetSpec, fleets: int, gap_edges_s: FloatArray | None) -> World:
    """Arrays for so many fleets of a spec; what is as long as the traffic, `Rooms` gives."""
    size = sizes(spec)
    num_slots, num_pools, num_classes = sum(size.slots), len(spec.pools), len(spec.classes)
    class_pools = np.full((num_classes + 1, num_pools), NONE, dtype=np.int64)
    for c, serving in enumerate([*(spec.pools_serving(c) for c in range(num_classes)), spec.decode_pools]):
        class_pools[c, : len(serving)] = serving
    edges_s = np.array([np.inf] if gap_edges_s is None else gap_edges_s, dtype=np.float64)
    largest_batch = int(spec.batch_limits.max())
    most_joined = 1 if gap_edges_s is None else largest_batch
    most_cached_blocks = max(pool.num_kv_blocks if pool.prefix_caching else 1 for pool in spec.pools)
    world = World(
        rep=np.zeros((fleets, num_slots), dtype=REPLICA),
        pool=np.zeros((fleets, num_pools), dtype=POOL),
        cls=np.zeros((fleets, num_classes), dtype=CLASS),
        fleet=np.zeros((fleets, 1), dtype=FLEET),
        heap=np.zeros((fleets, num_slots, largest_batch), dtype=np.int64),
        residue=np.zeros((fleets, num_slots, max(units_per_block(pool) for pool in spec.pools)), dtype=np.int32),
        event_tree=np.full((fleets, 2 * size.event_tree), np.inf),
        route_tree=np.full((fleets, num_pools, 2 * size.route_tree), NO_ROOM, dtype=np.int64),
        token_time=np.stack([token_times(spec)] * fleets),
        coefficients=np.stack([np.stack([p.hardware.attention_coefficients_s for p in spec.pools])] * fleets),
        class_pools=class_pools,
        class_order=np.argsort([item.priority for item in spec.classes], kind="stable").astype(np.int64),
        draws=np.zeros((fleets, num_pools, 4, NUM_DRAWS)),
        ttft_hist=np.zeros((fleets, num_classes, len(TTFT_EDGES_S) + 1), dtype=np.int64),
        tpot_hist=np.zeros((fleets, num_classes, len(TPOT_EDGES_S) + 1), dtype=np.int64),
        last_pool=np.zeros((fleets, num_pools), dtype=POOL),
        last_cls=np.zeros((fleets, num_classes), dtype=CLASS),
        pool_state=np.zeros((fleets, num_pools, len(fields(PoolTelemetry)))),
        class_state=np.zeros((fleets, num_classes, len(fields(ClassTelemetry)))),
        stage_state=np.zeros((fleets, len(fields(StageTelemetry)))),
        worker=np.zeros((fleets, max(size.workers, 1)), dtype=np.int32),
        gap_edges=edges_s,
        gap_hist=np.zeros((fleets, num_pools, len(edges_s) + 1), dtype=np.int64),
        joined=np.zeros((fleets, num_slots, most_joined), dtype=np.int32),
        candidates=np.zeros((fleets, most_candidates(spec)), dtype=CANDIDATE),
        kv=np.zeros((fleets, num_slots, most_cached_blocks), dtype=KV_BLOCK),
        **{name: np.zeros((fleets, 2), dtype=np.int64) for name in PER_REQUEST},
        **_plan_arrays(spec, fleets),
    )
    for p, (base, slots) in enumerate(zip(size.bases, size.slots, strict=True)):
        world.rep["pool"][:, base : base + slots] = p
    return world


def _plan_arrays(spec: FleetSpec, fleets: int) -> dict[str, Any]:
    """Room for the dynamic programme of `slos-serve`, if a pool has it."""
    planned = [pool.batch_limit for pool in spec.pools if pool.scheduler == "slos-serve"]
    labels = plan_labels(len(spec.tpot_tiers_s) if planned else 0)
    return {
        "periods_s": np.array(spec.tpot_tiers_s),
        "kept_tokens": kept_tokens(spec),
        "plan_prompt": np.zeros((fleets, max(planned, default=0) + 1), dtype=PLAN_PROMPT),
        "plan_count": np.stack([labels.used] * fleets),
        "plan_time": np.stack([labels.time_s] * fleets),
        "plan_context": np.stack([labels.context] * fleets),
        "plan_chosen": np.stack([labels.chosen] * fleets),
    }


class Rooms:
    """Every fleet's arrays that are as long as its traffic (`PER_REQUEST`), and in the World where they are.

    A fleet's last no longer than its episode needs them: fleets whose traffic differs tenfold are trained together.
    """

    def __init__(self, world: World, fleets: int) -> None:
        self._world = world
        self._arrays: list[dict[str, RecordArray]] = [{} for _ in range(fleets)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: its arrays lie elsewhere."""
        self.__dict__.update(state)
        for e, mine in enumerate(self._arrays):
            for name, array in mine.items():
                getattr(self._world, name)[e, 0] = array.ctypes.data

    def array(self, e: int, name: str, number: int) -> RecordArray:
        """The first elements of a fleet's array of that name, as many as it was given or fewer."""
        return self._arrays[e][name][:number]

    def give(self, e: int, **numbers: int) -> dict[str, RecordArray]:
        """A fleet's arrays of these names with so many elements (one if none); what they hold is anything.

        Raises:
            SpecError: there is not so much memory; the fleet keeps the arrays it had.
        """
        mine = self._arrays[e]
        sizes = {name: max(number, 1) for name, number in numbers.items()}
        fits = {name: name in mine and size <= len(mine[name]) <= SPARE * size for name, size in sizes.items()}
        mine |= {name: self._allocate(name, size) for name, size in sizes.items() if not fits[name]}
        for name, size in sizes.items():
            getattr(self._world, name)[e] = mine[name].ctypes.data, size
        return {name: mine[name][:number] for name, number in numbers.items()}

    def _allocate(self, name: str, size: int) -> RecordArray:
        held_bytes = sum(array.nbytes for mine in self._arrays for array in mine.values())
        more_bytes = size * PER_REQUEST[name].itemsize
        try:
            if more_bytes >= WORTH_A_LOOK_BYTES and held_bytes + more_bytes > _most_bytes():
                raise MemoryError
            return np.zeros(size, dtype=PER_REQUEST[name])
        except MemoryError:
            raise SpecError(
                f"no memory for an episode of {size:,} requests beside {held_bytes / 2**30:.1f} GiB that the "
                f"simulation's {len(self._arrays)} fleets hold: run fewer fleets together (num_fleets in training), "
                "shorter episodes, or less traffic"
            ) from None


def _most_bytes() -> float:
    """What this process has and what the machine has left; infinite where neither can be read.

    An array takes its memory when it is written, so asking for it says nothing: Linux would end the process later.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free_kb = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return math.inf
    return free_kb * 1024.0 + pages * float(os.sysconf("SC_PAGE_SIZE"))


def give_prefixes(rooms: Rooms, world: World, e: int, workload: Workload) -> None:
    """Give the kernels the prompts' hashes, and every request of fleet ``e`` room for its block table."""
    blocks = prefix_blocks(workload)
    tokens = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
    table_offsets = np.concatenate([[0], np.cumsum(-(-tokens // BLOCK_SIZE_TOKENS))])
    number, num_hashes = workload.num_requests, len(blocks.hash_ids)
    room = rooms.give(e, prompt=number, hash_ids=num_hashes, sent_to=num_hashes, table=int(table_offsets[-1]))
    room["prompt"]["hash_start"] = blocks.hash_offsets[:-1]
    room["prompt"]["table_start"] = table_offsets[:-1]
    room["prompt"]["num_hashes"] = np.diff(blocks.hash_offsets)
    room["prompt"]["num_shared"] = blocks.num_shared
    room["hash_ids"][:] = blocks.hash_ids
    room["sent_to"][:] = NONE
    world.fleet["blocks_per_hash"][e] = blocks.blocks_per_hash
