"""From a role's description to its model and its first state on the devices of its home layout."""

import logging
import zlib
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Sharding

from realjax.allocation.plan import AllocationPlan
from realjax.core.axes import inference_rules, tree_shardings
from realjax.core.compute import Compute
from realjax.core.layout import Layout
from realjax.core.trees import Tree, map_paths
from realjax.dataflow.run import RoleSpec, RunSpec
from realjax.engine.attention.cases import Case
from realjax.engine.attention.choose import choose
from realjax.engine.optim import Optimizer
from realjax.engine.state import TrainState, abstract_train_state, init_train_state, train_state_shardings
from realjax.hf.load import has_critic_head, load_params
from realjax.models.build import Model, build_model, init_params, make_fill
from realjax.runtime.finite import nonfinite_leaves

logger = logging.getLogger("realjax.roles")


@dataclass(frozen=True, kw_only=True)
class Role:
    """A role with its model built. `optimizer` is None if it is never trained; `home` is where its parameters live."""

    spec: RoleSpec
    model: Model
    home: Layout
    optimizer: Optimizer | None
    is_offloaded: bool = False  # parameters wait in host memory, in the compute dtype, between the role's calls

    @property
    def compute(self) -> Compute:
        """How its programs compute, on the platform of its devices."""
        return self.spec.compute.on(self.home.devices[0].platform)

    @property
    def param_shardings(self) -> Tree:
        """Where the parameters of a role lie that is never trained."""
        memory_kind = "pinned_host" if self.is_offloaded else None
        rules = inference_rules(self.home.strategy)
        return tree_shardings(self.model.axes, self.model.abstract, rules, self.home, memory_kind)

    @property
    def param_dtype(self) -> np.dtype:
        """The dtype they are kept in: the calls' own, or float32 where small changes are added to them."""
        return np.dtype(np.float32) if self.spec.is_averaged else self.compute.array_dtype

    def copy_shardings(self, layout: Layout) -> Tree | None:
        """Returns where a call in `layout` has its own copy of the parameters; None where it reads those at home."""
        if layout == self.home and not self.is_offloaded:
            return None
        return tree_shardings(self.model.axes, self.model.abstract, inference_rules(layout.strategy), layout)

    def abstract_state(self) -> TrainState | Tree:
        """Returns the shapes and shardings of the role's state; a saved state is restored into this."""
        if self.optimizer is not None:
            return abstract_train_state(self.model, self.optimizer, self.home)

        def one(path: str, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, self.model.copy_dtype(path, self.param_dtype), sharding=sharding)

        return map_paths(one, self.model.abstract, self.param_shardings)


def build_roles(spec: RunSpec, plan: AllocationPlan) -> dict[str, Role]:
    """Returns the run's roles by name, nothing allocated. ValueError for a model that does not fit its layout."""
    return {name: build_role(role, plan, _count_updates(spec, name)) for name, role in spec.roles.items()}


def build_role(spec: RoleSpec, plan: AllocationPlan, total_updates: int) -> Role:
    """Returns one role, see `build_roles`; its learning rate decays over `total_updates`."""
    home, num_empty = plan.homes[spec.name], plan.empty_layers[spec.name]
    model = build_model(replace(spec.config, num_empty_layers=num_empty))
    tree_shardings(model.axes, model.abstract, inference_rules(home.strategy), home)
    optimizer = None if spec.optimizer is None else Optimizer(config=spec.optimizer, total_updates=total_updates)
    logger.info("role %s: %s, %s parameters, %s", spec.name, model.config.family, f"{model.num_params:,}", home)
    if num_empty:
        logger.info(
            "role %s: %d layers and %d empty ones, so that pipeline stages are equal",
            spec.name, model.config.num_layers, num_empty,
        )  # fmt: skip
    role = Role(spec=spec, model=model, home=home, optimizer=optimizer, is_offloaded=spec.name in plan.offloaded)
    try:
        choose(spec.compute.attention, Case.of("rows", model.config, home, role.compute.array_dtype))
    except ValueError as error:
        raise ValueError(f"{spec.title}: {error}") from None
    return role


def _count_updates(spec: RunSpec, role: str) -> int:
    return spec.schedule_steps * spec.graph.num_updates(role)


def load_role(role: Role, seed: int) -> TrainState | Tree:
    """Returns the role's first state: a TrainState when it is trained, else its parameters.

    Random values (from scratch, or a new critic head) depend on the seed, the role's name and the parameter alone.
    Raises ValueError, naming the role and its checkpoint, for parameters that are not finite.
    """
    spec, model = role.spec, role.model
    role_seed = seed << 32 | zlib.crc32(spec.name.encode())
    if role.optimizer is not None:
        shardings = train_state_shardings(model, role.optimizer, role.home)
        return init_train_state(_load_params(role, shardings.params, role_seed, np.float32), role.optimizer, shardings)
    return _load_params(role, role.param_shardings, role_seed, role.param_dtype)


def _load_params(role: Role, shardings: Tree, seed: int, dtype: np.dtype | type) -> Tree:
    if role.spec.init_from_scratch:
        return init_params(role.model, shardings, seed, dtype)
    params = load_params(role.spec.path, role.model, shardings, dtype=dtype, fresh=_fresh_head(role, seed))
    if broken := nonfinite_leaves(params, role.home):
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(
            f"{role.spec.title} holds numbers that are not finite as {np.dtype(dtype)}, in "
            f"{', '.join(broken[:3])}{more}; give a whole checkpoint, of a run that did not diverge"
        )
    return params


def _fresh_head(role: Role, seed: int) -> dict | None:
    """Returns values for a critic's head that its checkpoint lacks, or that is to be started anew."""
    spec, model = role.spec, role.model
    if not spec.config.is_critic:
        return None
    if not spec.init_critic_from_actor and has_critic_head(spec.path):
        return None
    return {"head/kernel": make_fill("head/kernel", model.abstract["head"]["kernel"].shape, seed)}
