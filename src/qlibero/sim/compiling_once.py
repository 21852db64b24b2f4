"""LIBERO's environments with the model compiled once, and the camera where a variant of a task has it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from qlibero.sim.perturbation import Perturbation


@functools.cache
def compiling_once(problem: type) -> type:
    """A LIBERO problem whose hard reset compiles its MuJoCo model (and uploads it to GL) only when the XML changed.

    robosuite's hard reset rebuilds the model from its XML, which costs 2 s and gives the same model every time; here an
    identical XML gets the compiled model back with every array as the compiler left it, and fresh data. LIBERO's
    Python side (robots, controllers, samplers) is still made anew by its own code.
    """

    class CompilingOnce(problem):  # type: ignore[misc]
        _compiled_xml: str | None = None
        _pristine: dict[str, np.ndarray]

        def __init__(self, *args: Any, perturbation: Perturbation, **kwargs: Any) -> None:
            self._perturbation = perturbation
            super().__init__(*args, **kwargs)

        def _setup_camera(self, mujoco_arena: Any) -> None:
            super()._setup_camera(mujoco_arena)
            self._perturbation.move_camera(mujoco_arena)

        def _initialize_sim(self, xml_string: str | None = None) -> None:
            import mujoco

            xml = xml_string or self.model.get_xml()
            if xml == self._compiled_xml:
                model, data = self.sim.model._model, self.sim.data._data
                for name, pristine in self._pristine.items():
                    getattr(model, name)[...] = pristine
                mujoco.mj_resetData(model, data)
                self.sim.forward()
                # robosuite makes a renderer for every fresh simulation, whose constructor calls forward() once more:
                # the solver starts where the last call left it, and a start that differs stays
                # in the last bits of the episode
                self.sim.forward()
                self.initialize_time(self.control_freq)
                return
            if self.sim is not None:
                self.sim._render_context_offscreen.gl_ctx.make_current()
                self._destroy_viewer()
                self._destroy_sim()
            super()._initialize_sim(xml)
            self._compiled_xml = xml
            self._pristine = _mutable_arrays(self.sim.model._model)

        sim: Any = None  # robosuite first looks at it in `_destroy_sim`

    CompilingOnce.__name__ = problem.__name__  # LIBERO compares it with the bddl file's problem
    return CompilingOnce


def _mutable_arrays(model: Any) -> dict[str, np.ndarray]:
    """Copies of every array of a compiled model but the meshes, textures and names, which nothing writes to."""
    heavy = ("mesh_", "tex_", "hfield_", "skin_", "bvh_", "flex_", "name", "text_", "numeric_")
    arrays = {}
    for name in dir(model):
        if name.startswith(("_", *heavy)):
            continue
        value = getattr(model, name)
        if isinstance(value, np.ndarray) and value.size:
            arrays[name] = value.copy()
    return arrays
