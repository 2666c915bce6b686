"""Peer: PEFT and torch, a loop over clients on each process of torchrun, FedAvg at the end of a round."""

import torch.distributed as dist
from fedavg_loop import run
from workload import arguments, build_model, train_client, write_versions


def main() -> None:
    workload, out = arguments()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        write_versions(out)
    run(workload, out, build_model(workload), train_client, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
