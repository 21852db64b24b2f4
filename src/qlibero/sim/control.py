"""The arm's and gripper's control between two policy steps: robosuite's arithmetic with its look-ups done once.

robosuite recomputes names, limits, dimensions and each Jacobian twice at every one of the 25 substeps, which costs more
than the physics. Here the same operations run on the same operands in the same memory layout (so that BLAS takes the
same path), compiled where they are not BLAS's (`osc.py`); torques, and every attribute robosuite's controller would
hold afterwards, are equal bit for bit.
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
        self.joints_qpos, self.joints = np.array(controller.qpos_index), np.array(controller.qvel_index)
        self.arm_actuators = np.array(robot._ref_joint_actuator_indexes)
        self.low, self.high = robot.torque_limits
        self.gripper_actuators = np.array([model.actuator_name2id(actuator) for actuator in gripper.actuators])
        limits = model.actuator_ctrlrange[self.gripper_actuators]
        self.gripper_bias = 0.5 * (limits[:, 1] + limits[:, 0])
        self.gripper_weight = 0.5 * (limits[:, 1] - limits[:, 0])
        self.jacp, self.jacr = np.zeros((3, self.model.nv)), np.zeros((3, self.model.nv))
        self.full_mass = np.zeros((self.model.nv, self.model.nv))
        self.wrench = np.zeros(6)
        self.wrench_pos, self.wrench_ori = self.wrench[:3], self.wrench[3:]

    def substep(self, action: np.ndarray) -> None:
        """Write `data.ctrl` for one substep of the (7,) float64 `action`; positions and velocities must be current."""
        import mujoco

        from qlibero.sim.osc import actuate, task_space

        c, gripper = self.controller, self.gripper
        # Controller.update
        mujoco.mj_jacSite(self.model, self.data, self.jacp, self.jacr, self.site)
        mujoco.mj_fullM(self.model, self.full_mass, self.qm)
        c.ee_pos_vel, c.ee_ori_vel = np.dot(self.jacp, self.qvel), np.dot(self.jacr, self.qvel)
        # OperationalSpaceController.run_controller
        force, torque, lambda_pos, lambda_ori, nullspace, *found = task_space(
            self.jacp, self.jacr, self.full_mass, self.qpos, self.qvel, self.joints_qpos, self.joints,
            self.site_position, self.site_rotation, c.goal_pos, c.goal_ori, c.kp, c.kd, c.ee_pos_vel, c.ee_ori_vel,
        )  # fmt: skip
        c.J_full, c.J_pos, c.J_ori, c.mass_matrix, c.joint_pos, c.joint_vel, c.ee_pos, c.ee_ori_mat = found
        np.dot(lambda_pos, force, out=self.wrench_pos)
        np.dot(lambda_ori, torque, out=self.wrench_ori)
        c.torques, self.robot.torques, gripper.current_action = actuate(
            self.ctrl, np.dot(c.J_full.T, self.wrench), self.bias, self.joints, c.mass_matrix, nullspace,
            c.initial_joint, c.joint_pos, c.joint_vel, self.low, self.high, self.arm_actuators,
            gripper.current_action, np.sign(action[6]), gripper.speed, self.gripper_bias, self.gripper_weight,
            self.gripper_actuators,
        )  # fmt: skip
        c.new_update = True
