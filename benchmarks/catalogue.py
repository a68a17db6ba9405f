"""Everything that registers families and providers; import this to have all of them."""

from . import families, g2p, keras_peers, layer_providers, layers, peers, providers, step_providers, stepwise

__all__ = ["families", "g2p", "keras_peers", "layer_providers", "layers", "peers", "providers", "step_providers", "stepwise"]
