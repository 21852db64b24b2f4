"""robosuite's operational space control of one substep, compiled: its own numba functions with what lies between them.

Bit for bit what `OperationalSpaceController` computes: the same operations on operands of the same memory layout, no
sum reordered, nothing contracted. Products of a matrix and a vector stay numpy's, whose BLAS is not the one that numba
calls: they come in as arguments, or stand between the two functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

Array = NDArray[Any]


@njit(cache=True)  # type: ignore[untyped-decorator]
def task_space(
    jacp: Array, jacr: Array, full_mass: Array, qpos: Array, qvel: Array, qpos_at: Array, dof: Array, position: Array,
    rotation: Array, goal_position: Array, goal_rotation: Array, kp: Array, kd: Array, v: Array, w: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """Force (3,) and torque (3,) wanted of the end effector, and what turns them into joint torques.

    jacp, jacr (3, nv): the site's Jacobians; full_mass (nv, nv); qpos_at, dof (7,): where the arm's joints stand; v, w
    (3,): jacp · qvel and jacr · qvel. Returns force, torque, λ_pos, λ_ori (3, 3), null space (7, 7), J, J_pos, J_ori,
    mass (7, 7), joint positions and velocities (7,), the site's position and rotation.
    """
    n = dof.size
    jacobian, of_position, of_rotation = np.empty((n, 6)).T, np.empty((n, 3)).T, np.empty((n, 3)).T
    mass, joint_pos, joint_vel = np.empty((n, n)).T, np.empty(n), np.empty(n)
    for i in range(n):
        joint_pos[i], joint_vel[i] = qpos[qpos_at[i]], qvel[dof[i]]
        for k in range(3):
            of_position[k, i] = jacobian[k, i] = jacp[k, dof[i]]
            of_rotation[k, i] = jacobian[3 + k, i] = jacr[k, dof[i]]
        for j in range(n):
            mass[i, j] = full_mass[dof[i], dof[j]]
    at, turned = position.copy(), rotation.copy()
    error = orientation_error(goal_rotation, turned)
    force, torque = np.empty(3), np.empty(3)
    for k in range(3):
        force[k] = (goal_position[k] - at[k]) * kp[k] + -v[k] * kd[k]
        torque[k] = error[k] * kp[3 + k] + -w[k] * kd[3 + k]
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(mass, jacobian, of_position, of_rotation)
    return (
        force, torque, lambda_pos, lambda_ori, nullspace, jacobian, of_position, of_rotation, mass, joint_pos,
        joint_vel, at, turned,
    )  # fmt: skip


@njit(cache=True)  # type: ignore[untyped-decorator]
def actuate(
    ctrl: Array, driven: Array, bias: Array, dof: Array, mass: Array, nullspace: Array, rest: Array, joint_pos: Array,
    joint_vel: Array, low: Array, high: Array, arm_at: Array, gripper: Array, closing: float, speed: float,
    gripper_bias: Array, gripper_weight: Array, gripper_at: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Write `ctrl` for the arm and the gripper's two fingers.

    `driven` (7,) is Jᵀ · wrench; to it come gravity's compensation and the pull to the joints' `rest`. `closing` is the
    sign of the gripper's action. Returns torques (7,), torques within their limits, the gripper's new command (2,).
    """
    torques = np.empty(dof.size)
    pull = nullspace_torques(mass, nullspace, rest, joint_pos, joint_vel)
    for i in range(dof.size):
        torques[i] = (driven[i] + bias[dof[i]]) + pull[i]
    clipped = np.minimum(np.maximum(torques, low), high)
    for i in range(arm_at.size):
        ctrl[arm_at[i]] = clipped[i]
    moved = np.empty(2)
    moved[0] = gripper[0] + -1.0 * speed * closing
    moved[1] = gripper[1] + 1.0 * speed * closing
    moved = np.minimum(np.maximum(moved, -1.0), 1.0)
    for i in range(2):
        ctrl[gripper_at[i]] = gripper_bias[i] + gripper_weight[i] * moved[i]
    return torques, clipped, moved
