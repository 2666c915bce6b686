"""Peer: Flower's simulation engine (Ray), two actors of one CPU each, NumPyClient and FedAvg.

A careful user's client: base and batches are built once in each actor and kept, and only the adapter travels.
"""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import workload as shared  # noqa: E402

WORKLOAD = "FEDSIM_PEERS_WORKLOAD"


@cache
def kept() -> tuple[Any, Any, dict[str, torch.nn.Parameter]]:
    """Workload, model and adapter of this process."""
    workload = shared.read_workload(Path(os.environ[WORKLOAD]))
    model = shared.build_model(workload)
    return workload, model, shared.trained(model)


def main() -> None:
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import Context, ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    folder, out = sys.argv[1], Path(sys.argv[2])
    os.environ[WORKLOAD] = folder
    shared.write_versions(out, "flwr", "ray")
    workload, _, live = kept()
    names = list(live)
    num_clients, num_rounds = workload.num_clients, len(workload.rounds)
    first = ndarrays_to_parameters([value.detach().numpy().copy() for value in live.values()])
    source = str(FOLDER)

    class Client(NumPyClient):  # type: ignore[misc]
        def __init__(self, client: int) -> None:
            self.client = client

        def fit(self, parameters: Any, config: Any) -> Any:
            if source not in sys.path:
                sys.path.insert(0, source)
            import flower_app

            os.environ[flower_app.WORKLOAD] = folder
            workload, model, live = flower_app.kept()
            with torch.no_grad():
                for value, received in zip(live.values(), parameters, strict=True):
                    value.copy_(torch.from_numpy(received))
            steps = workload.rounds[config["round"]][self.client]
            flower_app.shared.train_client(model, steps, workload.settings)
            num_examples = workload.settings["client_examples"][self.client]
            return [value.detach().numpy() for value in live.values()], num_examples, {}

    def client_fn(context: Context) -> Any:
        return Client(int(context.node_config["partition-id"])).to_client()

    def after_round(server_round: int, parameters: Any, _: Any) -> None:
        if server_round > 0:
            shared.end_of_round(out)
        if server_round == num_rounds:
            shared.save_result(
                out, {n: torch.from_numpy(p.copy()) for n, p in zip(names, parameters, strict=True)}
            )

    def server_fn(_: Context) -> Any:
        strategy = FedAvg(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=num_clients,
            min_available_clients=num_clients,
            initial_parameters=first,
            on_fit_config_fn=lambda server_round: {"round": server_round - 1},
            evaluate_fn=after_round,
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=num_rounds))

    run_simulation(
        server_app=ServerApp(server_fn=server_fn),
        client_app=ClientApp(client_fn=client_fn),
        num_supernodes=num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    main()
