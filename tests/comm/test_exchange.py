"""Gathering and broadcasting between real gloo processes."""

import time
from pathlib import Path

import pytest
import torch

from fedsim.comm import exchange
from fedsim.comm.agree import all_or_none, consume_stream, on_root, root_first, same_everywhere
from fedsim.comm.exchange import (
    broadcast_adapter,
    broadcast_state,
    gather_reports,
    gather_stacks,
    share_modules,
)
from fedsim.comm.group import (
    Group,
    SoloGroup,
    World,
    choose_device,
    join_group,
    sees_only_its_own_gpus,
    world_from_environment,
)
from fedsim.errors import AggregationError, ConfigError, DataError, PeerError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import NEITHER, ONLY_A, ONLY_B
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientUpdate
from tests.cohorts import make_report
from tests.helpers import run_ranks

CLIENTS = (7, 3, 11, 0, 5)
MODULES = ("b", "a")


TO_ROOT = dict.fromkeys(MODULES, 0)


def update(client_id: int) -> ClientUpdate:
    """An update whose LoRA rank differs from client to client and from module to module."""
    generator = torch.Generator().manual_seed(client_id)
    rank = 1 + client_id % 4
    modules = {
        name: LoraFactors(
            torch.randn(r, 6, generator=generator), torch.randn(4, r, generator=generator), 16 / r
        )
        for name, r in (("b", rank), ("a", rank + 2))
    }
    return ClientUpdate(make_report(client_id, 1), AdapterState(modules))


def adapters_of(group: Group) -> dict[int, AdapterState]:
    """What a rank's clients send."""
    return {client: update(client).adapter for client in CLIENTS[group.rank :: group.world_size]}


def gather_all(group: Group) -> tuple[list[int], list]:
    mine = adapters_of(group)
    reports = gather_reports(group, [make_report(client, 1) for client in mine])
    owners = {module: place % group.world_size for place, module in enumerate(MODULES)}
    stacks = [
        (module, [(f.A.tolist(), f.B.tolist(), f.scaling) for f in cohort])
        for module, cohort in gather_stacks(group, mine, owners)
    ]
    return [report.client_id for report in reports], stacks


@pytest.mark.parametrize("world_size", [2, 7])
def test_stacks_are_in_client_order_on_their_owners_whatever_the_world_size(world_size, tmp_path):
    ids, stacks = gather_all(SoloGroup())
    assert ids == sorted(CLIENTS)
    assert [module for module, _ in stacks] == list(MODULES)
    for rank, result in enumerate(run_ranks(gather_all, world_size, tmp_path)):
        assert result == (ids, stacks[rank::world_size])


def gather_with_a_busy_owner(group: Group, folder: Path, ahead: int) -> list[str]:
    """Rank 0 works on its first module until rank 1 has had two of its own, or for a while."""
    exchange.AHEAD = ahead
    owners = {module: place % 2 for place, module in enumerate("abcdefgh")}
    like = update(group.rank).adapter["a"]
    seen = []
    for module, _ in gather_stacks(group, {group.rank: AdapterState(dict.fromkeys(owners, like))}, owners):
        seen.append(module)
        (folder / module).touch()
        for _ in range((1500 if ahead else 100) if seen == ["a"] else 0):
            if (folder / "d").exists():
                seen.append("d was elsewhere")
                break
            time.sleep(0.02)
    return seen


@pytest.mark.parametrize("ahead", [2, 0])
def test_modules_travel_on_while_an_owner_is_busy(ahead, tmp_path):
    busy, other = run_ranks(gather_with_a_busy_owner, 2, tmp_path, tmp_path, ahead)
    assert busy == ["a", *["d was elsewhere"] * (ahead > 0), "c", "e", "g"]
    assert other == ["b", "d", "f", "h"]


def gather_sides(group: Group) -> dict:
    mine = adapters_of(group)
    return {
        sides: [
            [(f.A.nan_to_num(nan=99.0).tolist(), f.B.nan_to_num(nan=99.0).tolist()) for f in cohort]
            for _, cohort in gather_stacks(group, mine, TO_ROOT, sides)
        ]
        for sides in (ONLY_A, ONLY_B, NEITHER)
    }


def test_sides_that_do_not_travel_arrive_as_nan(tmp_path):
    alone = gather_sides(SoloGroup())
    root, other = run_ranks(gather_sides, 2, tmp_path)
    assert root == alone
    assert other == {sides: [] for sides in alone}
    clients = sorted(CLIENTS)
    for sides, (sent_a, sent_b) in {
        ONLY_A: (True, False),
        ONLY_B: (False, True),
        NEITHER: (False, False),
    }.items():
        for module, cohort in zip(MODULES, alone[sides], strict=True):
            for client, (a, b) in zip(clients, cohort, strict=True):
                own = update(client).adapter[module]
                assert a == (own.A if sent_a else torch.full_like(own.A, 99.0)).tolist()
                assert b == (own.B if sent_b else torch.full_like(own.B, 99.0)).tolist()


def test_a_round_without_clients_still_has_all_modules():
    assert list(gather_stacks(SoloGroup(), {}, TO_ROOT)) == [("b", ()), ("a", ())]


def share_parts(group: Group) -> list:
    whole = update(3).adapter
    part = AdapterState(
        {m: f for i, (m, f) in enumerate(whole.items()) if i % group.world_size == group.rank}
    )
    return [
        (m, f.A.tolist(), f.B.tolist(), f.scaling) for m, f in share_modules(group, part, list(whole)).items()
    ]


def test_modules_that_ranks_hold_apart_are_put_together_in_order(tmp_path):
    alone = share_parts(SoloGroup())
    assert [module for module, *_ in alone] == ["b", "a"]
    for result in run_ranks(share_parts, 3, tmp_path):
        assert result == alone


def exercise_failures(group: Group) -> list[str]:
    """Every way to fail together, one after another, in the same processes."""
    seen = []

    def attempt(function):
        try:
            function()
        except PeerError as error:
            seen.append(f"{error} | user={error.user_error} here={error.failed_here}")

    def block():
        with all_or_none(group, "local training, round 3"):
            if group.rank == 1:
                raise ValueError("loss is nan for client 17")

    def root_only():
        on_root(group, "loading", lambda: (_ for _ in ()).throw(DataError("data.source is empty")))

    def first():
        def fail_on_root():
            if group.rank == 0:
                raise DataError("no such file")
            return 1

        root_first(group, "preparing the data", fail_on_root)

    def halfway():
        def consume(stream):
            next(stream)
            raise AggregationError("cannot average")

        stream = gather_stacks(group, adapters_of(group), TO_ROOT)
        consume_stream(group, "aggregation, round 0", stream, consume if group.rank == 0 else None)

    def unequal():
        same_everywhere(group, "the base model", f"hash-{min(group.rank, 1)}")

    def doubled():
        try:
            gather_reports(group, [make_report(3)])
        except AggregationError as error:
            seen.append(str(error))

    for function in (block, root_only, first, halfway, unequal, doubled):
        attempt(function)
    with all_or_none(group, "fine"):
        pass
    return seen


def test_ranks_fail_together_and_go_on(tmp_path):
    for rank, seen in enumerate(run_ranks(exercise_failures, 3, tmp_path)):
        assert seen == [
            "local training, round 3 failed on 1 of 3 ranks; rank 1: ValueError: loss is nan for client 17"
            f" | user=False here={rank == 1}",
            f"loading failed on 1 of 3 ranks; rank 0: DataError: data.source is empty | user=True here={rank == 0}",
            "preparing the data failed on 1 of 3 ranks; rank 0: DataError: no such file"
            f" | user=True here={rank == 0}",
            "aggregation, round 0 failed on 1 of 3 ranks; rank 0: AggregationError: cannot average"
            f" | user=True here={rank == 0}",
            "the base model must be the same on every rank, got rank 0: hash-0, rank 1: hash-1, rank 2: hash-1; "
            "give all nodes the same files and versions | user=True here=True",
            "a client must be trained once a round, got client_id [3, 3, 3]",
        ]


def test_alone_an_error_stays_what_it_is():
    with pytest.raises(ValueError, match="mine"), all_or_none(SoloGroup(), "work"):
        raise ValueError("mine")
    assert root_first(SoloGroup(), "work", lambda: 5) == 5


def share_state(group: Group) -> tuple[bool, bool, int]:
    first = ServerState(2, update(1).adapter, {"client/1": update(2).adapter, "client/2": update(3).adapter})
    known = broadcast_state(group, None, first if group.rank == 0 else None)
    carried = known.strategy_state["client/1"]
    following = ServerState(3, update(4).adapter, {"client/1": carried, "client/2": update(9).adapter})
    after = broadcast_state(group, known, following if group.rank == 0 else None)
    equal = after.adapter.equal(update(4).adapter) and after.strategy_state["client/2"].equal(
        update(9).adapter
    )
    empty = broadcast_adapter(group, AdapterState({}) if group.rank == 0 else None)
    return equal, after.strategy_state["client/1"] is carried, after.round_index + len(empty)


def test_state_reaches_every_rank_and_known_entries_are_not_sent_again(tmp_path):
    assert run_ranks(share_state, 2, tmp_path) == [(True, True, 3)] * 2
    assert share_state(SoloGroup()) == (True, True, 3)


def test_environment_of_launchers():
    assert world_from_environment({}) == World()
    assert world_from_environment({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}) == World(5, 1, 8, 2)
    torchrun = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert world_from_environment(torchrun) == World(5, 1, 8, 4)
    for wrong in (
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ):
        with pytest.raises(ConfigError, match="RANK"):
            world_from_environment(wrong)


def test_devices(caplog):
    four = [World(rank, rank, 4, 4) for rank in range(4)]
    assert [choose_device("auto", world, 4).index for world in four] == [0, 1, 2, 3]
    assert choose_device("cuda", four[2], 8) == torch.device("cuda", 2)
    assert choose_device("cpu", four[0], 4) == torch.device("cpu")
    assert choose_device("auto", World(), 0) == torch.device("cpu")
    assert choose_device("auto", World(), 1) == torch.device("cuda", 0)
    assert not caplog.records
    assert [choose_device("auto", world, 1).type for world in four] == ["cpu"] * 4, (
        "NCCL refuses a shared GPU"
    )
    assert [record.getMessage() for record in caplog.records] == [
        "run.device=auto: the CPU, for 4 processes on a node with 1 visible GPUs; start 1 to use them"
    ]
    one_each = [choose_device("auto", world, 1, own_gpus=True).index for world in four]
    assert one_each == [0] * 4, "with --gpus-per-task every task calls its GPU 0"
    with pytest.raises(ConfigError, match=r"run\.device=cuda needs a GPU for each process, got 4 processes"):
        choose_device("cuda", four[0], 2)
    with pytest.raises(
        ConfigError, match=r"run\.device=auto needs a GPU for each process.* set run.device=cpu"
    ):
        choose_device("auto", four[0], 2, in_job=True)
    assert choose_device("auto", four[0], 0, in_job=True) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"run\.device must be cpu or auto"):
        choose_device("cuda", World(), 0)


def test_gpus_of_a_task():
    step = {"SLURM_STEP_ID": "0"}
    for more, own in (
        ({}, False),
        ({"SLURM_GPUS_PER_TASK": "1"}, True),
        ({"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"}, True),
        ({"SLURM_TRES_PER_TASK": "cpu=4"}, False),
        ({"SLURM_GPUS_PER_TASK": "a100:1"}, True),
        ({"SLURM_GPU_BIND": "single:1"}, True),
        ({"SLURM_GPU_BIND": "verbose,single:1"}, True),
        ({"SLURM_GPU_BIND": "mask_gpu:0x1,0x2"}, True),
        ({"SLURM_GPU_BIND": "closest"}, False),
        ({"SLURM_GPUS_PER_TASK": "4", "GROUP_WORLD_SIZE": "2"}, False),
    ):
        assert sees_only_its_own_gpus(step | more) == own, more
    assert not sees_only_its_own_gpus({"SLURM_GPUS_PER_TASK": "1"}), "a batch script"


def test_a_backend_that_does_not_fit_the_device():
    with pytest.raises(ConfigError, match=r"comm\.backend must be auto or gloo on cpu, got 'nccl'"):
        join_group(0, 1, torch.device("cpu"), "nccl")
