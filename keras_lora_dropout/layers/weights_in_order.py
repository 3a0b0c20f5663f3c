"""Saving an adapted layer whose Keras class numbers all of its weights."""


class WeightsInOrder:
    """Mixin: what the layer had before the adapter keeps its numbers."""

    def save_own_variables(self, store):
        for number, weight in enumerate(self._own_weights()):
            store[str(number)] = weight
        self._save_adapter(store)

    def load_own_variables(self, store):
        for number, weight in enumerate(self._own_weights()):
            weight.assign(store[str(number)])
        self._load_adapter(store)

    def _own_weights(self):
        ours = set(map(id, self.adapter_weights.values()))
        return [weight for weight in self.weights if id(weight) not in ours]
