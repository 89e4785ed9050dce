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
from realjax.core.trees import Tree, flatten_paths, join_trees, map_paths, select_paths
from realjax.dataflow.run import RoleSpec, RunSpec
from realjax.engine.attention.cases import Case
from realjax.engine.attention.choose import choose
from realjax.engine.optim import Optimizer
from realjax.engine.state import TrainState, abstract_train_state, init_train_state, train_state_shardings
from realjax.hf.adapters import load_adapters, merge_adapters, with_adapters
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
        """Where the own parameters of a role lie that is never trained."""
        return self.take_own(self.shardings(self.home, "pinned_host" if self.is_offloaded else None))

    @property
    def frozen(self) -> Tree:
        """The shapes of the parameters that are its base's."""
        own = flatten_paths(self.take_own(self.model.abstract))
        return select_paths(lambda path: path not in own, self.model.abstract)

    def take_own(self, tree: Tree) -> Tree:
        """Returns what a tree has for the parameters that are not its base's: all, with adapters these, or none."""
        if self.spec.base is None:
            return tree
        return {} if self.model.config.lora is None else self.model.take_trained(tree)

    def shardings(self, layout: Layout, memory_kind: str | None = None) -> Tree:
        """Returns where a call in `layout` has the parameters."""
        rules = inference_rules(layout.strategy)
        return tree_shardings(self.model.axes, self.model.abstract, rules, layout, memory_kind)

    def frozen_shardings(self, layout: Layout) -> Tree:
        """Returns where a call in `layout` has the base's parameters."""
        return tree_shardings(self.model.axes, self.frozen, inference_rules(layout.strategy), layout)

    @property
    def param_dtype(self) -> np.dtype:
        """The dtype they are kept in: the calls' own, or float32 where small changes are added to them."""
        return np.dtype(np.float32) if self.spec.is_averaged else self.compute.array_dtype

    def copy_shardings(self, layout: Layout) -> Tree | None:
        """Returns where a call in `layout` has its own copy of the parameters; None where it reads those at home."""
        if layout == self.home and not self.is_offloaded:
            return None
        return self.shardings(layout)

    @property
    def generator(self) -> Model:
        """The model that answers are drawn from: without adapters where these are merged."""
        return build_model(self.model.config.without_adapters()) if self.spec.merges_adapters else self.model

    def abstract_state(self) -> TrainState | Tree:
        """Returns the shapes and shardings of the role's state; a saved state is restored into this."""
        if self.optimizer is not None:
            return abstract_train_state(self.model, self.optimizer, self.home)

        def one(path: str, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, self.model.copy_dtype(path, self.param_dtype), sharding=sharding)

        return map_paths(one, self.take_own(self.model.abstract), self.param_shardings)


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


def load_base(role: Role, shardings: Tree) -> Tree:
    """Returns the parameters of a role that are not trained, those that have shardings, in the compute dtype."""
    return _read(role, shardings, role.compute.array_dtype, _fresh_head(role, seed=0))


def _load_params(role: Role, shardings: Tree, seed: int, dtype: np.dtype | type) -> Tree:
    if role.spec.init_from_scratch:
        return init_params(role.model, shardings, seed, dtype)
    if role.spec.base is not None:
        return _load_own(role, shardings, seed, dtype)
    return _read(role, shardings, dtype, _fresh_head(role, seed))


def _load_own(role: Role, shardings: Tree, seed: int, dtype: np.dtype | type) -> Tree:
    """Returns the adapters, and a critic's head, as they begin: those of a directory, else new ones."""
    if not flatten_paths(shardings):
        return {}
    own = init_params(role.model, shardings, seed, dtype)
    if role.spec.config.is_critic:
        own = join_trees(own, _read(role, {"head": shardings["head"]}, dtype, _fresh_head(role, seed)))
    if role.spec.adapter is not None:
        own = join_trees(own, load_adapters(role.spec.adapter, role.model, shardings, dtype))
    _refuse_nonfinite(own, role, dtype)
    return own


def _read(role: Role, shardings: Tree, dtype: np.dtype | type, fresh: dict | None) -> Tree:
    """Returns those parameters of a role's checkpoint that have shardings; adapters that it is to have are merged."""
    plain = build_model(role.model.config.without_adapters())
    if role.spec.merged is None:
        params = load_params(role.spec.path, plain, shardings, dtype=dtype, fresh=fresh)
    else:
        # Programs do not read host memory as it is.
        here = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), shardings)
        params = _merge(role, load_params(role.spec.path, plain, here, dtype=dtype, fresh=fresh))
        params = jax.tree.map(jax.device_put, params, shardings)
    _refuse_nonfinite(params, role, dtype)
    return params


def _merge(role: Role, params: Tree) -> Tree:
    assert role.spec.merged is not None
    config = with_adapters(role.model.config.without_adapters(), role.spec.merged)
    assert config.lora is not None
    model = build_model(config)
    everywhere = map_paths(lambda path, leaf: role.home.replicated, model.take_trained(model.abstract))
    return merge_adapters(params, load_adapters(role.spec.merged, model, everywhere), config.lora)


def _refuse_nonfinite(params: Tree, role: Role, dtype: np.dtype | type) -> None:
    if broken := nonfinite_leaves(params, role.home):
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(
            f"{role.spec.title} holds numbers that are not finite as {np.dtype(dtype)}, in "
            f"{', '.join(broken[:3])}{more}; give a whole checkpoint, of a run that did not diverge"
        )


def _fresh_head(role: Role, seed: int) -> dict | None:
    """Returns values for a critic's head that its checkpoint lacks, or that is to be started anew."""
    spec, model = role.spec, role.model
    if not spec.config.is_critic:
        return None
    if not spec.init_critic_from_actor and has_critic_head(spec.path):
        return None
    return {"head/kernel": make_fill("head/kernel", model.abstract["head"]["kernel"].shape, seed)}
