"""Peer: pfl-research, PyTorch backend, FederatedAveraging over the processes of torchrun.

Its own balance between processes is used (`user_id_to_weight`), and only the adapter is copied and summed.
Nothing is evaluated.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from workload import (
    Step,
    arguments,
    build_model,
    end_of_round,
    make_optimizer,
    save_result,
    trained,
    write_versions,
)


class WithLoss(torch.nn.Module):
    """A PEFT model with the two methods that pfl asks for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def loss(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss

    def metrics(self, **_: Any) -> dict[str, Any]:
        """Nothing; pfl asks for it in the first round, whatever the frequency, and that one is warm-up."""
        from pfl.metrics import Weighted

        return {"nothing": Weighted(0, 1)}


def main() -> None:
    workload, out = arguments()
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.internal.ops.selector import get_framework_module
    from pfl.model.pytorch import PyTorchModel

    class Batches(Dataset):  # type: ignore[misc]
        """A user's batches, made before."""

        def __init__(self, steps: list[Step], user_id: str) -> None:
            super().__init__(raw_data=(steps,), user_id=user_id)
            self.steps = steps

        def __len__(self) -> int:
            return sum(len(step["input_ids"]) for step in self.steps)

        def iter(self, batch_size: int | None) -> Iterable[Step]:  # noqa: ARG002
            return iter(self.steps)

    rank = get_framework_module().distributed.global_rank
    settings = workload.settings
    now = {"round": 0}

    class AtEndOfRound(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, *arguments: Any, central_iteration: int, **others: Any) -> Any:
            now["round"] = central_iteration + 1
            if rank == 0:
                end_of_round(out)
            return super().after_central_iteration(*arguments, central_iteration=central_iteration, **others)

    if rank == 0:
        write_versions(out, "pfl")
    np.random.seed(0)
    model = WithLoss(build_model(workload)).train()
    live = trained(model)
    pfl_model = PyTorchModel(
        model,
        local_optimizer_create=lambda *_, **__: make_optimizer(list(live.values()), settings),
        central_optimizer=torch.optim.SGD(list(live.values()), lr=1.0),
    )
    users = list(range(workload.num_clients))
    dataset = FederatedDataset(
        lambda user: Batches(workload.rounds[now["round"]][user], str(user)),
        get_user_sampler("minimize_reuse", users),
        user_id_to_weight=dict(enumerate(workload.costs(0))),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=len(workload.rounds),
            evaluation_frequency=10**9,
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=dataset, val_data=None),
        model=pfl_model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=settings["lr"], local_batch_size=settings["batch_size"]
        ),
        model_eval_params=None,
        callbacks=[AtEndOfRound()],
    )
    if rank == 0:
        save_result(out, {name.removeprefix("model."): value for name, value in live.items()})


if __name__ == "__main__":
    main()
