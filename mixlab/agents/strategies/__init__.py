"""How agents communicate.

`core` says what a strategy is; the other modules hold the families of strategies.
"""

import functools
from collections.abc import Callable

from mixlab import spec
from mixlab.agents.strategies.averaging import dimat, gossip, wa
from mixlab.agents.strategies.basic import data_parallel, none
from mixlab.agents.strategies.compressed import choco
from mixlab.agents.strategies.consensus import Consensus, consensus
from mixlab.agents.strategies.core import AgentState, Gradients, Problem, Strategy, local_step
from mixlab.agents.strategies.federated import diloco, fedadam, fedavg, fedavgm, fedprox
from mixlab.agents.strategies.stepwise import cdmsgd, cdsgd, cga, dpsgd, ldsgd, swarm
from mixlab.agents.strategies.tracking import gradient_tracking, sgp
from mixlab.agents.topology import Topology

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "none": none,
    "data_parallel": data_parallel,
    "wa": wa,
    "gossip": gossip,
    "dimat": dimat,
    "dpsgd": dpsgd,
    "cdsgd": cdsgd,
    "cdmsgd": cdmsgd,
    "ldsgd": ldsgd,
    "swarm": swarm,
    "cga": cga,
    "sgp": sgp,
    "gradient_tracking": gradient_tracking,
    "choco": choco,
    "fedavg": fedavg,
    "fedprox": fedprox,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "diloco": diloco,
}


def parse(text: str | Strategy, topology: Topology) -> Strategy:
    """Builds a strategy from text such as `"dimat(opt_state='permute')"`.

    Raises:
        ValueError: an unknown name, of which the message lists the known ones, or an argument that
            is out of range or does not suit the topology.
        TypeError: an argument that the strategy does not take.
    """
    if isinstance(text, Strategy):
        return text

    vocabulary = {name: functools.partial(fn, topology) for name, fn in STRATEGIES.items()}
    return spec.parse(text, vocabulary)


__all__ = [
    "STRATEGIES",
    "AgentState",
    "Consensus",
    "Gradients",
    "Problem",
    "Strategy",
    "cdmsgd",
    "cdsgd",
    "cga",
    "choco",
    "consensus",
    "data_parallel",
    "diloco",
    "dimat",
    "dpsgd",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedprox",
    "gossip",
    "gradient_tracking",
    "ldsgd",
    "local_step",
    "none",
    "parse",
    "sgp",
    "swarm",
    "wa",
]
