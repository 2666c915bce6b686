"""A strategy of your own: the coordinate-wise median of the clients' factors instead of their mean."""

from dataclasses import replace

import torch

from fedsim.aggregation.strategy import Aggregated, Traits
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import BOTH, ClientPlan, Upload


class Median:
    name = "median"
    traits = Traits(reduce="stack", uses_client_weights=False)

    def __init__(
        self, federation, step=1.0
    ):  # `federation` knows ranks, scaling, seed ...; the rest are options
        self.step = step

    def sends(self, state):  # which factors clients return
        return BOTH

    def download(self, state, lora_ranks):  # what clients of these LoRA ranks receive
        return state.adapter

    def plan(self, state, client, received):  # how one client trains
        return ClientPlan(received)

    def upload(self, state, client, plan, trained, report):  # what it returns
        return Upload(trained)

    def aggregate(self, state, reports, factors):  # factors: one module after another
        modules = {}
        for module, cohort in factors:
            # of an even number torch.median would take the lower one of the middle two
            A = torch.stack([client.A for client in cohort]).quantile(0.5, dim=0)
            B = torch.stack([client.B for client in cohort]).quantile(0.5, dim=0)
            old = state.adapter[module]
            modules[module] = LoraFactors(
                old.A + self.step * (A - old.A), old.B + self.step * (B - old.B), old.scaling
            )
        return Aggregated(replace(state, round_index=state.round_index + 1, adapter=AdapterState(modules)))

    def export(self, state, client=None):  # the adapter to use
        return state.adapter
