"""Peer: a Hugging Face Trainer for each client of each round, as OpenFedLLM, Shepherd and FlowerTune do it.

Each process deals with its own clients, so the Trainer must not see that there are others: what torchrun has set in
the environment is taken away once the processes have met.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from fedavg_loop import run
from workload import Step, arguments, build_model, make_optimizer, trained, write_versions


class InOrder:
    """Batches made before; one is one item."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]


def main() -> None:
    workload, out = arguments()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        os.environ.pop(name, None)
    from transformers import Trainer, TrainingArguments

    class InOrderTrainer(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # noqa: ARG002
            return torch.utils.data.SequentialSampler(self.train_dataset)

    if rank == 0:
        write_versions(out, "accelerate")
    settings = workload.settings
    how = TrainingArguments(
        output_dir=str(out / f"trainer-{rank}"),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        max_grad_norm=0.0,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )

    def train(model: Any, steps: list[Step], settings: dict[str, Any]) -> None:
        optimizer = make_optimizer(trained(model).values(), settings)
        InOrderTrainer(
            model=model,
            args=how,
            train_dataset=InOrder(steps),
            data_collator=lambda items: items[0],
            optimizers=(optimizer, None),
        ).train()

    run(workload, out, build_model(workload), train, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
