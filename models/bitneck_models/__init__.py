"""Backbones, bottleneck units, training, evaluation and export. The only component with torch.

The rooms, in order; each imports only from itself and from the rooms above it:

    networks   frozen task networks as chains of stages: registry, recipes, cutting, weights, export to ONNX
    units      bottleneck units: geometry, layers, topologies, starts, pruning
    losses     the rate term and the task term
    data       photographs, class maps, scenes, cached features
    spic       checkpoints of the paper's authors as operating points
    zoo        zoo entries on disk: recipes, trained points, records
    training   training of units and of networks
    fitting    contexts and conditional tables of operating points
    search     search for operating points
    measure    evaluation, complexity, baselines, and what a training will take
    learned    baselines that learn: an image codec, and Entropic Student
    export     bundles, and the proof that they equal the network
    report     pictures and tables of what was measured
    cli        the command line ``bitneck-models``
"""

from bitneck import moved

moved.install()
