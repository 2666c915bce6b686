"""What a run is about to do, for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedsim.aggregation.strategy import Strategy
from fedsim.data.build import FederatedData
from fedsim.lora.factors import AdapterState
from fedsim.lora.payload import MIB, pickled_payload_mib
from fedsim.lora.plan import Client
from fedsim.lora.state import ServerState
from fedsim.lora.updates import POOLED_CLIENT
from fedsim.server.cohort import CohortPolicy
from fedsim.server.tiers import Tiers
from fedsim.server.turnout import Participation
from fedsim.training.reports import num_trained_parameters

MOST_TIERS = 8
"""Resource tiers that are listed one by one."""


@dataclass(frozen=True, slots=True)
class FirstRound:
    """What clients of one kind do in the first round; see `ClientPlan`.

    Attributes:
        num_clients: of this kind.
        trained_parameters: values that one trains.
        received_bytes, sent_bytes: of one.
    """

    num_clients: int
    trained_parameters: int
    received_bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class RunSummary:
    """The figures of a run that are known before it starts.

    Attributes:
        base_name: of the base model.
        base_parameters: of the base, tied weights counted once.
        adapter: initial global adapter.
        data: examples and partition.
        cohort: how cohorts are chosen.
        tiers: LoRA ranks of each client.
        strategy: the federated method.
        participation: how reliable clients are; None if all report back.
    """

    base_name: str
    base_parameters: int
    adapter: AdapterState
    data: FederatedData
    cohort: CohortPolicy
    tiers: Tiers
    strategy: Strategy
    participation: Participation | None = None

    def lines(self) -> list[str]:
        """The summary as aligned lines of text."""
        rows = [
            ("model", self._model()),
            ("adapter", f"{len(self.adapter)} modules, {self._trainable()}"),
            ("data", f"{self.data.corpus_source}; test set: {self.data.test_from}"),
            ("partition", self._partition()),
            ("classes", self._classes()),
            *([("answers", self._answers())] if self.data.train.answers is not None else []),
            ("strategy", self._strategy()),
            ("cohort", self._cohort()),
            ("traffic", self._traffic()),
        ]
        if self.participation is not None:
            rows.append(("clients", self._participation(self.participation)))
        return [f"{name:<10}{text}" for name, text in rows]

    def _model(self) -> str:
        total = self.base_parameters + self.adapter.num_parameters
        return f"{self.base_name}, {self.base_parameters:,} parameters, {total:,} with the adapter"

    @cached_property
    def first_round(self) -> tuple[FirstRound, ...]:
        """By resource tier, what the strategy has clients do in the first round: the plan of one of each."""
        state = ServerState(0, self.adapter)
        sides = self.strategy.sends(state)
        if self.strategy.traits.trains_pool:
            one_of_each = {POOLED_CLIENT: 1}
        else:
            _, first, counts = np.unique(self.tiers.tier_of, return_index=True, return_counts=True)
            one_of_each = dict(zip(first.tolist(), counts.tolist(), strict=True))
        found = []
        for client_id, count in one_of_each.items():
            lora_ranks = self.tiers.lora_ranks(client_id, 0)
            received = self.strategy.download(state, lora_ranks)
            plan = self.strategy.plan(state, Client(client_id, lora_ranks), received)
            found.append(
                FirstRound(count, num_trained_parameters(plan), plan.received_bytes, plan.sent_bytes(sides))
            )
        return tuple(found)

    def _trainable(self) -> str:
        total = self.base_parameters + self.adapter.num_parameters
        ranks = sorted({factors.rank for factors in self.adapter.values()})
        shown = f"LoRA rank {', '.join(map(str, ranks))}"
        trained = [kind.trained_parameters for kind in self.first_round]
        if set(trained) == {self.adapter.num_parameters}:
            share = f"{self.adapter.num_parameters / total:.4%}"
            return f"{shown}, {self.adapter.num_parameters:,} trainable parameters ({share})"
        return (
            f"{shown}, {self.adapter.num_parameters:,} parameters; in the first round a client trains "
            f"{_span(trained)} (at most {max(trained) / total:.4%})"
        )

    def _strategy(self) -> str:
        if not self.tiers.are_mixed:
            return self.strategy.name
        if len(self.tiers.ranks) > MOST_TIERS:
            found = {rank for ranks in self.tiers.ranks for rank in ranks.values()}
            return f"{self.strategy.name}; {len(self.tiers.ranks)} tiers of LoRA ranks {min(found)} to {max(found)}"
        tiers = []
        for ranks, count in zip(self.tiers.ranks, self.tiers.num_clients, strict=True):
            shown = "/".join(map(str, sorted(set(ranks.values()))))
            tiers.append(f"{count} clients of LoRA rank {shown}")
        return f"{self.strategy.name}; {', '.join(tiers)}"

    def _participation(self, participation: Participation) -> str:
        parts = [f"available with probability {participation.availability:g}"]
        if participation.outages:
            parts.append(f"{len(participation.outages)} outages")
        parts.append(f"drop out with probability {participation.dropout:g}")
        if participation.over_selection > 1:
            parts.append(f"{participation.over_selection:g} drawn for each one wanted")
        if participation.deadline_s is not None:
            parts.append(f"late after {participation.deadline_s:g} simulated seconds")
        if participation.has_clock:
            parts.append("simulated clock on")
        return ", ".join(parts)

    def _cohort(self) -> str:
        size = f"{self.cohort.size}" if self.cohort.probability is None else f"about {self.cohort.size}"
        pooled = "; their data is that of one virtual client" if self.strategy.traits.trains_pool else ""
        return f"{size} of {self.cohort.num_clients} clients a round{pooled}"

    def _partition(self) -> str:
        sizes = self.data.partition.sizes
        return (
            f"{len(sizes)} clients with {int(sizes.sum()):,} training examples (a client: least {int(sizes.min())}, "
            f"median {float(np.median(sizes)):g}, most {int(sizes.max())}), {len(self.data.test):,} test examples"
        )

    def _classes(self) -> str:
        num_classes = self.data.partition.num_classes
        counts = ", ".join(map(str, np.bincount(self.data.train_classes, minlength=num_classes)))
        edges = ", ".join(f"{edge:g}" for edge in self.data.class_edges)
        unit = self.data.partition.length_unit
        return f"{num_classes} length classes of {counts} examples, cut after {edges} {unit}"

    def answer_counts(self) -> dict[str, dict[str, int]]:
        """What became of prompts and answers in the training and the test set; empty for plain text."""
        counts = {}
        for name, store in (("training", self.data.train), ("test", self.data.test)):
            if store.answers is not None:
                counts[name] = {
                    "examples": len(store),
                    "prompts_cut": store.answers.num_prompts_cut,
                    "answers_cut": store.answers.num_answers_cut,
                    "dropped_without_label_token": store.num_dropped,
                    "without_rouge_tokens": store.answers.num_without_rouge_tokens(),
                }
        return counts

    def _answers(self) -> str:
        return "; ".join(
            f"{name}: {of['prompts_cut']:,} of {of['examples']:,} prompts and {of['answers_cut']:,} answers cut, "
            f"{of['dropped_without_label_token']:,} rows without a label token dropped, {of['without_rouge_tokens']:,} "
            "without a Latin reference (Rouge-L 0)"
            for name, of in self.answer_counts().items()
        )

    def _traffic(self) -> str:
        """Of the first round; with tiers what clients send varies with who is drawn."""
        kinds = self.first_round
        received = [kind.received_bytes for kind in kinds]
        sent = [kind.sent_bytes for kind in kinds]
        size = 1 if self.strategy.traits.trains_pool else self.cohort.size
        clients = sum(kind.num_clients for kind in kinds)
        whole = sum(kind.num_clients * (kind.received_bytes + kind.sent_bytes) for kind in kinds)
        about = "about " if len(kinds) > 1 or self.cohort.probability is not None else ""
        a_round = f"{about}{round(size * whole / clients):,} bytes a round, both directions"
        if set(received) | set(sent) == {self.adapter.num_bytes}:
            one_way = self.adapter.num_bytes
            return (
                f"{one_way:,} bytes a client and direction ({one_way / MIB:.3f} MiB; "
                f"{pickled_payload_mib(self.adapter):.2f} MiB pickled), {a_round}"
            )
        return (
            f"in the first round a client receives {_span(received)} and sends {_span(sent)} bytes, {a_round}"
        )


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
