"""The arm's and gripper's control between two policy steps: robosuite's arithmetic with its look-ups done once.

robosuite recomputes names, limits, dimensions and each Jacobian twice at every one of the 25 substeps, which costs more
than the physics. Here the same operations run on the same operands in the same memory layout (so that BLAS takes the
same path); torques, and every attribute robosuite's controller would hold afterwards, are equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class ArmControl:
    """Substeps 2 to 25 of a control step for the Panda under OSC_POSE as LIBERO configures it.

    Made anew after each reset, which replaces robosuite's robot and controller. The first substep, which sets the goal,
    is robosuite's own.
    """

    def __init__(self, env: Any) -> None:
        from robosuite.controllers.osc import OperationalSpaceController
        from robosuite.models.grippers.panda_gripper import PandaGripper

        (robot,) = env.robots
        controller, gripper, model = robot.controller, robot.gripper, env.sim.model
        # what the arithmetic below takes for granted
        assert type(controller) is OperationalSpaceController and type(gripper) is PandaGripper
        assert controller.impedance_mode == "fixed" and controller.uncoupling
        assert controller.interpolator_pos is None and controller.interpolator_ori is None
        self.robot, self.controller, self.gripper = robot, controller, gripper
        self.model, self.data = model._model, env.sim.data._data
        data = self.data
        self.site = model.site_name2id(controller.eef_name)
        self.site_position = data.site_xpos[self.site]
        self.site_rotation = data.site_xmat[self.site].reshape([3, 3])
        self.qpos, self.qvel, self.qm, self.bias, self.ctrl = data.qpos, data.qvel, data.qM, data.qfrc_bias, data.ctrl
        self.joints_qpos, self.joints = controller.qpos_index, controller.qvel_index
        self.arm_actuators = robot._ref_joint_actuator_indexes
        self.low, self.high = robot.torque_limits
        self.gripper_actuators = [model.actuator_name2id(actuator) for actuator in gripper.actuators]
        limits = model.actuator_ctrlrange[self.gripper_actuators]
        self.gripper_bias = 0.5 * (limits[:, 1] + limits[:, 0])
        self.gripper_weight = 0.5 * (limits[:, 1] - limits[:, 0])
        self.jacp, self.jacr = np.zeros((3, self.model.nv)), np.zeros((3, self.model.nv))
        self.full_mass = np.zeros((self.model.nv, self.model.nv))

    def substep(self, action: np.ndarray) -> None:
        """Write `data.ctrl` for one substep of the (7,) float64 `action`; positions and velocities must be current."""
        self._arm()
        gripper = self.gripper
        gripper.current_action = np.clip(
            gripper.current_action + np.array([-1.0, 1.0]) * gripper.speed * np.sign(action[6:]), -1.0, 1.0
        )
        self.ctrl[self.gripper_actuators] = self.gripper_bias + self.gripper_weight * gripper.current_action
        self.ctrl[self.arm_actuators] = self.robot.torques

    def _arm(self) -> None:
        import mujoco
        from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

        c = self.controller
        # Controller.update
        mujoco.mj_jacSite(self.model, self.data, self.jacp, self.jacr, self.site)
        mujoco.mj_fullM(self.model, self.full_mass, self.qm)
        c.ee_pos, c.ee_ori_mat = np.array(self.site_position), np.array(self.site_rotation)
        c.ee_pos_vel, c.ee_ori_vel = np.dot(self.jacp, self.qvel), np.dot(self.jacr, self.qvel)
        c.joint_pos, c.joint_vel = self.qpos[self.joints_qpos], self.qvel[self.joints]
        c.J_pos, c.J_ori = np.array(self.jacp[:, self.joints]), np.array(self.jacr[:, self.joints])
        c.J_full = np.array(np.vstack([c.J_pos, c.J_ori]))
        c.mass_matrix = self.full_mass[self.joints, :][:, self.joints]
        # OperationalSpaceController.run_controller
        rotation_error = orientation_error(np.array(c.goal_ori), c.ee_ori_mat)
        force = np.multiply(c.goal_pos - c.ee_pos, c.kp[0:3]) + np.multiply(-c.ee_pos_vel, c.kd[0:3])
        torque = np.multiply(rotation_error, c.kp[3:6]) + np.multiply(-c.ee_ori_vel, c.kd[3:6])
        _, lambda_pos, lambda_ori, nullspace = opspace_matrices(c.mass_matrix, c.J_full, c.J_pos, c.J_ori)
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        c.torques = np.dot(c.J_full.T, wrench) + self.bias[self.joints]
        c.torques += nullspace_torques(c.mass_matrix, nullspace, c.initial_joint, c.joint_pos, c.joint_vel)
        c.new_update = True
        self.robot.torques = np.clip(c.torques, self.low, self.high)
