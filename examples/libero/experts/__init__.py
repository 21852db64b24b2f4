"""Scripted experts that solve LIBERO tasks from privileged simulator state.

They exist to make demonstrations: nothing here is used at evaluation. `make_expert` reads the goal of a
LIBERO environment and returns an expert whose `act()` gives the next clean 7-D OSC_POSE action. An expert
may be created in any state of an episode (after a disturbance, or after a policy drove for a while): it
looks at the scene and starts with the phase that fits, which is what makes recovery data and DAgger possible.
"""

from __future__ import annotations

from .drawer import Drawer
from .expert import Expert, Sequence
from .knob import Knob
from .pick_place import PickPlace
from .push import Push
from .world import World

__all__ = ["Expert", "PickPlace", "World", "make_expert"]


def make_expert(env) -> Expert:
    """The expert for the (single) goal predicate of `env`, the robosuite-level LIBERO environment.

    Raises NotImplementedError for goals outside libero_object, libero_spatial and libero_goal.
    """
    world = World(env)
    predicate, *arguments = env.parsed_problem["goal_state"][0]
    predicate = predicate.lower()
    if predicate == "turnon":
        return Knob(world)
    if predicate == "open":
        return Drawer(world, arguments[0])
    if predicate not in ("in", "on"):
        raise NotImplementedError(f"no expert for the goal predicate {predicate!r}")
    obj, target = arguments
    if obj.startswith("plate"):
        return Push(world, obj, target)
    pick_place = PickPlace(world, obj, destination(world, obj, target))
    if predicate == "in" and "cabinet" in target:
        return Sequence(world, [Drawer(world, target), pick_place])
    return pick_place


def destination(world: World, obj: str, target: str):
    """A function of no arguments giving the point (3,) where the underside of `obj` should come to rest."""
    if target.endswith("_contain_region"):
        container = target[: -len("_contain_region")]

        def place():
            low, high = world.bounds(container)
            return [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, high[2] - 0.02]
    elif target in world.env.obj_body_id:

        def place():
            low, high = world.bounds(target)
            x, y, _ = world.position(target)
            return [x, y, low[2] + (0.012 if target.startswith("plate") else 0.03)]
    else:

        def place():
            x, y, _ = world.site(target)
            return [x, y, world.surface_height([x, y], ignore=(obj, world.ROBOT)) + 0.004]

    return place
