"""Nine ways to train together on digits: accuracy against rounds, bytes and seconds.

Agents are trained apart first and then communicate: never (none), at the beginning of each round
(wa averages neighbours, dimat aligns them first, gossip(align='once') has aligned all to one
basis), or at every step (dpsgd, cdsgd, sgp, cdmsgd, cga). On a ring, a complete graph and one with
two hubs; with even data, two classes an agent, and shares drawn from Dirichlet(0.5); five and ten
agents; three seeds. That makes 450 runs, as isolated agents depend on no topology.

All make the same local step, SGD with Nesterov momentum: cdmsgd and cga bring the momentum
themselves, so their optimizer has none, and cdsgd, which is defined without, has a larger step in
its place. With this optimizer dpsgd is cdmsgd by another name: their rows should agree.

Command:  mixlab sweep --config configs/dimat/mnist5k.py --workdir runs/dimat_mnist5k --jobs 2
Variants: configs/dimat/mnist5k.py:adam   with Adam, as the paper of DIMAT trains; without cdsgd,
          cdmsgd and cga, which are defined for SGD.
Data:     5,000 real handwritten digits that come with the installation (4,000 to train on).
Measured: 85 minutes on two cores shared with other work. Ten agents, ring, even data, after the
          last merge: none 85.5, wa 87.8, dimat 88.9, gossip 89.2, dpsgd 87.7 %; all tables in
          configs/README.md. With Adam (45 minutes on one core): 86.3, 83.8, 88.0, 88.2, 81.6 %.
"""

from ml_collections import ConfigDict

from mixlab.experiment import default_config

# Optimizer -> the strategies that train with it.
OPTIMIZERS = {
    "sgd(0.05, momentum=0.9, nesterov=True)": (
        "none",
        "wa",
        "dpsgd",
        "sgp",
        "dimat",
        "gossip(align='once')",
    ),
    "sgd(0.05)": ("cdmsgd(momentum=0.9)", "cga(momentum=0.9)"),
    "sgd(0.2)": ("cdsgd",),
}
ADAM = {"adam(1e-3)": OPTIMIZERS["sgd(0.05, momentum=0.9, nesterov=True)"]}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "adam"):
        raise ValueError(f"variant {variant!r} is unknown; known: adam, or none")
    optimizers = ADAM if variant == "adam" else OPTIMIZERS
    config = default_config()
    config.data = "mnist5k"
    config.model = "mlp(hidden=(128, 128, 128))"
    config.batch_size = 50
    config.backend = "vmap"  # the agents of a small network are fastest as one batch
    config.matching_examples = 500

    config.pretrain_epochs = 10
    config.rounds = 6
    config.epochs_per_round = 2

    strategies = tuple(strategy for own in optimizers.values() for strategy in own)
    config.sweep.agents = (5, 10)
    config.sweep.topology = ("ring", "complete", "bipartite")
    config.sweep.partition = ("iid", "shards(classes_per_agent=2)", "dirichlet(alpha=0.5)")
    config.sweep.strategy = strategies
    config.sweep.optimizer = tuple(optimizers)
    config.sweep.seed = (0, 1, 2)
    config.sweep_skip = (
        {"strategy": "none", "topology": ("complete", "bipartite")},
        *(
            {"optimizer": optimizer, "strategy": tuple(s for s in strategies if s not in own)}
            for optimizer, own in optimizers.items()
        ),
    )
    return config
