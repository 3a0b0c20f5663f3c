"""What PEFT's AdaLoRA computes, written to an `.npz` that the tests read.

`python peft_oracle.py results.npz` runs PEFT in a process of its own, since a
test run on one backend imports no other. `peft_scenarios.py` says what it is
fed.

All results are laid out the same way: a layer's triplets are the rows
`(rank, input_dim + 1 + output_dim)` of its Q, lambda and P; `flat` puts the
rows of all layers, in forward order, behind one another.
"""

import dataclasses
import json
import sys
import tempfile
import types
import warnings
from unittest import mock

import numpy as np
import peft_scenarios as scenarios
from peft_scenarios import LAYERS
from peft_scenarios import flat
from peft_scenarios import step_values


def plain_network(layers):
    """A torch network whose loss is zero, unadapted."""
    import torch

    network = torch.nn.Module()
    for name, (inputs, outputs) in layers.items():
        network.add_module(name, torch.nn.Linear(inputs, outputs))
    network.forward = lambda: types.SimpleNamespace(loss=torch.zeros(()))
    return network


class Peft:
    """A PEFT model of the layers, fed and read in Keras orientation."""

    def __init__(self, run, layers=LAYERS, **options):
        import peft
        import torch

        network = plain_network(layers)
        self.torch = torch
        self.config = peft.AdaLoraConfig(
            init_r=run.initial_rank,
            target_r=run.target_rank,
            tinit=run.warmup_steps,
            tfinal=run.final_steps,
            deltaT=run.mask_interval,
            total_step=run.total_steps,
            beta1=run.beta_1,
            beta2=run.beta_2,
            target_modules=list(layers),
            **options,
        )
        self.model = peft.get_peft_model(network, self.config)
        self.layers = [getattr(network, name) for name in layers]
        self.allocator = self.model.base_model.rankallocator
        self.names = {id(p): n for n, p in network.named_parameters()}

    def parameters(self):
        """`(lora_A, lora_E, lora_B)` of each layer: Q, lambda, P."""
        return [
            (
                layer.lora_A["default"],
                layer.lora_E["default"],
                layer.lora_B["default"],
            )
            for layer in self.layers
        ]

    def assign(self, values, gradients=None):
        """Set all parameters, and their gradients where these are given."""
        self._set(values, lambda p, value: p.data.copy_(value))
        if gradients is not None:
            self.assign_gradients(gradients)

    def assign_gradients(self, gradients):
        def set_gradient(parameter, value):
            parameter.grad = value.clone()

        self._set(gradients, set_gradient)

    def _set(self, values, set_one):
        for parameters, (a, lam, b) in zip(
            self.parameters(), values, strict=True
        ):
            for parameter, value in zip(
                parameters, (a.T, lam[:, None], b.T), strict=True
            ):
                value = np.ascontiguousarray(value)
                set_one(parameter, self.torch.from_numpy(value))

    def rows(self, read=lambda parameter: parameter):
        """What `read` gives for the parameters, laid out `flat`."""
        return flat(
            self.torch.cat([read(q), read(lam), read(p).T], dim=1)
            .detach()
            .numpy()
            for q, lam, p in self.parameters()
        )

    def state(self, name):
        """The allocator's `exp_avg_ipt` or `exp_avg_unc`, laid out `flat`."""
        state = getattr(self.allocator, name)
        return self.rows(lambda parameter: state[self.names[id(parameter)]])

    def lambdas(self):
        return flat(
            lam.detach().numpy().copy() for _, lam, _ in self.parameters()
        )

    def kept(self):
        """The pattern in the configuration; everything before the first."""
        if self.config.rank_pattern is None:
            return np.ones(self.allocator.init_bgt, bool)
        return flat(
            self.config.rank_pattern[self.names[id(lam)]]
            for _, lam, _ in self.parameters()
        )

    def allocate(self, step):
        """Call `update_and_allocate`.

        Returns:
            The triplets' importance, NaN if the step does not rank them.
        """
        seen = np.full(self.allocator.init_bgt, np.nan)
        kthvalue = self.torch.kthvalue

        def recording(scores, k):
            seen[:] = scores.numpy()
            return kthvalue(scores, k=k)

        with mock.patch.object(self.torch, "kthvalue", recording):
            self.model.base_model.update_and_allocate(step)
        return seen

    def sgd(self):
        return self.torch.optim.SGD(
            [p for layer in self.parameters() for p in layer],
            scenarios.LEARNING_RATE,
        )


def failure(action, *arguments):
    """The type and the message of what `action` raises, as JSON."""
    try:
        action(*arguments)
    except Exception as error:
        return json.dumps([type(error).__name__, str(error)])
    return json.dumps(None)


def budgets(run):
    layers = {f"layer{index}": (32, 32) for index in range(run.num_layers)}
    schedule = Peft(run, layers).allocator.budget_schedule
    return {"budget": [schedule(step)[0] for step in run.steps]}


def scores(run):
    """A whole schedule, with given parameters and gradients at each step."""
    peft = Peft(run)
    names = ("smoothed", "uncertainty", "kept", "importance", "lambda")
    found = {name: [] for name in names}
    for step in run.steps:
        peft.assign(*step_values(run, step))
        found["importance"].append(peft.allocate(step))
        if step < run.freeze_step:
            found["smoothed"].append(peft.state("exp_avg_ipt"))
            found["uncertainty"].append(peft.state("exp_avg_unc"))
        found["kept"].append(peft.kept())
        found["lambda"].append(peft.lambdas())
    return found


def train(peft, run, steps):
    """Plain SGD on given gradients; what the allocator did at each step."""
    optimizer = peft.sgd()
    found = {name: [] for name in ("kept", "lambda", "importance")}
    for step in steps:
        peft.assign_gradients(step_values(run, step)[1])
        optimizer.step()
        found["importance"].append(peft.allocate(step))
        found["kept"].append(peft.kept())
        found["lambda"].append(peft.lambdas())
    return found


def sgd_run(run):
    """A whole schedule of plain SGD."""
    peft = Peft(run)
    peft.assign(step_values(run, 0)[0])
    return {**train(peft, run, run.steps), "rows": peft.rows()}


def orthogonality():
    peft = Peft(scenarios.CLOSED_RUN, orth_reg_weight=0.3)
    peft.assign(scenarios.random_factors(scenarios.CLOSED_RUN.initial_rank, 11))
    return {"weighted": peft.model.base_model().loss.item()}


def forward(signed):
    """`SVDLinear` with and without its adapter, in double precision."""
    run = dataclasses.replace(scenarios.CLOSED_RUN, initial_rank=2)
    peft = Peft(run, {"layer": (6, 8)}, lora_alpha=scenarios.FORWARD_ALPHA)
    peft.model.double()
    given = scenarios.forward_inputs(signed)
    layer = peft.layers[0]
    base = layer.get_base_layer()
    base.weight.data.copy_(peft.torch.from_numpy(given["kernel"].T.copy()))
    base.bias.data.copy_(peft.torch.from_numpy(given["bias"]))
    peft.assign(
        [(given["lora_kernel_a"], given["lora_lambda"], given["lora_kernel_b"])]
    )
    x = peft.torch.from_numpy(given["x"]).double()
    return {
        "base": base(x).detach().numpy(),
        "output": layer(x).detach().numpy(),
    }


def equal_ranks():
    """An initial rank that is also the target."""
    peft = Peft(scenarios.EQUAL_RUN)
    failures = []
    for step in scenarios.EQUAL_RUN.steps:
        peft.assign(*step_values(scenarios.EQUAL_RUN, step))
        failures.append(failure(peft.allocate, step))
    return {"failures": failures}


def ties():
    """All triplets equally important, for a whole schedule."""
    peft = Peft(scenarios.TIES_RUN)
    values = scenarios.tied_values(scenarios.TIES_RUN.initial_rank)
    kept = []
    for step in scenarios.TIES_RUN.steps:
        peft.assign(values, values)
        peft.allocate(step)
        kept.append(peft.kept())
    return {"kept": kept}


def resumption():
    """A run that goes on in a new process, with what its checkpoint holds.

    A checkpoint is either the parameters or what `save_pretrained` writes.
    """
    import peft as library

    run = scenarios.CLOSED_RUN
    past = run.freeze_step + 1
    first_part = Peft(run)
    first_part.assign(step_values(run, 0)[0])
    train(first_part, run, range(1, scenarios.RESUMED_STEP))
    resumed = Peft(run)
    resumed.model.load_state_dict(first_part.model.state_dict())
    found = train(
        resumed, run, range(scenarios.RESUMED_STEP, run.freeze_step + 1)
    )

    fresh = Peft(run)
    fresh.model.load_state_dict(resumed.model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        resumed.model.save_pretrained(folder)
        loaded = library.PeftModel.from_pretrained(
            plain_network(LAYERS), folder, is_trainable=True
        )
    return {
        "kept": found["kept"][-1],
        "from_parameters": failure(fresh.allocate, past),
        "from_saved": failure(loaded.base_model.update_and_allocate, past),
    }


def forgotten():
    """Training without a call of `update_and_allocate`."""
    run = scenarios.CLOSED_RUN
    peft = Peft(run)
    peft.assign(step_values(run, 0)[0])
    optimizer = peft.sgd()
    for step in run.steps:
        peft.assign_gradients(step_values(run, step)[1])
        optimizer.step()
    return {"lambda": peft.lambdas()}


def main(path):
    warnings.simplefilter("ignore")
    results = {
        **{
            f"budget.{run.name}": budgets(run)
            for run in scenarios.budget_runs()
        },
        **{f"scores.{run.name}": scores(run) for run in scenarios.SCORE_RUNS},
        "closed": sgd_run(scenarios.CLOSED_RUN),
        "regrowth": sgd_run(scenarios.REGROWTH_RUN),
        "orthogonality": orthogonality(),
        "forward.signed": forward(signed=True),
        "forward.positive": forward(signed=False),
        "equal_ranks": equal_ranks(),
        "ties": ties(),
        "resumption": resumption(),
        "forgotten": forgotten(),
    }
    arrays = {
        f"{scenario}.{name}": np.asarray(value)
        for scenario, found in results.items()
        for name, value in found.items()
    }
    np.savez(path, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
